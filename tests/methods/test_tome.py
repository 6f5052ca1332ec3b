"""ToMe beyond its golden vectors."""

import itertools

import pytest
import torch

import accelerate_methods
from accelerate_methods import accelerate, record
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.tome import match, match_every, match_random, merge_mean, schedule_for, schedule_of
from tests.support.items import pixels

pytestmark = pytest.mark.usefixtures("no_grad")


def method(**params):
    return accelerate_methods.get("tome", **params)


def left(plan, patches, special):
    """Patches that are left, counted block by block."""
    for r in plan:
        patches -= min(r, patches // 2)
    return patches


@pytest.mark.parametrize(
    ("patches", "target", "blocks", "special"),
    [(576, 192, 23, 1), (576, 128, 23, 1), (576, 64, 23, 1), (729, 196, 26, 0), (729, 49, 26, 0), (729, 1, 26, 0),
     (24, 12, 4, 0), (576, 72, 3, 1), (576, 575, 23, 1), (197, 9, 12, 1)],
)  # fmt: skip
def test_schedule_is_exact_and_even(patches, target, blocks, special):
    plan = schedule_for(patches, target, blocks, special)
    assert len(plan) == blocks and left(plan, patches, special) == target
    assert max(plan) - min(plan) <= 1 and list(plan) == sorted(plan, reverse=True)


def test_schedule_of_few_blocks_leaves_as_few_as_can_be():
    assert left(schedule_for(576, 10, 3, 1), 576, 1) == 72
    assert schedule_for(576, 576, 23, 1) == (0,) * 23


def test_inflect_keeps_the_sum_and_one_block_does_not_divide_by_zero():
    assert schedule_of(8, -1.0, 5) == (16, 12, 8, 4, 0) and schedule_of(8, 1.0, 5) == (0, 4, 8, 12, 16)
    assert schedule_of(8, 0.5, 1) == (4,)


def by_hand(metric, r, special):
    """{source: destination} by a loop over tokens."""
    unit = torch.nn.functional.normalize(metric, dim=-1)
    sources = [t for t in range(0, len(unit), 2) if not (special and t == 0)]
    destinations = [t for t in range(1, len(unit), 2) if not (special > 1 and t == 1)]
    best = {s: max(destinations, key=lambda d: (float(unit[s] @ unit[d]), -d)) for s in sources}
    order = sorted(sources, key=lambda s: (-float(unit[s] @ unit[best[s]]), s))
    return {s: best[s] for s in order[:r]}


@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize(("length", "r"), [(9, 2), (10, 3), (31, 30), (32, 5)])
def test_matching_is_that_of_a_loop(special, length, r):
    draw = torch.Generator().manual_seed(length)
    metric, x = torch.randn(2, length, 5, generator=draw), torch.randn(2, length, 3, generator=draw)
    sizes = torch.randint(1, 5, (2, length), generator=draw).float()
    found = match(metric, r, special)
    r = min(r, (length - special) // 2)
    out, after = merge_mean(x, found, sizes)
    for view in range(2):
        joins = by_hand(metric[view], r, special)
        groups = {t: [t] for t in range(length) if t not in joins}
        for source, destination in joins.items():
            groups[destination].append(source)
        assert len(groups) == out.shape[1] == length - r
        for slot, token in enumerate(found.source[view].tolist()):
            members = groups[token]
            weights = sizes[view, members]
            expected = (x[view, members] * weights[:, None]).sum(0) / weights.sum()
            torch.testing.assert_close(out[view, slot], expected)
            assert after[view, slot] == weights.sum()
            assert found.owner[view, members].tolist() == [slot] * len(members)
        assert found.source[view, :special].tolist() == list(range(special)), "special tokens stay in front"


def test_ties_zeros_and_half_precision():
    same = torch.ones(1, 9, 4)
    found = match(same, 2, 1)
    assert found.sources.tolist() == [[2, 4]] and found.source[0, found.into[0]].tolist() == [1, 1], "the lower index"
    assert torch.isfinite(merge_mean(same, match(torch.zeros(1, 9, 4), 3, 1))[0]).all()
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(1, 9, 4).to(dtype)
        out, sizes = merge_mean(x, match(x, 4, 0))
        assert out.dtype == dtype and sizes.sum() == 9
        assert torch.equal(merge_mean(x, found)[0][0, 0], x[0, 0]), "a token that nobody joins is copied"


def test_what_cannot_merge():
    assert match(torch.randn(1, 2, 4), 5, 1) is None and match(torch.randn(1, 1, 4), 5) is None
    assert match_every(torch.randn(1, 4, 4), 1) is None and match_random(torch.randn(1, 4, 4), 0, None) is None
    assert match_every(torch.randn(1, 11, 4), 4).owner[0, 8:].tolist() == [-1] * 3


@pytest.mark.parametrize(
    "wrong",
    [{}, {"r": -1}, {"r": 2, "retention_ratio": 0.5}, {"inflect": 0.5, "retention_ratio": 0.5}, {"r": 1, "inflect": 2},
     {"tokens_per_image": 64}, {"r": 1, "token_order": "raster"}, {"r_per_block": [1.5]}],
)  # fmt: skip
def test_refuses(wrong):
    with pytest.raises((MethodError, ValueError), match="tome"):
        method(**wrong)


# -- on models ---------------------------------------------------------------------------------------------------------


def test_proportional_attention_is_that_of_every_copy(tiny):
    """One block on merged tokens equals the block on all of them, each repeated as often as its size says."""
    from accelerate_methods.engine.encoder_block import BlockAttention, ClipBlock
    from accelerate_methods.stages.encode import TokenMap

    block = ClipBlock(tiny("tiny-llava-onevision").get_vision_tower().vision_tower.encoder.layers[0])
    hidden, sizes = torch.randn(1, 6, 32), torch.tensor([[1.0, 3, 1, 2, 4, 1]])
    hidden[:, 1] = hidden[:, 0]  # two tokens that differ by what they stand for only
    every = hidden.repeat_interleave(sizes[0].long(), dim=1)
    index = torch.arange(6)[None]
    few = BlockAttention(block, block.project(hidden, TokenMap(index, index)), sizes.log(), 0, 1, None)
    many = BlockAttention(block, block.project(every, TokenMap(index, index)), None, 0, 1, None)
    torch.testing.assert_close(few.output().repeat_interleave(sizes[0].long(), dim=1), many.output())
    got = few.received_attention()[0] * 6
    assert (got[1] > got[0]), "a token that stands for three is attended to as three"
    torch.testing.assert_close(got[1], 3 * got[0])


def test_the_count_is_exact_and_the_record_adds_up(tiny):
    model = tiny("tiny-llava-1.5")
    with accelerate(model, "tome", tokens_per_view=100), record() as requests:
        model(input_ids=torch.tensor([[5, -200, 7]]), images=pixels(model, 1))
    (item,) = requests[0].samples[0].items
    assert (item.tokens_before, item.tokens_after, item.grid) == (576, 100, (24, 24))
    assert item.owner.shape == (1, 576) and item.owner.min() == 0 and len(item.owner.unique()) == 100
    assert item.kept.sum() == 100 and torch.equal(item.owner[item.kept].sort().values, torch.arange(100))
    assert requests[0].samples[0].length == 102 and requests[0].samples[0].dense_length == 578


def test_a_count_that_cannot_be_reached_is_refused(tiny):
    model = tiny("tiny-llava-1.5")
    with accelerate(model, "tome", tokens_per_view=10), pytest.raises(MethodError, match=r"10 of 576 .* leaves 72"):
        model(input_ids=torch.tensor([[5, -200, 7]]), images=pixels(model, 1))


def test_first_patch_order_rises(tiny):
    model = tiny("tiny-llava-onevision")
    video = pixels(model, 3)
    with accelerate(model, "tome", retention_ratio=0.6, token_order="first_patch"):
        (item,) = model.encode([video], ["video"])
    assert item.features.shape[:2] == (3, 117) and item.grid is None and item.newlines.shape[0] == 1
    numbers = torch.arange(729).expand(3, -1)
    first = torch.full((3 * 117,), 729).scatter_reduce(0, item.patches.owner.flatten(), numbers.flatten(), "amin")
    assert (first.view(3, 117).diff(dim=1) > 0).all() and first.view(3, 117)[:, 0].eq(0).all()


def test_unmerge_gives_the_dense_layout(tiny):
    model = tiny("tiny-llava-onevision")
    video = pixels(model, 2)
    with accelerate(model, "tome", retention_ratio=0.5, unmerge=True):
        (item,) = model.encode([video], ["video"])
        encoded = model.get_vision_tower().look(video, method=method(retention_ratio=0.5, unmerge=True))
    plain = model.encode([video], ["video"])[0]
    assert item.features.shape == plain.features.shape and item.grid == plain.grid and item.patches is None
    tokens = encoded.merged.hidden
    for view, patch in itertools.product(range(2), (0, 100, 728)):
        assert torch.equal(encoded.hidden[view, patch], tokens[view, encoded.merged.tokens.owner[view, patch]])
    with accelerate(model, "tome+prunevid", **{"tome.retention_ratio": 0.5, "tome.unmerge": True,
                                               "prunevid.selected_layer": 1}):  # fmt: skip
        model.prepare_multimodal(torch.tensor([[5, -200, 7]]), None, None, [video], "video")


@pytest.mark.parametrize("other", ["prunevid", "dycoke"])
def test_methods_that_need_the_grid_are_refused(other):
    with pytest.raises(MethodError, match=f"{other} needs the grid of tokens, which tome takes away"):
        accelerate_methods.resolve(f"tome+{other}", **{"tome.r": 8})
    accelerate_methods.resolve("tome+dycoke", **{"tome.r": 8, "dycoke.ttm": False})


@pytest.mark.parametrize("other", ["uniform", "visionzip", "fastervlm", "fastvid", "fastv", "pool"])
def test_composes(tiny, other):
    model = tiny("tiny-llava-onevision")
    video, ids = pixels(model, 3), torch.tensor([[5, -200, 7]])
    more = {} if other == "fastv" else {f"{other}.retention_ratio": 0.5}
    with accelerate(model, f"tome+{other}", **{"tome.retention_ratio": 0.5, **more}), record() as requests:
        model.generate(ids, images=[video], modalities=["video"], max_new_tokens=2, do_sample=False)
    (item,) = requests[0].samples[0].items
    assert item.owner.shape == (3, 729) and item.tokens_before == 3 * 196
    assert item.tokens_after <= 3 * (98 if other == "fastv" else 49) + 3
    held = item.owner[item.kept]
    assert (held >= 0).all() and len(held.unique()) == len(held)
    assert set(item.owner[item.owner >= 0].tolist()) >= set(held.tolist())


def test_merging_in_the_last_block_carries_signals(tiny):
    """Attention of a token merged in the last block is that of its members, their keys' mean."""
    from accelerate_methods.engine.encoder_attention import encoder_signals

    tower = tiny("tiny-llava-1.5").get_vision_tower()
    images, last = pixels(tiny("tiny-llava-1.5"), 1), tower.num_blocks - 1
    own = method(r_per_block=[0] * last + [200])
    merged = tower.look(images, keep={last}, method=own)
    names = {"cls_attention", "received_attention", "key_states"}
    got = tower.signals(merged, names)
    before = encoder_signals(tower.vision_tower.encoder.layers[last], tower.look(images).before, names, 1)
    owner = merged.merged.tokens.owner[0]
    for token in (0, 5, 375):
        members = (owner == token).nonzero().flatten()
        torch.testing.assert_close(got["cls_attention"][0, token], before["cls_attention"][0, members].sum())
        torch.testing.assert_close(got["key_states"][0, token], before["key_states"][0, members].mean(0))
