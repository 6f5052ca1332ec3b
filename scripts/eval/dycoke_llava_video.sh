#!/usr/bin/env bash
# DyCoke on LLaVA-Video (our extension, see the config). See lib/run_eval.sh for every setting.
#
#   bash scripts/eval/dycoke_llava_video.sh
#       no GPU, no weights needed: the embedded model and benchmark, dense against DyCoke, table and pictures
#   PRETRAINED=lmms-lab/LLaVA-Video-7B-Qwen2 TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/dycoke_llava_video.sh
#       a real model on 8 GPUs
CONFIG=dycoke/llava_video
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
