#!/usr/bin/env bash
# lmms-eval against a model that vLLM serves on this machine, through the OpenAI interface. The method is the server's.
# A request that failed makes the run fail: lmms-eval itself would score the error's text as an answer.
#
#   METHOD='{"method": "uniform", "retention_ratio": 0.25}'   default: none, the dense model
#   CHECKPOINT=/path   in transformers' format; default: the embedded LLaVA-OneVision
#   TASKS=shapes_video   LIMIT=32   FRAMES=16   OUTPUT=results/served   PORT=8765
#   MEDIA=/folder      where the tasks' videos lie: the server may read files there (default: assets)
source "$(dirname "${BASH_SOURCE[0]}")/../lib/vllm.sh"
help_of "${BASH_SOURCE[0]}" "$@"
ensure_env
ensure_vllm || die "$VLLM_WHY"
output="${OUTPUT:-$ROOT/results/served}"
mkdir -p "$output"
work="$(mktemp -d)"
(
    vllm_environment
    [[ -n "${CHECKPOINT:-}" ]] || embedded_checkpoint "$work/embedded"
)
CHECKPOINT="${CHECKPOINT:-$work/embedded}"
vllm_environment
# lmms-eval names videos by file and says how many frames it wants of them: the first needs the folder, the second trust
start_server "$CHECKPOINT" --trust-request-mm-kwargs --allowed-local-media-path "${MEDIA:-$ROOT/assets}" \
    --limit-mm-per-prompt '{"image": 4, "video": 1}' \
    --hf-overrides "{\"visual_compression\": ${METHOD:-\"none\"}}"
cd "$ROOT"
# pass_video_url: otherwise a video would be sent as so many pictures; timeout: 10 s is lmms-eval's own
HF_DATASETS_OFFLINE=1 OPENAI_API_KEY=EMPTY "$PY" -m lmms_eval --model openai \
    --model_args "model=${SERVED_NAME:-served},base_url=$SERVER/v1,api_key=EMPTY,timeout=600,pass_video_url=True,max_frames_num=${FRAMES:-16}" \
    --tasks "${TASKS:-shapes_video}" --limit "${LIMIT:-32}" --batch_size 1 --log_samples --output_path "$output"
stop_server
rm -rf "$work"
"$PY" scripts/serve/check_answers.py "$output"
