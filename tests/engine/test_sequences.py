"""Where compressed tokens end up: given orders, newlines, views and tiles, spans of a padded batch."""

import dataclasses

import pytest
import torch

from accelerate_methods.engine.sequences import VisualSequence, assemble, assemble_views
from accelerate_methods.hosts.layouts import flat_item, image_item, tile_grid, video_item
from accelerate_methods.stages.compress import selection
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.views import CompressedViews, Views
from llava.model.splice import splice

NEWLINE = torch.full((1,), -1.0)


def numbered(frames, side):
    """Tokens whose only channel is their flat index."""
    return torch.arange(frames * side * side, dtype=torch.float32).view(frames, side * side, 1)


def read(item, kept, **kwargs):
    compressed = selection(item, torch.tensor(kept), order=kwargs.pop("order", "given"))
    for name, value in kwargs.items():
        setattr(compressed, name, value)
    sequence = assemble(item, compressed)
    held = sequence.owner.flatten()
    assert [sequence.tokens[held[k], 0].item() for k in kept] == kept, "owner follows the order"
    assert sequence.stands.flatten().nonzero().flatten().tolist() == sorted(kept)
    return sequence.tokens[:, 0].int().tolist()


@pytest.mark.parametrize(
    ("layout", "newlines", "expected"),
    [
        ("one_token", "closing", [6, 1, 4, -1]),
        ("no_token", "closing", [6, 1, 4]),
        ("frame", "closing", [1, -1, 6, 4, -1]),
        ("grid", "closing", [1, -1, 4, -1, 6, -1]),
        ("grid", "all", [1, -1, -1, 4, -1, 6, -1]),
        ("grid", "behind", [1, -1, -1, 6, 4, -1, -1]),
        ("frame", "behind", [1, -1, 6, 4, -1]),
        ("one_token", "behind", [6, 1, 4, -1]),
        ("no_token", "behind", [6, 1, 4]),
        ("grid", "last", [6, 1, 4, -1]),
        ("frame", "last", [6, 1, 4, -1]),
    ],
)
def test_given_order(layout, newlines, expected):
    item = video_item(numbered(2, 2), NEWLINE, layout, "spatial_unpad")
    assert read(item, [6, 1, 4], newlines=newlines) == expected


def test_layout_order_sorts():
    item = video_item(numbered(2, 2), NEWLINE, "one_token", "spatial_unpad")
    assert read(item, [6, 1, 4], order="layout") == [1, 4, 6, -1]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("order", ["given", "layout"])
@pytest.mark.parametrize("layout", ["no_token", "one_token", "grid"])
def test_tokens_are_copied_once(layout, order, merged):
    """A selection is copied to where its tokens stand in the sequence, and nowhere before; so is what was made anew."""
    item = video_item(numbered(4, 8).expand(-1, -1, 512).contiguous(), NEWLINE.expand(1, 512), layout, "spatial_unpad")
    kept = torch.arange(0, 256, 2)
    expected = item.features.flatten(0, 1)[kept]
    compressed = selection(item, kept, order=order)
    if merged:
        compressed = dataclasses.replace(compressed, tokens=expected)
    with torch.profiler.profile(profile_memory=True) as profile:
        sequence = assemble(item, compressed)
    assert torch.equal(sequence.tokens[sequence.owner.flatten()[::2]], expected)
    assert torch.equal(compressed.tokens, expected)
    copies = sum(event.self_cpu_memory_usage >= expected.numel() * 4 for event in profile.events())
    untouched = merged and layout == "no_token" and order == "given"
    assert copies == (0 if untouched else 1)


# -- views -------------------------------------------------------------------------------------------------------------


def config(**kwargs):
    values = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[8, 4]]}
    return type("Config", (), values | kwargs)


def tiled(size=(8, 4)):
    """A base view and two tiles side by side, 2 x 2 patches each; the tower sees 4 pixels a side."""
    features = numbered(3, 2)
    item = image_item(features, NEWLINE, size, 4, config())
    return item, Views(features=features, grid=(2, 2), tiles=tile_grid(3, size, 4, config()))


def compressed_views(views, kept, sections=None, **kwargs):
    """``kept``: (view, patch) pairs in given order, patch -1 for a special token of value 100 + view."""
    view, patch = torch.tensor(kept).T
    values = torch.where(patch < 0, 100.0 + view, views.features[view, patch, 0])
    owner = torch.full(views.features.shape[:2], -1)
    for index, (v, p) in enumerate(kept):
        if p >= 0:
            owner[v, p] = index
    section = torch.tensor(sections or [0] * len(kept))
    return CompressedViews(values[:, None], view, patch, section, owner, **kwargs)


