#!/usr/bin/env bash
# VisionZip on LLaVA-OneVision. See lib/run_eval.sh for every setting.
#
#   bash scripts/eval/visionzip_llava_ov.sh
#       no GPU, no weights needed: the embedded model and benchmark, dense against VisionZip, table and pictures
#   PRETRAINED=lmms-lab/llava-onevision-qwen2-7b-ov TASKS=videomme NUM_PROCESSES=8 bash scripts/eval/visionzip_llava_ov.sh
#       on 8 GPUs
CONFIG=visionzip/llava_onevision
source "$(dirname "${BASH_SOURCE[0]}")/../lib/run_eval.sh"
