"""VisionZip beyond its golden vectors."""

from types import SimpleNamespace

import pytest
import torch

import accelerate_methods
from accelerate_methods.engine.sequences import assemble, assemble_views, uncompressed
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.ops.contextual import contextual_merge
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.views import Views
from accelerate_methods.visionzip import VisionZip, zip_tokens


def method(**params):
    return accelerate_methods.get("visionzip", **params)


def random_views(count, side, cls=True, tiles=None, dtype=torch.float32, seed=0, width=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    patches = side * side
    name = "cls_attention" if cls else "received_attention"
    return Views(
        features=draw(count, patches, width),
        special=draw(count, 1, width) if cls else None,
        grid=(side, side),
        tiles=tiles,
        signals={name: draw(count, patches).float().softmax(-1), "key_states": draw(count, patches, 4)},
    )


def plainly(features, scores, keys, dominant, contextual):
    """Section 3 of the specification for one view, token by token."""
    top = sorted(sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:dominant])
    rest = [j for j in range(len(scores)) if j not in top]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    unit = [k / k.norm() for k in keys]
    members = [[] for _ in targets]
    for j in rest:
        if j not in targets:
            similarity = [float(unit[j] @ unit[t]) for t in targets]
            members[similarity.index(max(similarity))].append(j)
    merged = [features[t] + (features[m].mean(0) if m else 0) for t, m in zip(targets, members, strict=True)]
    return top, targets, members, torch.stack([features[j] for j in top] + merged)


@pytest.mark.parametrize(
    ("patches", "dominant", "contextual"), [(36, 5, 3), (36, 1, 1), (49, 7, 11), (20, 4, 15), (20, 4, 16), (9, 0, 2)]
)
def test_against_the_specification_token_by_token(patches, dominant, contextual):
    generator = torch.Generator().manual_seed(patches)
    features, keys = torch.randn(3, patches, 6, generator=generator), torch.randn(3, patches, 4, generator=generator)
    scores = torch.rand(3, patches, generator=generator)
    zipped = zip_tokens(features, scores, keys, dominant, contextual)
    tokens, owner = torch.cat([zipped.kept, zipped.merged], 1), zipped.owner(0)
    for view in range(3):
        top, targets, members, expected = plainly(features[view], scores[view], keys[view], dominant, contextual)
        assert zipped.dominant[view].tolist() == top and zipped.targets[view].tolist() == targets
        torch.testing.assert_close(tokens[view], expected)
        for slot, (target, group) in enumerate(zip(targets, members, strict=True)):
            assert all(owner[view, j] == dominant + slot for j in [target, *group])
        assert owner[view, top].tolist() == list(range(dominant))


def test_a_contextual_token_is_a_sum_not_an_average():
    keys = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [1.0, 0.1], [0.1, 2.0]]])
    features = torch.tensor([[[1.0], [10.0], [100.0], [20.0], [200.0]]])
    rest = torch.ones(1, 5, dtype=torch.bool)
    tokens, targets, slot = contextual_merge(features, keys, rest, 5, 2)
    assert targets.tolist() == [[0, 2]] and slot.tolist() == [[0, 0, 1, 0, 1]]
    assert tokens.flatten().tolist() == [1 + 15, 100 + 200]


def test_zero_keys_go_to_the_first_target():
    features, keys = torch.randn(1, 6, 3), torch.zeros(1, 6, 2)
    tokens, _, slot = contextual_merge(features, keys, torch.ones(1, 6, dtype=torch.bool), 6, 2)
    assert slot.tolist() == [[0, 0, 0, 1, 0, 0]] and torch.isfinite(tokens).all()
    assert torch.equal(tokens[0, 1], features[0, 3])  # no members: unchanged


@pytest.mark.parametrize(
    ("params", "patches", "expected"),
    [
        ({}, 576, (191, 30)), ({}, 196, (65, 10)), ({}, 1, (1, 0)),
        ({"retention_ratio": 64 / 576}, 576, (54, 10)), ({"retention_ratio": 128 / 576}, 576, (108, 20)),
        ({"retention_ratio": 192 / 576}, 576, (162, 30)), ({"retention_ratio": 32 / 576}, 576, (27, 5)),
        ({"retention_ratio": 1e-9}, 576, (1, 0)), ({"dominant": 54, "contextual": 10}, 196, (54, 10)),
    ],
)  # fmt: skip
def test_budgets(params, patches, expected):
    assert method(**params).view_budget(patches) == expected


