"""Trained architectures as shapes of the bench: their sizes, and a small run of each."""

import dataclasses

import pytest
import torch

from accelerate_methods.bench import architecture_shapes, shapes
from accelerate_methods.registry.architectures import ARCHITECTURES
from tests.bench.test_bench import built, rows_of
from tests.support.paths import GOLDEN

SHAPES = architecture_shapes.ARCHITECTURE_SHAPES
#: what the language models have without vision side; Video-XL's has 28 layers of projections of its summary tokens
_SUMMARIES = 28 * (3584 * 3584 + 3584 + 2 * (3584 * 512 + 512)) + 3584
PARAMETERS = {
    "fastvlm-7b": 7_615_616_512,
    "fastvlm-1.5b": 1_543_714_304,
    "fastvlm-0.5b": 494_032_768,
    "video-xl-7b": 7_615_616_512 + _SUMMARIES,
}
_DECODER = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=256, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": 56, "patch_size": 14, "num_channels": 3, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "projection_dim": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_released_sizes(tmp_path, name):
    """Built without memory."""
    model = shapes.build(SHAPES[name], torch.device("meta"), torch.bfloat16, "sdpa", tmp_path)
    core = model.get_model()
    side = [*core.vision_tower.parameters(), *core.mm_projector.parameters()]
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in side) == PARAMETERS[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_every_shape_is_of_an_architecture():
    for shape in SHAPES.values():
        entry = next(entry for entry in ARCHITECTURES if entry.file == shape.architecture)
        assert entry.key == shape.family
    assert architecture_shapes.ALL_SHAPES.keys() == {*shapes.SHAPES, *SHAPES}
    assert shapes.shape_of("fastvlm-7b", architecture_shapes.ALL_SHAPES) is SHAPES["fastvlm-7b"]


def test_a_small_fastvlm_is_measured(tmp_path):
    from llava.model.checkpoint import read_config

    small = read_config(GOLDEN / "fastvlm/tiny_fastvlm")["fastvithd_config"]
    llava = {"mm_vision_tower": "mobileclip_ta_128", "mm_hidden_size": 128, "fastvithd_config": small}
    shape = dataclasses.replace(SHAPES["fastvlm-7b"], decoder=_DECODER, llava=llava)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense fastv@0.5", "fastvlm")
    dense = rows["dense"].facts
    assert dense["visual_tokens"]["before"] == 4 and dense["tflops"]["tower"] > dense["tflops"]["projector"] > 0
    assert rows["fastv@0.5"].ok


def test_a_small_video_xl_is_measured(tmp_path):
    llava = SHAPES["video-xl-7b"].llava | {"beacon_window": 16, "beacon_stride": 16, "beacon_ratio": [2]}
    shape = dataclasses.replace(SHAPES["video-xl-7b"], decoder=_DECODER, tower=_CLIP, llava=llava, frames=8)
    model, inputs = built(shape, tmp_path)
    rows = rows_of(model, inputs, "dense random@0.5", "video_xl")
    dense, fewer = rows["dense"].facts, rows["random@0.5"].facts
    entries = 20 + 8 * 4 // 2  # text, and one summary token for two of the four tokens of a frame
    assert dense["kv_cache_bytes"] == entries * 4 * 2 * 2 * 16 * 4
    assert fewer["tflops"]["llm_prefill"] < dense["tflops"]["llm_prefill"]