def test_tiles_interleave_row_by_row_and_sections_follow():
    item, views = tiled()
    assert views.tiles == (2, 1)
    kept = [(0, -1), (0, 3), (0, 0), (1, -1), (1, 3), (1, 0), (1, 1), (2, -1), (2, 0), (2, 2), (2, 3)]
    sections = [1, 0, 2, 1, 0, 0, 2, 1, 0, 0, 2]
    sequence = assemble_views(item, views, compressed_views(views, kept, sections), lambda tokens: tokens)
    # base as given; upper row of both tiles, lower row; special tokens; the last section
    assert sequence.tokens[:, 0].int().tolist() == [100, 3, 0, 4, 8, 7, 10, 101, 102, 5, 11]
    assert sequence.num_content == 11 and sequence.is_content.all() and sequence.length == item.length
    held = sequence.owner[sequence.owner >= 0]
    assert sequence.tokens[held, 0].tolist() == views.features[sequence.owner >= 0][:, 0].tolist()
    assert sequence.stands.sum() == 8


@pytest.mark.parametrize(
    ("newlines", "expected"), [("none", [2, 1]), ("single", [2, 1, -1]), ("checkpoint", [1, 2, -1])]
)
def test_newline_of_a_single_view(newlines, expected):
    features = numbered(1, 2)
    item = image_item(features, NEWLINE, (4, 4), 4, config())
    views = Views(features=features, grid=(2, 2))
    sequence = assemble_views(item, views, compressed_views(views, [(0, 2), (0, 1)], newlines=newlines), lambda t: t)
    assert sequence.tokens[:, 0].int().tolist() == expected
    assert sequence.is_content.sum() == 2


def test_several_views_that_are_no_tiles_follow_each_other():
    features = numbered(2, 2)
    views = Views(features=features, grid=(2, 2))
    item = flat_item(features.view(1, 8, 1), None)
    sequence = assemble_views(item, views, compressed_views(views, [(0, 2), (0, 1), (1, 3)]), lambda t: t)
    assert sequence.tokens[:, 0].int().tolist() == [2, 1, 7]


def test_checkpoint_layout_loses_what_stands_in_padding():
    item, views = tiled(size=(4, 4))  # a square on two tiles: the outer columns are padding
    assert item.source.tolist() == [0, 1, 2, 3, 5, 8, 7, 10]
    everything = [(v, p) for v in range(3) for p in range(4)]
    sequence = assemble_views(item, views, compressed_views(views, everything, newlines="checkpoint"), lambda t: t)
    assert torch.equal(sequence.tokens, item.dense())
    some = [(0, 1), (1, 0), (1, 1), (2, 2)]
    sequence = assemble_views(item, views, compressed_views(views, some, newlines="checkpoint"), lambda t: t)
    assert sequence.tokens[:, 0].int().tolist() == [1, 5, -1, 10, -1]


def test_source_names_the_patch_of_every_token():
    item, views = tiled()
    assert torch.equal(views.features.flatten()[item.source], item.features.flatten())
    shrunk = image_item(numbered(5, 4), NEWLINE, (8, 8), 4, config(
        image_aspect_ratio="anyres_max_1", image_grid_pinpoints=[[8, 8]]
    ))  # fmt: skip
    assert shrunk.source is None
    with pytest.raises(MethodError, match="mixtures of patches"):
        shrunk_views = Views(features=numbered(5, 4), grid=(4, 4), tiles=(2, 2))
        assemble_views(shrunk, shrunk_views, compressed_views(shrunk_views, [(0, 0)], newlines="checkpoint"), None)


# -- spans -------------------------------------------------------------------------------------------------------------


def sequence_of(count, newlines=0, modality="video"):
    return VisualSequence(
        tokens=torch.zeros(count + newlines, 2),
        positions=torch.arange(count + newlines),
        is_content=torch.arange(count + newlines) < count,
        modality=modality,
        length=count + newlines,
        num_content=count,
        owner=torch.arange(count)[None],
        stands=torch.ones(1, count, dtype=torch.bool),
        info={"count": count},
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_spans_point_at_the_visual_rows(side):
    ids = torch.tensor([[5, -200, 6, -200, 7], [5, 6, -200, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    sequences = [sequence_of(4, 1), sequence_of(3, modality="image"), sequence_of(2, 1)]
    spliced = splice(ids, mask, None, sequences, torch.nn.Embedding(8, 2), original_positions=False, padding_side=side)
    layout = spliced.layout
    assert [[s.info["count"] for s in sample] for sample in layout.spans] == [[4, 3], [2]]
    for row, sample in zip(layout.visual, layout.spans, strict=True):
        for span in sample:
            assert row[span.start : span.start + span.num_content].all() and row[span.start : span.end].sum() == (
                span.num_content
            )
    assert layout.visual.sum() == 9 and layout.blocks().sum() == 11
    videos = layout.only(frozenset({"video"}))
    assert videos.visual.sum() == 6 and [len(s) for s in videos.spans] == [1, 1]
    assert layout.only(frozenset({"video", "image"})) is layout
    assert [len(s) for s in layout.expanded(4).spans] == [2, 2, 1, 1]


def test_truncation_cuts_spans():
    ids = torch.tensor([[5, -200, 6, -200]])
    spliced = splice(
        ids, None, None, [sequence_of(4, 1), sequence_of(3)], torch.nn.Embedding(8, 2),
        original_positions=False, padding_side="left", max_length=3,
    )  # fmt: skip
    (span,) = spliced.layout.spans[0]
    assert (span.start, span.length, span.num_content, span.info) == (1, 2, 2, {})
