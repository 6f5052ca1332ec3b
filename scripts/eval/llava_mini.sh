#!/usr/bin/env bash
# LLaVA-Mini: the model as it is; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=ICTNLP/llava-mini-llama-3.1-8b TASKS=gqa,mme,pope NUM_PROCESSES=8 bash scripts/eval/llava_mini.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/llava_mini ICTNLP/llava-mini-llama-3.1-8b
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/llava_mini "${arguments[@]}" "$@"
