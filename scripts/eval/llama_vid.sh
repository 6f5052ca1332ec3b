#!/usr/bin/env bash
# LLaMA-VID: the model as it is; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=YanweiLi/llama-vid-7b-full-224-video-fps-1 TASKS=videomme NUM_PROCESSES=8 \
#         bash scripts/eval/llama_vid.sh
# MODEL_ARGS=fps=...: for all runs (default: 1).
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/llama_vid YanweiLi/llama-vid-7b-full-224-video-fps-1
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/llama_vid "${arguments[@]}" "$@"
