#!/usr/bin/env bash
# Load test (scripts/bench/serving.py) of the embedded LLaVA-OneVision served by vLLM on this machine.
#
#   IN_FLIGHT="1 4 16 32"   requests at a time
#   METHODS="dense ..."     what is compared, as scripts/bench/serving.py names it
#   REQUESTS=16 ROUNDS=3    per method and turn; turns of each method
#   SERVER_ARGS="..."       further arguments of the server
#   DECODER=640x12          put a random decoder of this width and depth behind the embedded tower
#   CHECKPOINT=/path        serve another checkpoint in transformers' format instead; PORT as in demo.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib/vllm.sh"
help_of "${BASH_SOURCE[0]}" "$@"
ensure_vllm || die "$VLLM_WHY"
vllm_environment
work="$(mktemp -d)"
if [[ -z "${CHECKPOINT:-}" ]]; then
    CHECKPOINT="$work/embedded"
    embedded_checkpoint "$CHECKPOINT" ${DECODER:+--decoder "$DECODER"}
fi
read -ra more <<<"${SERVER_ARGS:-}"
MAX_SEQS=32 start_server "$CHECKPOINT" --trust-request-mm-kwargs --limit-mm-per-prompt '{"image": 1, "video": 1}' \
    --hf-overrides '{"visual_compression": "none"}' --media-io-kwargs '{"video": {"num_frames": 16}}' \
    ${more[@]+"${more[@]}"}
read -ra flight <<<"${IN_FLIGHT:-1 4 16 32}"
read -ra methods <<<"${METHODS:-dense uniform:retention_ratio=0.25 visionzip:retention_ratio=0.25 divprune:retention_ratio=0.1}"
"$VLLM_PY" "$ROOT/scripts/bench/serving.py" "$SERVER/v1" --in-flight "${flight[@]}" --methods "${methods[@]}" \
    --requests "${REQUESTS:-16}" --rounds "${ROUNDS:-3}"
rm -rf "$work"
