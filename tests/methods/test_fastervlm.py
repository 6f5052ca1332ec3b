"""FasterVLM beyond its golden vectors."""

from types import SimpleNamespace

import pytest
import torch

import accelerate_methods
from accelerate_methods.engine.sequences import assemble, assemble_views, uncompressed
from accelerate_methods.fastervlm import FasterVLM
from accelerate_methods.hosts.layouts import image_item, video_item
from accelerate_methods.ops.select import mask_to_indices, top_indices, top_mask
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.views import Views


def method(**params):
    return accelerate_methods.get("fastervlm", **params)


def numbered_views(count, side, scores, tiles=None, dtype=torch.float32):
    """Views whose features say where they are: (view, patch)."""
    patch = torch.arange(side * side).expand(count, -1)
    view = torch.arange(count)[:, None].expand_as(patch)
    features = torch.stack([view, patch], dim=-1).to(dtype)
    return Views(features=features, grid=(side, side), tiles=tiles, signals={"cls_attention": scores})


def test_top_indices_is_the_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 7, 30):
        scores = torch.randint(0, 4, (6, width), generator=generator).float() - 2  # full of ties
        for count in range(width + 1):
            assert torch.equal(top_indices(scores, count), mask_to_indices(top_mask(scores, count), count))


@pytest.mark.parametrize(
    ("per_view", "ratio", "count"),
    [
        (576, 0.75, 432), (576, 0.5, 288), (576, 0.25, 144), (576, 0.1, 58), (576, 0.05, 29), (256, 0.75, 192),
        (256, 0.5, 128), (256, 0.25, 64), (256, 0.1, 26), (256, 0.05, 13), (4, 0.01, 1),
    ],
)  # fmt: skip
def test_counts_of_the_papers_tables(per_view, ratio, count):
    assert FasterVLM(retention_ratio=ratio).view_budget(per_view) == count


def test_one_view_by_hand():
    scores = torch.tensor([[0.1, 0.4, 0.1, 0.4]])
    compressed = method(tokens_per_view=3).compress_views(numbered_views(1, 2, scores))
    # the tie of 0 and 2 goes to 0; raster order, not that of the scores
    assert compressed.tokens.tolist() == [[0, 0], [0, 1], [0, 3]]
    assert compressed.patch.tolist() == [0, 1, 3] and compressed.owner.tolist() == [[0, 1, -1, 2]]


def test_tiles_interleave_row_by_row():
    scores = torch.zeros(3, 4)
    scores[0, 3] = scores[0, 0] = 1
    scores[1, 1] = scores[1, 2] = 1
    scores[2, 0] = scores[2, 3] = 1
    views = numbered_views(3, 2, scores, tiles=(2, 1))
    item = SimpleNamespace(newlines=None, length=12, modality="image")
    sequence = assemble_views(item, views, method(tokens_per_view=2).compress_views(views), lambda t: t)
    assert sequence.tokens.tolist() == [[0, 0], [0, 3], [1, 1], [2, 0], [1, 2], [2, 3]]
    assert sequence.owner.tolist() == [[0, -1, -1, 1], [-1, 2, 4, -1], [3, -1, -1, 5]]
    assert sequence.stands.sum() == 6 and sequence.is_content.all()


