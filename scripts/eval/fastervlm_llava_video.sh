#!/usr/bin/env bash
# FasterVLM on LLaVA-Video. See lib/run_eval.sh for every setting.
#
#   bash scripts/eval/fastervlm_llava_video.sh
#       no GPU, no weights needed: the embedded model and benchmark, dense against FasterVLM, table and pictures
#   PRETRAINED=lmms-lab/LLaVA-Video-7B-Qwen2 TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/fastervlm_llava_video.sh
#       on 8 GPUs
CONFIG=fastervlm/llava_video
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
