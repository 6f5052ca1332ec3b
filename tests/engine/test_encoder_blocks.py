"""The loop through the blocks of a vision encoder: it computes what the model does, and keeps count of the patches."""

import dataclasses
from typing import ClassVar

import pytest
import torch

from accelerate_methods.engine.encoder_block import (
    BlockAttention,
    ClipBlock,
    EncoderBlock,
    Padding,
    from_groups,
    to_groups,
)
from accelerate_methods.engine.encoder_blocks import BlockRun, restored
from accelerate_methods.stages.encode import EncodeMethod, Merge, TokenMap, keep
from accelerate_methods.stages.errors import MethodError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted(EncodeMethod):
    """Acts in ``blocks`` as ``does`` says."""

    name: ClassVar[str] = "scripted"
    blocks: tuple = ()
    does: object = None

    def encode_blocks(self, num_blocks):
        return self.blocks

    def encode(self, step):
        return self.does(step)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def layers(tiny, name="tiny-llava-1.5"):
    return list(tiny(name).get_vision_tower().vision_tower.encoder.layers)


def run(blocks, method, hidden, **more):
    outputs = more.pop("outputs", ())
    return BlockRun([ClipBlock(block) for block in blocks], method, depth=len(blocks), **more)(hidden, outputs=outputs)


def test_where_nothing_is_merged_the_numbers_are_those_of_the_model(tiny):
    blocks, hidden = layers(tiny), torch.randn(2, 10, 32)
    expected = hidden
    for block in blocks:
        expected = block(expected, attention_mask=None)
    seen = []
    out = run(blocks, Scripted(blocks=(0, 2), does=lambda step: seen.append(step.block)), hidden, special=1)
    torch.testing.assert_close(out.hidden, expected, atol=1e-5, rtol=1e-5)
    assert out.grid and seen == [0, 2] and torch.equal(out.output, out.hidden)


def test_a_selection_is_the_model_on_fewer_tokens(tiny):
    blocks, hidden = layers(tiny), torch.randn(2, 10, 32)
    kept = torch.tensor([[1, 4, 8], [0, 2, 3]])
    out = run(blocks, Scripted(blocks=(1,), does=lambda step: keep(step, kept)), hidden, special=1)
    for view in range(2):
        state = blocks[0](hidden[view : view + 1], attention_mask=None)
        attended = state + blocks[1].self_attn(blocks[1].layer_norm1(state), attention_mask=None)[0]
        attended = attended[:, [0, *(kept[view] + 1).tolist()]]
        state = attended + blocks[1].mlp(blocks[1].layer_norm2(attended))
        for block in blocks[2:]:
            state = block(state, attention_mask=None)
        torch.testing.assert_close(out.hidden[view], state[0], atol=1e-5, rtol=1e-5)
    assert out.tokens.stands.tolist() == kept.tolist()
    full = out.full()
    assert torch.equal(full[0, 1 + 4], out.hidden[0, 1 + 1]) and full[0, 1].eq(0).all()


def pairs(step):
    """Every two neighbours become one."""
    merged = step.hidden.unflatten(1, (-1, 2)).mean(2)
    count = merged.shape[1]
    owner = torch.arange(count).repeat_interleave(2).expand(len(merged), -1)
    return Merge(merged, owner, torch.arange(1, 2 * count, 2).expand(len(merged), -1))


def test_owners_follow_through_several_merges_and_a_new_order(tiny):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Backwards(Scripted):
        def arrange(self, tokens):
            return torch.arange(tokens.stands.shape[1]).flip(0).expand_as(tokens.stands)

    blocks, hidden = layers(tiny)[:2], torch.randn(1, 8, 32)
    plain = run(blocks, Scripted(blocks=(0, 1), does=pairs), hidden)
    assert plain.tokens.owner.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] and plain.tokens.stands.tolist() == [[3, 7]]
    turned = run(blocks, Backwards(blocks=(0, 1), does=pairs), hidden)
    assert turned.tokens.owner.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] and turned.tokens.stands.tolist() == [[7, 3]]
    assert torch.equal(turned.hidden, plain.hidden.flip(1))


def test_groups_go_on_together(tiny):
    hidden = torch.randn(2, 1 + 12, 32)
    grouped = to_groups(hidden, 1, 4)
    assert grouped.shape == (2, 4, 128) and torch.equal(from_groups(grouped, 1, 4), hidden)
    seen = {}

    def drop(step):
        seen["keys"], seen["cls"], seen["shape"] = step.keys(), step.cls_attention(), step.hidden.shape
        return keep(step, torch.tensor([[0, 2]] * 2))

    out = run(layers(tiny)[:1], Scripted(blocks=(0,), does=drop), hidden, special=1, unit=4)
    assert seen["shape"] == (2, 4, 128) and seen["keys"].shape[:2] == (2, 4) and seen["cls"].shape == (2, 3)
    assert out.hidden.shape == (2, 1 + 8, 32)
    dense = layers(tiny)[0](hidden, attention_mask=None)
    torch.testing.assert_close(out.hidden, torch.cat([dense[:, :5], dense[:, 9:]], 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(restored(out.hidden, 1, 4, out.tokens.owner)[:, 5:9], torch.zeros(2, 4, 32))


class Windowed(ClipBlock):
    def __init__(self, layer, windows, sizes):
        super().__init__(layer)
        self.windows, self.window_sizes, self.taken_apart = windows, sizes, True


def test_windows_that_have_grown_uneven(tiny):
    """Tokens attend to those that stand in their window, of which one has lost two and one is empty."""
    layer, hidden = layers(tiny)[0], torch.randn(1, 6, 32)
    windows = torch.tensor([0, 0, 0, 1, 1, 1, 3, 3])
    stands = torch.tensor([[7, 0, 2, 1, 3, 6]])
    block = Windowed(layer, windows, (3, 3, 2, 2))
    own = windows[stands]
    padding = Padding(own, 4, 3, 1)
    index = torch.arange(6)[None]
    bias = torch.rand(1, 6)
    attention = BlockAttention(block, block.project(hidden, TokenMap(index, index)), bias, 0, 1, padding)
    query, key, value, _ = block.project(hidden, TokenMap(index, index))
    logits = query @ key.transpose(-1, -2) * block.scale + bias[:, None, None]
    maps = logits.masked_fill(own[:, None, :, None] != own[:, None, None], -torch.inf).softmax(-1)
    expected = (maps @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.output(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.received_attention(), maps.mean(1).mean(1), atol=1e-6, rtol=1e-5)


def test_a_method_that_gives_nonsense_is_told(tiny):
    with pytest.raises(MethodError, match=r"scripted\.encode must return Merge"):
        run(layers(tiny)[:1], Scripted(blocks=(0,), does=lambda step: step.hidden), torch.randn(1, 4, 32))
    with pytest.raises(MethodError, match="no CLS token"):
        run(layers(tiny)[:1], Scripted(blocks=(0,), does=lambda step: step.cls_attention()), torch.randn(1, 4, 32))
    with pytest.raises(MethodError, match="block 5 of the vision encoder does not run"):
        run(layers(tiny)[:1], Scripted(blocks=(5,)), torch.randn(1, 4, 32))


def test_every_block_says_its_parts():
    assert EncoderBlock.__abstractmethods__ == {"project", "attended", "feed_forward", "whole"}