def test_checkpoint_layout_keeps_every_newline():
    side = 4
    scores = torch.rand(5, side * side, generator=torch.Generator().manual_seed(0))
    views = numbered_views(5, side, scores, tiles=(2, 2))
    config = SimpleNamespace(
        mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres", image_grid_pinpoints=[[8, 8]]
    )
    item = image_item(views.features, torch.full((2,), -1.0), (8, 4), side, config)  # unpadded to 4 of 8 rows
    compressed = method(tokens_per_view=5, merge="spatial_unpad").compress_views(views)
    sequence = assemble_views(item, views, compressed, lambda t: t)
    assert (~sequence.is_content).sum() == 4 and not sequence.is_content[-1]
    tile_rows = [(int(v) - 1) // 2 * side + int(p) // side for v, p in sequence.tokens[sequence.is_content] if v > 0]
    assert tile_rows == sorted(tile_rows) and set(tile_rows) <= {2, 3, 4, 5}
    assert (sequence.tokens[:5, 0] == 0).all()


def test_full_budget_leaves_the_image_alone():
    views = numbered_views(1, 2, torch.rand(1, 4))
    assert method(retention_ratio=1.0).compress_views(views) is None
    assert method(tokens_per_view=9).compress_views(views) is None


@pytest.mark.parametrize("layout", ["one_token", "grid", "frame", "no_token"])
def test_every_frame_of_a_video_keeps_the_same(layout):
    features = torch.randn(3, 9, 4)
    item = video_item(features, torch.zeros(4), layout, "spatial_unpad")
    item.signals = {"received_attention": torch.rand(3, 9)}  # a tower without CLS token
    sequence = assemble(item, method(tokens_per_view=2).compress(item))
    kept = item.signals["received_attention"].topk(2).indices.sort().values
    expected = features.gather(1, kept[..., None].expand(-1, -1, 4)).flatten(0, 1)
    assert torch.equal(sequence.tokens[sequence.is_content], expected)
    assert (sequence.positions.diff() > 0).all()
    whole = assemble(item, method(tokens_per_view=9).compress(item))
    assert torch.equal(whole.tokens, uncompressed(item).tokens)


def test_cls_attention_goes_before_its_substitute():
    views = numbered_views(1, 2, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    views.signals["received_attention"] = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert method(tokens_per_view=1).compress_views(views).patch.tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_constant_scores(dtype):
    views = numbered_views(2, 3, torch.full((2, 9), 0.1, dtype=dtype), dtype=dtype)
    compressed = method(tokens_per_view=4).compress_views(views)
    assert compressed.tokens.dtype == dtype and compressed.patch.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"retention_ratio": 0}, {"retention_ratio": 1.1}, {"tokens_per_view": 0}, {"tokens_per_view": 2.5},
        {"merge": "unpad"}, {"retention_ratio": 0.5, "tokens_per_view": 3},
    ],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises(MethodError, match="fastervlm"):
        method(**wrong)


def test_a_count_replaces_the_default_ratio():
    assert method(tokens_per_view=58).retention_ratio is None
    assert method() == FasterVLM(retention_ratio=0.25)


# -- on models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "patches"), [("tiny-llava-1.6", 336, 576), ("tiny-llava-onevision", 384, 729)]
)
@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
def test_image_with_tiles_on_a_model(tiny, name, side, patches, merge):
    """Both towers; SigLIP has no CLS token and is scored by received attention."""
    model, size = tiny(name), (2 * side, side)
    model.config.image_grid_pinpoints = [[2 * side, side]]
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, -200, 7]])
    with torch.no_grad(), accelerate_methods.accelerate(model, "fastervlm", retention_ratio=0.1, merge=merge):
        embeds = model.prepare_multimodal(ids, None, None, [pixels], "image", [size]).inputs_embeds[0]
        features = model.encode_images(pixels)
        views = model.encode([pixels], ["image"], [size])[0].views
    kept = top_indices(views.signal("cls_attention", "received_attention"), round(patches * 0.1))
    base = features[0, kept[0]]
    torch.testing.assert_close(embeds[2 : 2 + len(base)], base)
    rows = round(patches**0.5) if merge == "spatial_unpad" else 0  # a newline per row: nothing was padded
    assert len(embeds) == 3 + 3 * len(base) + rows


def test_a_batch_is_its_samples(tiny):
    model = tiny("tiny-llava-1.5")
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, -200, 7], [1, 9, -200, 8]])
    with torch.no_grad(), accelerate_methods.accelerate(model, "fastervlm", tokens_per_view=20):
        both = model(input_ids=ids, images=pixels).logits[:, -1]
        alone = torch.cat([model(input_ids=ids[i : i + 1], images=pixels[i : i + 1]).logits[:, -1] for i in (0, 1)])
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)
