"""Signals of encoder layers that a method names, on both kinds of host, against full attention maps."""

import dataclasses
from typing import ClassVar

import pytest
import torch

from accelerate_methods import MethodError, accelerate
from accelerate_methods.stages.compress import CompressMethod, selection
from accelerate_methods.stages.signals import Signal
from tests.hosts.native import test_internvl as intern
from tests.support import qwen_inputs
from tests.support.native_models import expanded, native_model, tree_model

ASKED = frozenset(
    {Signal("received_attention", 0), Signal("received_attention", 0.375), Signal("cls_attention", "next", "joined"),
     Signal("key_states", "next", "joined"), Signal("key_states", 1), Signal("received_attention")}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(CompressMethod):
    """Keeps everything and remembers what it was given."""

    name: ClassVar[str] = "probe"
    title: ClassVar[str] = "Probe"
    seen: ClassVar[list] = []

    def compress(self, item):
        self.seen.append(item.signals)
        return selection(item, torch.arange(item.num_tokens))


def probe(*signals):
    method = Probe()
    method.asks_for(*signals)
    Probe.seen.clear()
    return method


def naive(layer, before):
    """Full maps of one CLIP layer, of all heads and of one of the whole width; keys of the whole width."""
    attention, states = layer.self_attn, layer.layer_norm1(before)
    query, key = attention.q_proj(states), attention.k_proj(states)
    split = (attention.num_heads, attention.head_dim)
    per_head = query.unflatten(-1, split).transpose(1, 2) @ key.unflatten(-1, split).permute(0, 2, 3, 1)
    maps = (per_head * attention.head_dim**-0.5).softmax(-1)
    joined = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return maps, joined, key


@pytest.mark.parametrize("host", ["tree", "native"])
def test_clip_tower(host):
    name, pixels = "tiny-llava-1.5", torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    tree = tree_model(name)
    encoder = tree.get_vision_tower().vision_tower
    with torch.no_grad():
        states = [encoder.pre_layrnorm(encoder.embeddings(pixels))]
        for layer in encoder.encoder.layers:
            out = layer(states[-1], attention_mask=None)
            states.append(out[0] if isinstance(out, tuple) else out)
        maps = [naive(layer, before) for layer, before in zip(encoder.encoder.layers, states, strict=False)]
    feature = len(maps) - 2
    method = probe(*ASKED)
    with torch.no_grad():
        if host == "tree":
            with accelerate(tree, method):
                tree(input_ids=torch.tensor([[1, 5, -200, 7]]), images=pixels)
        else:
            model = native_model(name)
            with accelerate(model, method):
                model(input_ids=expanded([1, 5, 7, 9], 7, 576), pixel_values=pixels)
    (seen,) = Probe.seen
    expected = {
        "received_attention": maps[feature][0].mean((1, 2))[:, 1:],
        "received_attention@0": maps[0][0].mean((1, 2))[:, 1:],
        "received_attention@0.375": maps[1][0].mean((1, 2))[:, 1:],
        "cls_attention@next/joined": maps[feature + 1][1][:, 0, 1:],
        "key_states@next/joined": maps[feature + 1][2][:, 1:],
        "key_states@1": maps[1][2][:, 1:].unflatten(-1, (encoder.config.num_attention_heads, -1)).mean(2),
    }
    assert set(seen) == set(ASKED) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(seen[key], value, atol=1e-5, rtol=1e-4)


def test_a_siglip_tower_ends_with_its_feature():
    """The layer after the feature does not exist: "next" is the feature's own."""
    tree = tree_model("tiny-llava-onevision")
    method = probe(Signal("key_states", "next"), Signal("key_states"))
    with torch.no_grad(), accelerate(tree, method):
        tree(input_ids=torch.tensor([[1, -200, 7]]), images=[torch.randn(2, 3, 384, 384)], modalities=["video"])
    (seen,) = Probe.seen
    assert torch.equal(seen["key_states@next"], seen["key_states"])


def test_internvl():
    model = intern.internvl()
    method = probe(Signal("received_attention", 1), Signal("key_states", -1), Signal("key_states"))
    asked = intern.inputs("image")
    with torch.no_grad(), accelerate(model, method):
        model(**asked)
    found = Probe.seen[0]
    assert torch.equal(found["key_states@-1"], found["key_states"])
    expected = intern.signals_of_layer(model, asked["pixel_values"], 1)["received_attention"]
    torch.testing.assert_close(found["received_attention@1"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", qwen_inputs.MODELS)
def test_qwen_vl(name):
    model = qwen_inputs.qwen(name)
    blocks = model.model.visual.blocks
    method = probe(Signal("received_attention", 1), Signal("key_states", len(blocks) - 1), Signal("key_states"))
    asked = qwen_inputs.inputs(model, qwen_inputs.QUESTIONS["image"])
    with torch.no_grad(), accelerate(model, method):
        model(**asked)
    (found,) = Probe.seen
    assert torch.equal(found[f"key_states@{len(blocks) - 1}"], found["key_states"])
    (expected,) = qwen_inputs.signals_of_block(model, asked["pixel_values"], asked["image_grid_thw"], 1)
    torch.testing.assert_close(
        found["received_attention@1"], expected["received_attention"], atol=1e-5, rtol=1e-4
    )


def test_a_layer_that_does_not_run_is_refused_where_it_is_attached():
    for model in (tree_model("tiny-llava-1.5"), native_model("tiny-llava-1.5"), intern.internvl()):
        with pytest.raises(MethodError, match="received_attention@7"):
            accelerate(model, probe(Signal("received_attention", 7)))
        assert "acceleration" not in model.__dict__
