#!/usr/bin/env bash
# FastVID on LLaVA-Video. See lib/run_eval.sh for every setting.
#
#   bash scripts/eval/fastvid_llava_video.sh
#       no GPU, no weights needed: the embedded model and benchmark, dense against FastVID, table and pictures
#   PRETRAINED=lmms-lab/LLaVA-Video-7B-Qwen2 TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/fastvid_llava_video.sh
#       the paper's experiment on 8 GPUs
CONFIG=fastvid/llava_video
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
