#!/usr/bin/env bash
# What every method costs on every official shape, on one GPU, in under 10 minutes (environment and downloads not
# counted; nothing is downloaded for the measurement itself, weights are random). Ends with all tables.
#
#   bash scripts/bench/gpu_matrix.sh
#   MODELS="llava-onevision-7b llava-1.5-7b" OUT=outputs/h100 bash scripts/bench/gpu_matrix.sh
#
#   OUT       folder of the results            (outputs/efficiency/<time>_matrix)
#   MODELS    shapes                           (all seven)
#   VIDEO_METHODS, IMAGE_METHODS               methods with their settings, see python -m accelerate_methods.bench --help
#   BUDGET    seconds for the whole matrix     (540); shapes for which nothing is left are named and left out
#   BENCH     further options of the bench     (e.g. BENCH="--device cpu --threads 2")
#   PYTHON    an interpreter that has torch, transformers, rich, matplotlib; otherwise the project's environment

source "$(dirname "${BASH_SOURCE[0]}")/../lib/common.sh"
help_of "${BASH_SOURCE[0]}" "$@"
cd "$ROOT"
if [[ -n "${PYTHON:-}" ]]; then PY="$PYTHON"; else ensure_env; fi

OUT="${OUT:-outputs/efficiency/$(date -u +%Y%m%d-%H%M%S)_matrix}"
BUDGET="${BUDGET:-540}"
[[ "$BUDGET" =~ ^[0-9]+$ ]] || die "BUDGET=$BUDGET is not a number of seconds"
# the most important first
MODELS="${MODELS:-llava-onevision-7b llava-1.5-7b llava-next-7b llava-video-7b llava-onevision-0.5b llava-1.5-13b llava-next-13b}"
VIDEO_METHODS="${VIDEO_METHODS:-dense fastvid@0.25 fastvid@0.1 fastv fastv@0.25 dycoke(k=0.3) dycoke(k=0.7) prunevid \
visionzip@0.25 visionzip@0.1 fastervlm@0.1 random@0.1}"
IMAGE_METHODS="${IMAGE_METHODS:-dense fastv fastv@0.25 fastv@0.1 visionzip@0.25 visionzip@0.1 fastervlm@0.25 fastervlm@0.1 \
random@0.1}"
[[ ! -e "$OUT" ]] || die "$OUT exists; results are never mixed with older ones"
mkdir -p "$OUT"

SECONDS=0
read -ra models <<<"$MODELS"
read -ra options <<<"${BENCH:-}"
left=${#models[@]}
failed=()
for model in "${models[@]}"; do
    # an even share of what is left; loading torch and building the model take about 15 s of it
    share=$(((BUDGET - SECONDS) / left - 15))
    left=$((left - 1))
    if ((share < 10)); then
        say "no time left for $model"
        failed+=("$model (no time left)")
        continue
    fi
    case "$model" in
        *1.5* | *next*) methods="$IMAGE_METHODS" ;;
        *) methods="$VIDEO_METHODS" ;;
    esac
    extra=()
    case "$model" in llava-onevision-7b | llava-1.5-7b | tiny) extra=(--compare-transformers --plots) ;; esac
    if [[ " ${options[*]-} " != *" cpu "* ]]; then extra+=(--check-sync); fi
    say "$model: at most $share s"
    # a result with rows of errors exits 1: the others are still of use
    "$PY" -m accelerate_methods.bench --model "$model" --methods "$methods" --repeats 7 --warmup 2 --new-tokens 16 \
        --time-limit "$share" --output "$OUT" ${extra[@]+"${extra[@]}"} ${options[@]+"${options[@]}"} >"$OUT/$model.log" 2>&1 ||
        failed+=("$model (see $OUT/$model.log)")
done

shopt -s nullglob
results=("$OUT"/*.json)
((${#results[@]})) || { cat "$OUT"/*.log >&2; die "nothing was measured"; }
"$PY" -m accelerate_methods.bench --show "${results[@]}" --markdown >"$OUT/table.md"
"$PY" -m accelerate_methods.bench --show "${results[@]}"
say "$SECONDS s; results, logs and table.md in $OUT"
((${#failed[@]} == 0)) || die "not complete: ${failed[*]}"
