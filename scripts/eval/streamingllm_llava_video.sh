#!/usr/bin/env bash
# StreamingLLM on LLaVA-Video: what configs/streamingllm/llava_video.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# No GPU, no weights needed: the embedded model and benchmark, table and pictures:
#     bash scripts/eval/streamingllm_llava_video.sh
# On 8 GPUs:
#     PRETRAINED=lmms-lab/LLaVA-Video-7B-Qwen2 TASKS=videomme NUM_PROCESSES=8 \
#         bash scripts/eval/streamingllm_llava_video.sh
# METHODS=levels: StreamingLLM at all 3 levels that the config lists.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config streamingllm/llava_video "${arguments[@]}" "$@"
