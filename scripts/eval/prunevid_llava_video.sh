#!/usr/bin/env bash
# PruneVid on LLaVA-Video. See lib/run_eval.sh for every setting.
#
#   bash scripts/eval/prunevid_llava_video.sh
#       no GPU, no weights needed: the embedded model and benchmark, dense against PruneVid, table and pictures
#   PRETRAINED=lmms-lab/LLaVA-Video-7B-Qwen2 TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/prunevid_llava_video.sh
#       the real model on 8 GPUs
CONFIG=prunevid/llava_video
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
