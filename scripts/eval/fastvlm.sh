#!/usr/bin/env bash
# FastVLM: the model as it is; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=apple/FastVLM-7B TASKS=gqa,mme,pope NUM_PROCESSES=8 bash scripts/eval/fastvlm.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/fastvlm apple/FastVLM-7B
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/fastvlm "${arguments[@]}" "$@"
