"""The trained architectures as shapes: what the configs of their released checkpoints say."""

from __future__ import annotations

from accelerate_methods.bench.shapes import CLIP, QWEN2, QWEN2_05B, QWEN2_7B, SHAPES, Shape

_QWEN2_15B = dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True, **QWEN2,
)  # fmt: skip
_FASTVLM = dict(mm_vision_tower="mobileclip_l_1024", mm_hidden_size=3072)
_VIDEO_XL = dict(
    mm_patch_merge_type="unires", image_aspect_ratio="anyres", mm_spatial_pool_mode="average", mm_spatial_pool_stride=2,
    image_grid_pinpoints=[[336 * w, 336 * h] for w in range(1, 7) for h in range(1, 7)],
    enable_beacon=True, beacon_window=1440, beacon_stride=1440, beacon_ratio=[8], beacon_param=["q", "k", "v"],
)  # fmt: skip


def _fastvlm(decoder: dict) -> Shape:
    decoder = {**decoder, "tokenizer_model_max_length": 8192}
    return Shape("qwen", "fastvlm", decoder, None, _FASTVLM, image_size=(1024, 1024), architecture="fastvlm")


ARCHITECTURE_SHAPES = {
    "fastvlm-7b": _fastvlm(QWEN2_7B),
    "fastvlm-1.5b": _fastvlm(_QWEN2_15B),
    "fastvlm-0.5b": _fastvlm(QWEN2_05B),
    # at the ratio of the official example; its config draws one of 2, 4, 8 for each window
    "video-xl-7b": Shape("qwen", "video_xl", QWEN2_7B, CLIP, _VIDEO_XL, frames=128, architecture="video_xl"),
}
ALL_SHAPES = {**SHAPES, **ARCHITECTURE_SHAPES}
