#!/usr/bin/env bash
# HICom: the model as it is; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=lntzm/HICom_7B_qwen25_directg_local43_global32 TASKS=videomme NUM_PROCESSES=8 \
#         bash scripts/eval/hicom.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/hicom lntzm/HICom_7B_qwen25_directg_local43_global32
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/hicom "${arguments[@]}" "$@"
