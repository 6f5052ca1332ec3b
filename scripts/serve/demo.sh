#!/usr/bin/env bash
# Serve the embedded LLaVA-OneVision with vLLM, ask about a clip and a picture through the OpenAI client, dense and with
# methods, and print answers and prompt tokens. Takes about two minutes on a CPU, the environment once more.
#
#   PORT=8765          where the server listens, on this machine only
#   CHECKPOINT=/path   serve another checkpoint in transformers' format instead
source "$(dirname "${BASH_SOURCE[0]}")/../lib/vllm.sh"
help_of "${BASH_SOURCE[0]}" "$@"
ensure_vllm || die "$VLLM_WHY"
vllm_environment
work="$(mktemp -d)"
if [[ -z "${CHECKPOINT:-}" ]]; then
    CHECKPOINT="$work/embedded"
    embedded_checkpoint "$CHECKPOINT"
fi
# requests may name methods here: the flag is for clients that are trusted
start_server "$CHECKPOINT" --trust-request-mm-kwargs --limit-mm-per-prompt '{"image": 2, "video": 2}' \
    --hf-overrides '{"visual_compression": "none"}' --media-io-kwargs '{"video": {"num_frames": 16}}'
"$VLLM_PY" "$ROOT/scripts/serve/client.py" "$SERVER/v1"
rm -rf "$work"
