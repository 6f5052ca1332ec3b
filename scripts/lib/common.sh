# Shared by the scripts: find a Python, make the environment once, report problems in one line. Source it.
#
#   PYTHON=/path/to/python   use this interpreter with what it has installed; nothing is set up
#   VENV=/path               where the environment lives (default: .venv in the project)

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"

# Images for containers like to forbid bytecode: every process would compile torch and all that it loads anew (30 s of CPU
# for one start of the harness), so that it goes into a folder of its own there.
if [[ -n "${PYTHONDONTWRITEBYTECODE:-}" ]]; then
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-$ROOT/.cache/bytecode}"
fi

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
# refuse MESSAGE: what the user asked for is not possible, and nothing was started.
refuse() { printf 'error: %s\n' "$*" >&2; exit 2; }

# help_of SCRIPT ARGUMENTS...: for scripts without arguments of their own. -h shows the comment at the script's beginning
# and ends; any other argument is refused.
help_of() {
    local script="$1"
    shift
    [[ $# -gt 0 ]] || return 0
    [[ "$1" == -h || "$1" == --help ]] || refuse "$(basename "$script") takes no arguments ($1); -h shows its variables"
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$script"
    exit 0
}

# ignored NAME WHY...: says that the variable NAME, where it is set, changes nothing here.
ignored() {
    local name="$1"
    shift
    [[ -z "${!name:-}" ]] || say "warning: $name=${!name} is ignored: $*"
}

# is_on NAME: whether the switch in the variable NAME is on; ends the script if it is neither on nor off.
is_on() {
    case "${!1:-}" in
        1 | true | TRUE | True | yes | on) return 0 ;;
        "" | 0 | false | FALSE | False | no | off) return 1 ;;
        *) refuse "$1=${!1} is neither on (1, true, yes) nor off (0, false, no)" ;;
    esac
}

# First Python on the machine that we support (3.10 to 3.13).
find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3.10 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.10 to 3.13 found; install one, or name it with PYTHON=/path/to/python"
}

# An environment with the project, the harness plugin and their pinned dependencies; sets PY. Redone when a file that
# says what to install changes.
ensure_env() {
    if [[ -n "${PYTHON:-}" ]]; then
        PY="$PYTHON"
        export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # from whatever folder a script is started
        "$PY" -c 'import llava, accelerate_methods, lmms_eval' 2>/dev/null ||
            die "PYTHON=$PYTHON lacks the packages; unset PYTHON to have an environment made, or run: " \
                "pip install -c constraints.txt -e '.[video,plots,dev]' -e lmms-eval"
        return
    fi
    PY="$VENV/bin/python"
    local wanted stamp="$VENV/.installed"
    wanted="$(cd "$ROOT" && cat setup.py constraints.txt lmms-eval/pyproject.toml | cksum) $ROOT"
    if [[ -x "$PY" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    local started=$SECONDS base uv
    base="$(find_python)"
    say "Setting up $VENV with $base (once; torch is large, this can take some minutes)"
    if uv="$(command -v uv)"; then
        [[ -x "$PY" ]] || "$uv" venv -q --python "$base" "$VENV"
    else
        [[ -x "$PY" ]] || "$base" -m venv "$VENV" || die "python -m venv failed; on Debian: apt-get install python3-venv"
        "$PY" -m pip install -q --disable-pip-version-check uv
        uv="$VENV/bin/uv"
    fi
    # Installed as editable: the scripts, configs and assets of this checkout are what runs.
    local packages=(-c constraints.txt -e '.[video,plots,dev]' -e lmms-eval)
    (
        cd "$ROOT"
        if ! "$uv" pip install --python "$PY" "${packages[@]}"; then
            say "uv did not manage (see above); trying pip, which may know this machine's proxies and certificates"
            "$PY" -m pip --version >/dev/null 2>&1 || "$PY" -m ensurepip >/dev/null
            "$PY" -m pip install --disable-pip-version-check "${packages[@]}"
        fi
    ) || die "the packages could not be installed, see above"
    printf '%s' "$wanted" >"$stamp"
    say "Environment ready after $((SECONDS - started)) s"
}
