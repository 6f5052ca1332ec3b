#!/usr/bin/env bash
# Set up the environment and run all tests, several files at a time. Arguments go to pytest:
# `bash scripts/test.sh -k fastvid`; `-n 0` runs everything in one process, `-n 8` in eight. Without arguments the tests
# that need vLLM follow, in an environment of their own (scripts/lib/vllm.sh); `-m engine tests/hosts/vllm` are those.
source "$(dirname "${BASH_SOURCE[0]}")/lib/vllm.sh"
ensure_env
cd "$ROOT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
workers=()
if "$PY" -c 'import xdist' 2>/dev/null; then  # an interpreter of your own (PYTHON=) may lack it
    # a file stays in one process, which shares its fixtures; the order is that of tests/conftest.py
    workers=(-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
color=()
[[ ! -t 1 ]] || color=(--color=yes)
status=0
closing=()
# run_pytest PYTHON ARGUMENTS...: what it prints last is said again behind everything else
run_pytest() {
    local printed
    printed="$(mktemp)"
    "$1" -m pytest ${color[@]+"${color[@]}"} "${@:2}" | tee "$printed" || status=$?
    closing=("$(tail -n 1 "$printed")" ${closing[@]+"${closing[@]}"})
    rm -f "$printed"
}
if [[ "$*" != *"-m engine"* ]]; then
    run_pytest "$PY" ${workers[@]+"${workers[@]}"} "$@"
    [[ $# -eq 0 ]] || exit "$status" # a choice of tests
    set -- -m engine tests/hosts/vllm
fi
if ensure_vllm; then
    vllm_environment
    run_pytest "$VLLM_PY" -n 0 "$@"
else
    say "SKIPPED: tests of the vLLM plugin, because $VLLM_WHY"
fi
printf '%s\n' ${closing[@]+"${closing[@]}"}
exit "$status"
