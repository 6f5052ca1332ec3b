#!/usr/bin/env bash
# Set up the environment and run all tests. Arguments go to pytest, e.g. `bash scripts/test.sh -k fastvid`.
source "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
ensure_env
cd "$ROOT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PY" -m pytest "$@"
