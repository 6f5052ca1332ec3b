#!/usr/bin/env bash
# StreamingLLM on LLaVA-NeXT: what configs/streamingllm/llava_next.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# No GPU, no weights needed: the embedded model (a small LLaVA-OneVision) and benchmark, table and pictures:
#     bash scripts/eval/streamingllm_llava_next.sh
# On 8 GPUs:
#     PRETRAINED=liuhaotian/llava-v1.6-vicuna-7b TASKS=gqa,mme,pope NUM_PROCESSES=8 \
#         bash scripts/eval/streamingllm_llava_next.sh
# METHODS=levels: StreamingLLM at all 2 levels that the config lists.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config streamingllm/llava_next "${arguments[@]}" "$@"
