#!/usr/bin/env bash
# lmms-eval against a model that vLLM serves on this machine, dense and with methods, as one table; the run folders and
# the report are those of every other evaluation (docs/report.md). A request that fails makes the script fail.
#
#   METHODS="dense uniform@0.25 divprune@0.1"   as those of scripts/eval
#   CHECKPOINT=/path   in transformers' format; default: the embedded LLaVA-OneVision
#   TASKS=shapes_video   LIMIT=32   FRAMES=16   CONCURRENT=4   OUTPUT=outputs/served_<time>   PORT=8765
#   MEDIA=/folder      where the tasks' videos lie: the server may read files there (default: assets)
source "$(dirname "${BASH_SOURCE[0]}")/../lib/vllm.sh"
help_of "${BASH_SOURCE[0]}" "$@"
ensure_env
ensure_vllm || die "$VLLM_WHY"
output="${OUTPUT:-$ROOT/outputs/served_$(date +%Y%m%d_%H%M%S)}"
work="$(mktemp -d)"
vllm_environment
if [[ -z "${CHECKPOINT:-}" ]]; then
    CHECKPOINT="$work/embedded"
    embedded_checkpoint "$CHECKPOINT"
    SERVED_NAME="${SERVED_NAME:-tiny-llava-onevision}"
fi
# requests name videos by file, say how many frames they want and under which method: the first needs the folder, the
# others trust
start_server "$CHECKPOINT" --trust-request-mm-kwargs --allowed-local-media-path "${MEDIA:-$ROOT/assets}" \
    --limit-mm-per-prompt '{"image": 4, "video": 1}' --hf-overrides '{"visual_compression": "none"}'
status=0
HF_DATASETS_OFFLINE=1 "$PY" "$ROOT/scripts/serve/evaluate.py" "$SERVER/v1" --tasks "${TASKS:-shapes_video}" \
    --methods "${METHODS:-dense uniform@0.25 divprune@0.1}" --limit "${LIMIT:-32}" --frames "${FRAMES:-16}" \
    --concurrent "${CONCURRENT:-4}" --output "$output" || status=$?
stop_server
rm -rf "$work"
exit "$status"
