#!/usr/bin/env bash
# Video-XL: the model as it is; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=sy1998/Video_XL TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/video_xl.sh
# MODEL_ARGS=beacon_ratio=...: for all runs (default: None).
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/video_xl sy1998/Video_XL
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/video_xl "${arguments[@]}" "$@"
