#!/usr/bin/env bash
# Accuracy and cost of runs as one HTML page with tables: sets up the environment and runs
# `python -m lmms_eval_accelerate.report`. All arguments go to it; docs/report.md explains them.
#
#   bash scripts/report.sh outputs/fastvid_llava_onevision_* --output outputs/report
#
#   PYTHON, VENV      see lib/common.sh

source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_env
# the directory is not changed: the folders may be relative
exec "$PY" -m lmms_eval_accelerate.report "$@"
