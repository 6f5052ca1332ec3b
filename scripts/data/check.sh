#!/usr/bin/env bash
# Is the data of the benchmarks there, and is it the published set? Exit code 1 if something is missing.
#
#   bash scripts/data/check.sh --data DIR                  # all benchmarks, in a data folder
#   bash scripts/data/check.sh --data DIR videomme mvbench
#   bash scripts/data/check.sh videomme                    # where lmms-eval downloads to: the hub's cache and HF_HOME
#
# docs/benchmarks.md lists the benchmarks and says how a data folder is laid out. PYTHON: an interpreter that has the
# project's packages; otherwise the project's environment.

source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"
if [[ -n "${PYTHON:-}" ]]; then PY="$PYTHON"; else ensure_env; fi
# without changing the directory: DIR may be relative
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec "$PY" -m lmms_eval_accelerate.benchmarks check "$@"
