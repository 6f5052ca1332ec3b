#!/usr/bin/env bash
# MMTok on LLaVA-1.5: what configs/mmtok/llava_1_5.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# No GPU, no weights needed: the embedded model (a small LLaVA-OneVision) and benchmark, table and pictures:
#     bash scripts/eval/mmtok_llava_1_5.sh
# On 8 GPUs:
#     PRETRAINED=liuhaotian/llava-v1.5-7b TASKS=gqa,mme,pope NUM_PROCESSES=8 bash scripts/eval/mmtok_llava_1_5.sh
# METHODS=levels: MMTok at all 8 levels that the config lists.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config mmtok/llava_1_5 "${arguments[@]}" "$@"
