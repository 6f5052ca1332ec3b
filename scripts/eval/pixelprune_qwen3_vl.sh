#!/usr/bin/env bash
# PixelPrune on Qwen3-VL of transformers: what configs/pixelprune/qwen3_vl.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=Qwen/Qwen3-VL-8B-Instruct TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/pixelprune_qwen3_vl.sh
# METHODS=levels: PixelPrune at all 5 levels that the config lists.
# Other models of transformers: PRETRAINED, and MODEL_ARGS if their limits differ.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint pixelprune/qwen3_vl Qwen/Qwen3-VL-8B-Instruct
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config pixelprune/qwen3_vl "${arguments[@]}" "$@"
