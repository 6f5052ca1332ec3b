#!/usr/bin/env bash
# FasterVLM on Qwen2.5-VL of transformers. See lib/run_eval.sh for every setting.
#
#   PRETRAINED=Qwen/Qwen2.5-VL-7B-Instruct TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/fastervlm_qwen2_5_vl.sh
#       dense against FasterVLM on 8 GPUs; other models of transformers: PRETRAINED, and MODEL_ARGS if their limits differ
CONFIG=fastervlm/qwen2_5_vl
NEEDS=Qwen/Qwen2.5-VL-7B-Instruct
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
