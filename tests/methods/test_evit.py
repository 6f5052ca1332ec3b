"""EViT beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods import accelerate, record
from accelerate_methods.evit import left_of, quarters, reorganize
from accelerate_methods.stages.errors import MethodError
from tests.support.items import pixels

pytestmark = pytest.mark.usefixtures("no_grad")


def method(**params):
    return accelerate_methods.get("evit", **params)


def test_blocks_of_the_paper():
    assert quarters(12) == (3, 6, 9) and quarters(23) == (6, 12, 18) and quarters(24) == (6, 12, 18)
    assert quarters(3) == (1, 2) and quarters(2) == (1,) and quarters(1) == (0,)


def test_counts_of_the_paper():
    counts = [196]
    for _ in range(3):
        counts.append(left_of(counts[-1], 0.7) + 1)
    assert counts == [196, 139, 99, 71] and left_of(100, 0.55) == 56


def test_reorganize_by_hand():
    x = torch.arange(10.0).view(1, 5, 2)
    scores = torch.tensor([[0.1, 0.3, 0.1, 0.3]])
    merge = reorganize(x, scores, 3, 1, fuse=True)
    assert merge.source.tolist() == [[0, 2, 4, 1, -1]], "ties go to the lower index"
    assert merge.owner.tolist() == [[0, 3, 1, 4, 2]]
    torch.testing.assert_close(merge.hidden[0, -1], 0.1 * x[0, 3])
    torch.testing.assert_close(reorganize(x, scores, 3, 1, True, normalize=True).hidden[0, -1], x[0, 3])
    dropped = reorganize(x, scores, 3, 1, fuse=False)
    assert dropped.owner.tolist() == [[0, 3, 1, -1, 2]] and torch.equal(dropped.hidden, x[:, [0, 2, 4, 1]])


@pytest.mark.parametrize(
    "wrong",
    [{"keep_rate": 0}, {"keep_rate": 0.5, "retention_ratio": 0.5}, {"unmerge": True}, {"tokens": [5], "blocks": [1, 2]},
     {"token_order": "first_patch"}, {"tokens_per_frame": 3}],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises((MethodError, ValueError), match="evit"):
        method(**wrong)


# -- on models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
def test_the_target_is_exact(tiny, fuse):
    model = tiny("tiny-llava-1.5")
    with accelerate(model, "evit", tokens_per_view=50, fuse_token=fuse), record() as requests:
        model(input_ids=torch.tensor([[5, -200, 7]]), images=pixels(model, 1))
    (item,) = requests[0].samples[0].items
    assert item.tokens_after == 50 and item.owner.shape == (1, 576)
    # patches stand where they are kept; the fused tokens stand nowhere, but hold all others
    assert item.kept.sum() < 50 if fuse else item.kept.sum() == 50
    assert (item.owner >= 0).all() == fuse


def test_first_block_keeps_what_cls_attends_to(tiny):
    model = tiny("tiny-llava-1.5")
    tower, images = model.get_vision_tower(), pixels(model, 1)
    tower.vision_tower.set_attn_implementation("eager")
    maps = tower.vision_tower(images, output_attentions=True).attentions[1].mean(1)[0, 0, 1:]
    tower.vision_tower.set_attn_implementation("sdpa")
    merged = tower.look(images, method=method(tokens=[30], blocks=[1])).merged
    assert merged.tokens.stands[0].tolist() == maps.topk(30).indices.tolist()


def test_siglip_keeps_what_is_attended_to(tiny):
    model = tiny("tiny-llava-onevision")
    tower, images = model.get_vision_tower(), pixels(model, 1)
    tower.vision_tower.set_attn_implementation("eager")
    maps = tower.vision_tower(images, output_attentions=True).attentions[1][0]
    tower.vision_tower.set_attn_implementation("sdpa")
    merged = tower.look(images, method=method(tokens=[30], blocks=[1])).merged
    assert merged.tokens.stands[0].tolist() == maps.mean((0, 1)).topk(30).indices.tolist()


def test_raster_order_puts_fused_tokens_behind(tiny):
    tower = tiny("tiny-llava-1.5").get_vision_tower()
    own = method(tokens=[60, 55], blocks=[0, 1], fuse_token=True, token_order="raster")
    stands = tower.look(pixels(tiny("tiny-llava-1.5"), 2), method=own).merged.tokens.stands
    for row in stands.tolist():
        real = [patch for patch in row if patch >= 0]
        assert real == sorted(real) and row[: len(real)] == real and set(row[len(real) :]) == {-1}


def test_a_distillation_token_is_refused():
    from tests.support.tiny_vit import TinyViT

    draw = torch.Generator().manual_seed(0)
    shapes = {
        "patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,), "cls_token": (1, 1, 8),
        "dist_token": (1, 1, 8), "pos_embed": (1, 6, 8),
        **{f"blocks.0.{name}.weight": (8,) for name in ("norm1", "norm2")},
        **{f"blocks.0.{name}.bias": (8,) for name in ("norm1", "norm2")},
        "blocks.0.attn.qkv.weight": (24, 8), "blocks.0.attn.proj.weight": (8, 8),
    }  # fmt: skip
    model = TinyViT({name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}, 2, 1e-6)
    with pytest.raises(MethodError, match="distillation"):
        model.encode(torch.randn(1, 3, 8, 8), method(blocks=[0]))


def test_unmerge_fills_holes_with_the_fused_token(tiny):
    model = tiny("tiny-llava-1.5")
    own = method(tokens=[30], blocks=[1], fuse_token=True, unmerge=True)
    encoded = model.get_vision_tower().look(pixels(model, 1), method=own)
    assert encoded.patches.shape[1] == 576 and not encoded.shortened
    owner = encoded.merged.tokens.owner[0]
    holes = owner == 30
    assert holes.sum() == 546 and torch.equal(encoded.patches[0, holes], encoded.merged.hidden[0, -1].expand(546, -1))


def test_a_block_that_does_not_run_is_refused(tiny):
    with pytest.raises(MethodError, match=r"block 3 of the vision encoder does not run; blocks are 0\.\.2"):
        accelerate(tiny("tiny-llava-1.5"), "evit", blocks=[1, 3])
