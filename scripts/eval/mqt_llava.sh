#!/usr/bin/env bash
# MQT-LLaVA: the model as it is and at 5 levels of its own; with METHODS, training-free methods on it.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# On 8 GPUs:
#     PRETRAINED=gordonhu/MQT-LLaVA-7b TASKS=gqa,mme,pope NUM_PROCESSES=8 bash scripts/eval/mqt_llava.sh
# METHODS="dense(num_visual_tokens=2)": one of them; METHODS=levels: all.
# MODEL_ARGS=num_visual_tokens=...: for all runs (default: 256).
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
needs_checkpoint models/mqt_llava gordonhu/MQT-LLaVA-7b
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config models/mqt_llava "${arguments[@]}" "$@"
