#!/usr/bin/env bash
# FlashSloth: the model as it is; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=Tongbo/FlashSloth-3.2B TASKS=gqa,mme,pope NUM_PROCESSES=8 bash scripts/eval/flashsloth.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/flashsloth Tongbo/FlashSloth-3.2B
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/flashsloth "${arguments[@]}" "$@"
