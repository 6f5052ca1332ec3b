"""The trained architectures as shapes: what the configs of their released checkpoints say."""

from __future__ import annotations

from accelerate_methods.bench.shapes import (
    CLIP,
    QWEN2,
    QWEN2_05B,
    QWEN2_7B,
    SHAPES,
    SIGLIP,
    VICUNA,
    VICUNA_7B,
    VICUNA_13B,
    Shape,
)

_QWEN2_15B = dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True, **QWEN2,
)  # fmt: skip
_MQT = dict(query_abstractor_type="matry_query")
_FASTVLM = dict(mm_vision_tower="mobileclip_l_1024", mm_hidden_size=3072)
_VIDEO_XL = dict(
    mm_patch_merge_type="unires", image_aspect_ratio="anyres", mm_spatial_pool_mode="average", mm_spatial_pool_stride=2,
    image_grid_pinpoints=[[336 * w, 336 * h] for w in range(1, 7) for h in range(1, 7)],
    enable_beacon=True, beacon_window=1440, beacon_stride=1440, beacon_ratio=[8], beacon_param=["q", "k", "v"],
)  # fmt: skip


def _fastvlm(decoder: dict) -> Shape:
    decoder = {**decoder, "tokenizer_model_max_length": 8192}
    return Shape("qwen", "fastvlm", decoder, None, _FASTVLM, image_size=(1024, 1024), architecture="fastvlm")


_EVA = dict(mm_vision_tower="eva_vit_g.pth", mm_hidden_size=1408, bert_type="qformer_pretrain", num_query=32)
_LLAMA_VID = {"compress_type": "mean", "image_processor": "clip-patch14-224", **_EVA}
_LLAMA_VID_IMAGES = {"compress_type": None, "image_processor": "clip-patch14-336", **_EVA}
_PHI_2 = dict(
    hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, vocab_size=51200,
    max_position_embeddings=2048, tokenizer_model_max_length=3072, hidden_act="gelu_new", partial_rotary_factor=0.4,
    bos_token_id=50256, eos_token_id=50256,
)  # fmt: skip


def _llama_vid(decoder: dict, llava: dict, frames: int) -> Shape:
    return Shape("llama", "llama_vid", {**decoder, **VICUNA}, None, llava, frames=frames, architecture="llama_vid")


_LLAMA_31_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=128009,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)  # fmt: skip
_LLAVA_MINI = dict(compressor_size=1, prefusion_layer_num=4, resolution_ratio=1, image_aspect_ratio="square")
#: what the released training code writes: LLaVA-1.5 with one more word
_VOCO = {**VICUNA_7B, **VICUNA, "vocab_size": 32001}


_HICOM = dict(
    mm_projector_type="local43_global32_guidecoarse", use_guide="direct", use_clip_scale="", max_num_frames=128,
    mm_patch_merge_type="spatial_unpad", mm_newline_position="no_token",
)  # fmt: skip
_TG_LLAVA = dict(mm_text_tower=CLIP, mm_text_hidden_size=768)


def _llava_mini(frames: int) -> Shape:
    return Shape("llama", "llava_mini", _LLAMA_31_8B, CLIP, _LLAVA_MINI, frames=frames, architecture="llava_mini")


ARCHITECTURE_SHAPES = {
    "mqt-llava-7b": Shape("llama", "mqt_llava", {**VICUNA_7B, **VICUNA}, CLIP, _MQT, architecture="mqt"),
    "fastvlm-7b": _fastvlm(QWEN2_7B),
    "fastvlm-1.5b": _fastvlm(_QWEN2_15B),
    "fastvlm-0.5b": _fastvlm(QWEN2_05B),
    # at the ratio of the official example; its config draws one of 2, 4, 8 for each window
    "video-xl-7b": Shape("qwen", "video_xl", QWEN2_7B, CLIP, _VIDEO_XL, frames=128, architecture="video_xl"),
    "llama-vid-7b-video": _llama_vid(VICUNA_7B, _LLAMA_VID, 64),
    "llama-vid-13b-video": _llama_vid(VICUNA_13B, _LLAMA_VID, 64),
    "llama-vid-7b-336": _llama_vid(VICUNA_7B, _LLAMA_VID_IMAGES, 0),
    "llama-vid-13b-336": _llama_vid(VICUNA_13B, _LLAMA_VID_IMAGES, 0),
    "flashsloth-3.2b": Shape("phi", "flashsloth", _PHI_2, SIGLIP, image_size=(384, 384), architecture="flashsloth"),
    "llava-mini-8b": _llava_mini(0),
    "llava-mini-8b-video": _llava_mini(128),
    # as its paper says; the released string names a mode that its code does not know
    "hicom-7b": Shape("qwen", "hicom", QWEN2_7B, SIGLIP, _HICOM, frames=32, architecture="hicom"),
    "tg-llava-7b": Shape("qwen", "tg_llava", QWEN2_7B, CLIP, _TG_LLAVA, architecture="tg_llava"),
    "voco-llama-7b": Shape(
        "llama", "voco_llama", _VOCO, CLIP, {"voco_token_id": 32000}, architecture="voco_llama"
    ),
}
ALL_SHAPES = {**SHAPES, **ARCHITECTURE_SHAPES}
