#!/usr/bin/env bash
# Download benchmarks into a data folder and unpack them where the stock tasks of lmms-eval look for them, so that runs
# with --data DIR need no network. Can be repeated: what is there is not fetched or unpacked again.
#
#   bash scripts/data/prepare.sh --data DIR videomme mvbench longvideobench_val_v mlvu_dev
#
# docs/benchmarks.md lists the benchmarks and says how a data folder is laid out. PYTHON: an interpreter that has the
# project's packages; otherwise the project's environment.

source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"
if [[ -n "${PYTHON:-}" ]]; then PY="$PYTHON"; else ensure_env; fi
# without changing the directory: DIR may be relative
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$PY" -m lmms_eval_accelerate.benchmarks prepare "$@"
