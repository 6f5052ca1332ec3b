#!/usr/bin/env bash
# FastV on Qwen2.5-VL of transformers. See lib/run_eval.sh for every setting.
#
#   PRETRAINED=Qwen/Qwen2.5-VL-7B-Instruct TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/fastv_qwen2_5_vl.sh
#       dense against FastV on 8 GPUs; other models of transformers: PRETRAINED, and MODEL_ARGS if their limits differ
CONFIG=fastv/qwen2_5_vl
NEEDS=Qwen/Qwen2.5-VL-7B-Instruct
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
