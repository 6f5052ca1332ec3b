#!/usr/bin/env bash
# VoCo-LLaMA: the model as it is; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=path/to/voco_llama TASKS=gqa,mme,pope NUM_PROCESSES=8 bash scripts/eval/voco_llama.sh
# MODEL_ARGS=num_voco=...: for all runs (default: 2).
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/voco_llama path/to/voco_llama
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/voco_llama "${arguments[@]}" "$@"
