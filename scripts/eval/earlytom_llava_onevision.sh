#!/usr/bin/env bash
# EarlyTom on LLaVA-OneVision: what configs/earlytom/llava_onevision.yaml says, next to the dense model.
# Made by `python scripts/generate` from scripts/generate/eval_scripts.py. lib/run_eval.sh explains every variable.
#
# No GPU, no weights needed: the embedded model and benchmark, table and pictures:
#     bash scripts/eval/earlytom_llava_onevision.sh
# On 8 GPUs:
#     PRETRAINED=lmms-lab/llava-onevision-qwen2-7b-ov TASKS=videomme NUM_PROCESSES=8 \
#         bash scripts/eval/earlytom_llava_onevision.sh
# METHODS=levels: EarlyTom at all 4 levels that the config lists.
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
arguments_of_environment
ensure_env
exec "$PY" -m lmms_eval_accelerate.compare --config earlytom/llava_onevision "${arguments[@]}" "$@"
