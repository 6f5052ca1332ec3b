#!/usr/bin/env bash
# DyCoke on LLaVA-OneVision. See lib/run_eval.sh for every setting.
#
#   bash scripts/eval/dycoke_llava_ov.sh
#       no GPU, no weights needed: the embedded model and benchmark, dense against DyCoke, table and pictures
#   PRETRAINED=lmms-lab/llava-onevision-qwen2-7b-ov TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/dycoke_llava_ov.sh
#       the paper's experiment on 8 GPUs
CONFIG=dycoke/llava_onevision
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
