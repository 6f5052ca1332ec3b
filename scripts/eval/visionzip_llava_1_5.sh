#!/usr/bin/env bash
# VisionZip on LLaVA-1.5. See lib/run_eval.sh for every setting.
#
#   bash scripts/eval/visionzip_llava_1_5.sh
#       no GPU, no weights needed: the embedded model (a small LLaVA-OneVision) and benchmark, table and pictures
#   PRETRAINED=liuhaotian/llava-v1.5-7b TASKS=gqa,mme,pope NUM_PROCESSES=8 bash scripts/eval/visionzip_llava_1_5.sh
#       on 8 GPUs
CONFIG=visionzip/llava_1_5
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
