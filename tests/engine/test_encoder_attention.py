"""Signals of an encoder layer against the attention maps that transformers itself computes."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from accelerate_methods.engine import encoder_attention
from accelerate_methods.engine.encoder_attention import (
    ENCODER_SIGNALS,
    asked_layers,
    cls_attention,
    encoder_signals,
    mean_keys,
    received_attention,
)
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import Signal

SHAPE = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 32}
SIZE = {"image_size": 12, "patch_size": 2}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def tower(request):
    """(second layer, its input, its attention maps as transformers gives them, special tokens)."""
    torch.manual_seed(0)
    if request.param == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**SHAPE, **SIZE, attn_implementation="eager"))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**SHAPE, **SIZE, attn_implementation="eager"))
    for name, parameter in model.named_parameters():
        if "self_attn" in name:  # attention far from uniform, biases not zero
            parameter.data = torch.randn_like(parameter) * 0.5
    layer = model.eval().encoder.layers[1]
    special = int(request.param == "clip")
    hidden = torch.randn(5, 36 + special, 24)
    with torch.no_grad():
        _, maps = layer.self_attn(layer.layer_norm1(hidden))
    return layer, hidden, maps, special


def test_against_full_maps(tower):
    layer, hidden, maps, special = tower
    names = ENCODER_SIGNALS if special else ENCODER_SIGNALS - {"cls_attention"}
    out = encoder_signals(layer, hidden, names, special)
    assert set(out) == names
    received = maps.mean(dim=(1, 2))
    torch.testing.assert_close(out["received_attention"], received[:, special:])
    torch.testing.assert_close(received_attention(layer, hidden), received)
    keys = layer.self_attn.k_proj(layer.layer_norm1(hidden)).view(5, -1, 3, 8).mean(2)
    torch.testing.assert_close(mean_keys(layer, hidden), keys)
    torch.testing.assert_close(out["key_states"], keys[:, special:])
    if special:
        torch.testing.assert_close(cls_attention(layer, hidden), maps[:, :, 0, 1:])
        torch.testing.assert_close(out["cls_attention"], maps[:, :, 0, 1:].mean(1))
    assert not any(value.requires_grad for value in out.values())


def test_chunks_change_nothing(tower, monkeypatch):
    layer, hidden, _, _ = tower
    whole = received_attention(layer, hidden)
    for size in (1, 37 * 37 * 8 * 4):  # one map at a time; four, which do not divide the fifteen there are
        monkeypatch.setattr(encoder_attention, "CHUNK_BYTES", size)
        torch.testing.assert_close(received_attention(layer, hidden), whole)


def test_only_what_is_asked_for(tower):
    layer, hidden, _, special = tower
    assert encoder_signals(layer, hidden, {"frame_features"}, special) == {}
    assert set(encoder_signals(layer, hidden, ["key_states", "pooling_attention"], special)) == {"key_states"}
    if not special:
        with pytest.raises(MethodError, match="no CLS token"):
            encoder_signals(layer, hidden, {"cls_attention"}, special)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tower, dtype):
    layer, hidden, _, special = tower
    names = {"received_attention", "key_states"}
    exact = encoder_signals(layer, hidden, names, special)
    half = encoder_signals(layer.to(dtype), hidden.to(dtype), names, special)
    layer.float()
    assert half["received_attention"].dtype == torch.float32 and half["key_states"].dtype == dtype
    torch.testing.assert_close(half["received_attention"], exact["received_attention"], atol=3e-3, rtol=0.05)


def test_joined_heads_are_one_head_of_the_whole_width(tower):
    layer, hidden, _, special = tower
    names = {Signal(name, heads="joined") for name in ENCODER_SIGNALS if special or name != "cls_attention"}
    out = encoder_signals(layer, hidden, names, special)
    assert set(out) == names
    states, attention = layer.layer_norm1(hidden), layer.self_attn
    keys = attention.k_proj(states)
    maps = (attention.q_proj(states) @ keys.mT * 24**-0.5).softmax(-1)
    torch.testing.assert_close(out["received_attention@feature/joined"], maps.mean(1)[:, special:])
    torch.testing.assert_close(out["key_states@feature/joined"], keys[:, special:])
    if special:
        torch.testing.assert_close(out["cls_attention@feature/joined"], maps[:, 0, 1:])


@pytest.mark.parametrize(
    ("layer", "depth", "feature", "index"),
    [
        ("feature", 24, 22, 22), ("next", 24, 22, 23), ("next", 26, 25, 25), (8, 24, 22, 8), (-1, 24, 22, 23),
        (0.375, 24, 22, 8), (0.375, 4, 2, 1), (0.5, 32, 31, 15), (0.01, 24, 22, 0), (0.375, 26, 25, 9),
    ],
)  # fmt: skip
def test_which_layer_is_meant(layer, depth, feature, index):
    signal = Signal("received_attention", layer)
    assert asked_layers({signal, "frame_features"}, depth, feature) == {signal: index}


def test_a_share_goes_on_to_a_layer_that_sees_whole_frames():
    signals = {Signal("received_attention", 0.375), Signal("received_attention", 11)}
    assert sorted(asked_layers(signals, 32, 31, whole=[7, 15, 23, 31]).values()) == [11, 15]


@pytest.mark.parametrize("layer", [24, -25, 21])
def test_a_layer_that_cannot_be_read_is_refused(layer):
    with pytest.raises(MethodError, match="can be read"):
        asked_layers({Signal("key_states", layer)}, 24, 19)
