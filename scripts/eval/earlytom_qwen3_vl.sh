#!/usr/bin/env bash
# EarlyTom on Qwen3-VL of transformers: what configs/earlytom/qwen3_vl.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=Qwen/Qwen3-VL-8B-Instruct TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/earlytom_qwen3_vl.sh
# METHODS=levels: EarlyTom at all 4 levels that the config lists.
# Other models of transformers: PRETRAINED, and MODEL_ARGS if their limits differ.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint earlytom/qwen3_vl Qwen/Qwen3-VL-8B-Instruct
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config earlytom/qwen3_vl "${arguments[@]}" "$@"