def test_one_view_is_cls_dominant_contextual():
    views = random_views(2, 4)
    compressed = method(dominant=4, contextual=2).compress_views(views)
    zipped = zip_tokens(views.features, views.signal("cls_attention"), views.signal("key_states"), 3, 2)
    for view, tokens in enumerate(compressed.tokens.view(2, 6, -1)):
        assert torch.equal(tokens, torch.cat([views.special[view], zipped.kept[view], zipped.merged[view]]))
    assert compressed.patch.view(2, 6)[:, 0].tolist() == [-1, -1]
    assert compressed.owner.min() == 1 and (compressed.owner != 6).all()  # every patch has a token, none is a CLS
    assert (compressed.owner[1] >= 7).all() and compressed.newlines == "single"


def test_without_a_cls_token_all_dominant_tokens_are_patches():
    views = random_views(1, 4, cls=False)
    compressed = method(dominant=4, contextual=2).compress_views(views)
    assert compressed.tokens.shape[0] == 6 and compressed.patch.min() >= 0


def test_reading_order_of_an_image_with_tiles():
    views = random_views(3, 3, tiles=(2, 1))
    compressed = method(dominant=3, contextual=1).compress_views(views)
    item = SimpleNamespace(newlines=torch.zeros(4, 6), length=0, modality="image")
    tokens = assemble_views(item, views, compressed, lambda t: t).tokens
    each = compressed.tokens.view(3, 4, -1)
    assert torch.equal(tokens[:4], each[0])
    assert torch.equal(tokens[8:10], views.special[1:, 0]) and torch.equal(tokens[10:], each[1:, 3])
    patches = compressed.patch.view(3, 4)[1:, 1:3]
    places = sorted((int(p) // 3, tile, int(p) % 3, k) for tile in (0, 1) for k, p in enumerate(patches[tile]))
    assert torch.equal(tokens[4:8], torch.stack([each[tile + 1, 1 + k] for _, tile, _, k in places]))


def test_newline_after_a_single_view_only():
    item = SimpleNamespace(newlines=torch.zeros(1, 6), length=17, modality="image")
    for count, newlines in ((1, 1), (2, 0)):
        views = random_views(count, 4)
        sequence = assemble_views(item, views, method(dominant=4, contextual=2).compress_views(views), lambda t: t)
        assert int((~sequence.is_content).sum()) == newlines and len(sequence.tokens) == 6 * count + newlines


def test_without_contextual_tokens_it_is_a_selection():
    views = random_views(2, 4)
    compressed = method(dominant=5, contextual=0).compress_views(views)
    best = views.signal("cls_attention").topk(4).indices.sort().values
    assert torch.equal(compressed.patch.view(2, 5)[:, 1:], best)
    assert (compressed.owner >= 0).sum() == 8


def test_full_budget_changes_nothing():
    views = random_views(1, 4)
    assert method(dominant=10, contextual=6).compress_views(views) is None
    assert method(retention_ratio=1.0).compress_views(views) is None
    assert method(dominant=10, contextual=5).compress_views(views) is not None
    item = video(2, 4, "grid")
    sequence = assemble(item, method(dominant=12, contextual=4).compress(item))
    assert torch.equal(sequence.tokens, uncompressed(item).tokens)


# -- videos ------------------------------------------------------------------------------------------------------------


def video(frames, side, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, side * side)
    item = video_item(torch.randn(*shape, 6, generator=generator), torch.full((6,), 7.0), layout, "spatial_unpad")
    item.signals = {
        "received_attention": torch.rand(shape, generator=generator),
        "key_states": torch.randn(*shape, 4, generator=generator),
    }
    return item


def zipped_video(item, dominant, contextual):
    signals = item.signals
    return zip_tokens(item.features, signals["received_attention"], signals["key_states"], dominant, contextual)


@pytest.mark.parametrize("layout", ["one_token", "no_token", "frame"])
def test_frames_are_dominant_then_contextual(layout):
    item = video(3, 4, layout)
    sequence = assemble(item, method(dominant=4, contextual=2).compress(item))
    zipped = zipped_video(item, 4, 2)
    frames = torch.cat([zipped.kept, zipped.merged], 1)
    newline = torch.full((1, 6), 7.0)
    if layout == "frame":
        expected = torch.cat([torch.cat([frame, newline]) for frame in frames])
    else:
        expected = torch.cat([frames.flatten(0, 1), newline[: layout == "one_token"]])
    assert torch.equal(sequence.tokens, expected)
    after = 7 if layout == "frame" else 6
    assert sequence.owner[1].unique().tolist() == list(range(after, after + 6))


@pytest.mark.parametrize("order", ["raster", "as_released"])
def test_grid_layout_keeps_every_newline(order):
    item = video(2, 4, "grid")
    compressed = method(dominant=4, contextual=2, grid_order=order).compress(item)
    sequence = assemble(item, compressed)
    assert int((~sequence.is_content).sum()) == 8 and len(sequence.tokens) == 2 * 6 + 8
    zipped, rows = zipped_video(item, 4, 2), item.positions
    by_score = item.signals["received_attention"].topk(4).indices
    places = {"raster": zipped.dominant, "as_released": by_score}[order]
    positions = compressed.positions.view(2, 6)
    assert torch.equal(positions[:, :4], rows.gather(1, places))
    assert torch.equal(positions[:, 4:], rows.gather(1, zipped.targets))
    assert torch.equal(compressed.tokens.view(2, 6, 6)[:, :4], zipped.kept)


def test_frames_do_not_touch_each_other():
    item, alone = video(3, 4, "no_token"), video(3, 4, "no_token")
    alone.features[1:] = 0
    alone.signals["key_states"][1:] = 1
    compress = method(dominant=4, contextual=2).compress
    # (batched matrix products may round differently from frame to frame)
    torch.testing.assert_close(compress(item).tokens[:6], compress(alone).tokens[:6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    views = random_views(1, 16, dtype=dtype)
    views.features.fill_(1000.0)  # the sum of 250 such tokens is beyond float16
    compressed = method(dominant=2, contextual=1).compress_views(views)
    assert compressed.tokens.dtype == dtype
    torch.testing.assert_close(compressed.tokens[2].float(), torch.full((6,), 2000.0), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dominant": 0, "contextual": 3}, {"dominant": 5}, {"contextual": 5}, {"dominant": 5, "contextual": -1},
        {"dominant": 5.5, "contextual": 1}, {"retention_ratio": 0}, {"grid_order": "score"},
        {"dominant": 5, "contextual": 1, "retention_ratio": 0.5},
    ],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises(MethodError, match="visionzip"):
        method(**wrong)


def test_a_budget_replaces_another():
    config = {"method": "visionzip", "dominant": 54, "contextual": 10}
    assert accelerate_methods.resolve(config, retention_ratio=0.5).methods == (VisionZip(retention_ratio=0.5),)


def test_image_with_tiles_on_a_tower_without_cls(tiny):
    model, size = tiny("tiny-llava-onevision"), (768, 384)
    model.config.image_grid_pinpoints = [list(size)]
    pixels = torch.randn(3, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, -200, 7]])
    with torch.no_grad(), accelerate_methods.accelerate(model, "visionzip", dominant=9, contextual=3):
        embeds = model.prepare_multimodal(ids, None, None, [pixels], "image", [size]).inputs_embeds[0]
        views = model.encode([pixels], ["image"], [size])[0].views
        zipped = zip_tokens(views.features, views.signal("received_attention"), views.signal("key_states"), 9, 3)
        expected = model.project(torch.cat([zipped.kept[0], zipped.merged[0]]))
        last = model.project(zipped.merged[1:].flatten(0, 1))
    assert len(embeds) == 3 + 3 * 12
    torch.testing.assert_close(embeds[2:14], expected)
    torch.testing.assert_close(embeds[-7:-1], last)
