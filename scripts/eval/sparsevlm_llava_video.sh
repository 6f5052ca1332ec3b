#!/usr/bin/env bash
# SparseVLM on LLaVA-Video: what configs/sparsevlm/llava_video.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# No GPU, no weights needed: the embedded model and benchmark, table and pictures:
#     bash scripts/eval/sparsevlm_llava_video.sh
# On 8 GPUs:
#     PRETRAINED=lmms-lab/LLaVA-Video-7B-Qwen2 TASKS=videomme NUM_PROCESSES=8 \
#         bash scripts/eval/sparsevlm_llava_video.sh
# METHODS=levels: SparseVLM at all 2 levels that the config lists.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config sparsevlm/llava_video "${arguments[@]}" "$@"
