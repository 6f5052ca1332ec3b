"""Frames that become fewer inside the vision encoder: their shares, where they went, and what is no merge."""

import dataclasses
from typing import ClassVar

import pytest
import torch

from accelerate_methods.engine.encoder_blocks import BlockRun
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.frames import (
    FrameMap,
    FrameMerge,
    FrameMergeMethod,
    check_frame_merge,
    mixed,
    standing_rows,
)

MIXING = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.75, 0.25, 0, 0], [0, 0, 0, 0, 1]])


def test_frames_are_mixed_and_those_alone_are_copied():
    frames = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    frames[3] = torch.nan  # a frame that is dropped reaches no other
    out = mixed(frames, MIXING)
    assert torch.equal(out[0], frames[0]) and torch.equal(out[2], frames[4])
    torch.testing.assert_close(out[1], 0.75 * frames[1] + 0.25 * frames[2])
    assert mixed(frames.half(), MIXING).dtype == torch.float16
    assert torch.equal(mixed(frames[:3], torch.eye(3)), frames[:3])


def test_where_frames_went():
    values = {"seen": torch.arange(10.0).view(5, 2)}
    frames = FrameMap.of(5).after(FrameMerge(MIXING, {"groups": 1}, values))
    assert frames.holder.tolist() == [0, 1, 1, -1, 2] and frames.stands.tolist() == [0, 1, 4]
    assert frames.values["seen"].tolist() == [[0, 1], [2.5, 3.5], [8, 9]]
    later = frames.after(FrameMerge(torch.tensor([[0.5, 0.5, 0.0]]), {"more": 2}))
    assert later.info == {"groups": 1, "more": 2} and (later.before, later.left) == (5, 1)
    assert later.holder.tolist() == [0, 0, 0, -1, -1] and later.values["seen"].tolist() == [[1.25, 2.25]]
    patches = frames.patch_map(2, (1, 2), torch.device("cpu"))
    assert patches.owner.tolist() == [[0, 1], [2, 3], [2, 3], [-1, -1], [4, 5]]
    assert patches.stands[:, 0].tolist() == [True, True, False, False, True]
    rows = standing_rows([frames, FrameMap.of(2)], torch.arange(5))
    assert rows.tolist() == [0, 1, 1, 0, 2, 3, 4]


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        (MIXING, "must return FrameMerge"),
        (FrameMerge(MIXING[:, :4]), r"mixing must be a float tensor \[T', 5\]"),
        (FrameMerge(MIXING.long()), "mixing must be a float tensor"),
        (FrameMerge(MIXING[:0]), "mixing must be a float tensor"),
        (FrameMerge(MIXING.index_fill(0, torch.tensor([0]), 0)), "a frame that goes on has no share of any"),
        (FrameMerge(MIXING[[0, 0, 1]]), "a share in several frames"),
        (FrameMerge(MIXING, values={"seen": torch.zeros(3, 2)}), r"value 'seen' must be \[5, N\]"),
    ],
)
def test_what_is_no_merge_is_refused(merge, says):
    with pytest.raises(MethodError, match=rf"mine\.encode_frames.*{says}"):
        check_frame_merge("mine", merge, 5)
    check_frame_merge("mine", FrameMerge(MIXING), 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves(FrameMergeMethod):
    """Every second frame goes into the one before it."""

    name: ClassVar[str] = "halves"

    def encode_blocks(self, num_blocks):
        return (0, num_blocks - 1)

    def encode_frames(self, step):
        count = len(step.hidden)
        mixing = torch.zeros((count + 1) // 2, count)
        for frame in range(count):
            mixing[frame // 2, frame] = 0.5 if frame // 2 * 2 + 1 < count else 1.0
        return FrameMerge(mixing, {"left": len(mixing)}, {"received": step.received_attention()})


def test_blocks_run_on_the_frames_that_are_left():
    """Three blocks written out, each video for itself."""
    from tests.support.tiny_vit import TimmBlock

    draw = torch.Generator().manual_seed(0)
    shapes = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (16, 8), "mlp.fc2": (8, 16)}
    norms = {"norm1.weight": 8, "norm1.bias": 8, "norm2.weight": 8, "norm2.bias": 8}
    blocks = []
    for _ in range(3):
        draws = {name: torch.randn(*shape, generator=draw) * 0.3 for name, shape in shapes.items()}
        weights = {f"{name}.weight": value for name, value in draws.items()}
        blocks.append(TimmBlock(weights | {n: torch.ones(s) for n, s in norms.items()}, 2, 1e-5))
    hidden = torch.randn(8, 5, 8, generator=draw)
    out = BlockRun(blocks, Halves(), depth=3, videos=[5, 3])(hidden, inputs={1, 2}, outputs={1})
    expected = []
    for video in hidden.split([5, 3]):
        states = blocks[0].whole(video)
        states = torch.stack([part.mean(0) for part in states.split(2)])
        states = blocks[2].whole(blocks[1].whole(states))
        expected.append(torch.stack([part.mean(0) for part in states.split(2)]))
    torch.testing.assert_close(out.output, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert [(one.before, one.left) for one in out.frames] == [(5, 2), (3, 1)]
    second = out[slice(5, 8)]
    torch.testing.assert_close(second.hidden, expected[1], atol=1e-5, rtol=1e-5)
    assert second.carried["received"].shape == (1, 5) and second.inputs[1].states.shape[0] == 2
    assert [mixing.shape for mixing in second.inputs[1].mixings] == [(1, 2)]
    assert out.every_frame(out.output).shape[0] == 8


def test_a_pipeline_with_it_keeps_the_grid_but_needs_the_loop():
    from accelerate_methods.engine.loop import needs_loop

    pipeline = Pipeline((Halves(),))
    assert not pipeline.loses_grid and pipeline.shortens_inside and needs_loop(pipeline)
