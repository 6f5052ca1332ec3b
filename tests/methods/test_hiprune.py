"""HiPrune beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.hiprune import DEEP, HiPrune, anchor_count, rank_of_objects, with_registers
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import Signal
from tests.support.items import make_item, make_views


def objects(anchors, grid, inside):
    rank = rank_of_objects(torch.tensor([anchors]), grid, inside)[0]
    return (rank < 5 * len(anchors)).nonzero().flatten().tolist()


def test_neighbours_in_the_middle():
    assert objects([6], (3, 5), False) == objects([6], (3, 5), True) == [1, 5, 6, 7, 11]


@pytest.mark.parametrize(
    ("anchor", "released", "grid"),
    [(0, [0, 1, 5], [0, 1, 5]), (4, [0, 3, 4, 5, 9], [3, 4, 9]), (5, [0, 4, 5, 6, 10], [0, 5, 6, 10]),
     (14, [9, 13, 14], [9, 13, 14]), (12, [7, 11, 12, 13, 14], [7, 11, 12, 13]), (2, [0, 1, 2, 3, 7], [1, 2, 3, 7])],
)  # fmt: skip
def test_neighbours_at_the_edges(anchor, released, grid):
    assert objects([anchor], (3, 5), False) == released and objects([anchor], (3, 5), True) == grid


def test_more_objects_than_budget():
    """Anchors first, then anchor by anchor what is left, right, above and below."""
    rank = rank_of_objects(torch.tensor([[12, 6]]), (5, 5), True)
    scores = torch.zeros(1, 25)
    taken = [12, 6, 11, 13, 7, 17, 5, 1]
    for count in range(1, 9):
        assert with_registers(scores, rank, 10, count)[0].tolist() == sorted(taken[:count])


@pytest.mark.parametrize(("count", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1), (1, 0), (25, 0), (75, 2)])
def test_anchors_are_rounded_half_to_even(count, anchors):
    assert anchor_count(count, 0.1) == anchors


def test_budget_of_an_image_is_shared_by_its_views():
    method = HiPrune(retention_ratio=None, tokens_per_image=640)
    assert [method.view_budget(576, views) for views in (5, 4, 3)] == [128, 160, 213]
    assert method.view_budget(576, 700) == 1 and HiPrune(retention_ratio=0.112).view_budget(80, 1) == 9


def test_registers_are_of_the_deep_layer():
    views, _ = make_views(None, 5, True, "random", torch.float32, 0)
    method = accelerate_methods.get("hiprune", tokens_per_view=8, alpha=0.0)
    kept = method.compress_views(views).patch
    assert torch.equal(kept, views.signal(DEEP).topk(8).indices.sort().values[0])


def test_the_release_for_qwen_chooses_objects_again():
    item = make_item("grid", 1, 6, "random", torch.float32, 0)
    method = accelerate_methods.get("hiprune", tokens_per_view=12, alpha=0.5, exclude="released")
    (anchor,) = item.signal(method.object_signal)[0].topk(1).indices.tolist()
    item.signals[DEEP] = torch.ones(1, 36)
    item.signals[DEEP][0, anchor] = 30.0
    kept = method.compress(item).positions
    assert len(kept) == 11 and method.count(item.shape) is None
    exact = accelerate_methods.get("hiprune", tokens_per_view=12, alpha=0.5)
    assert len(exact.compress(item).positions) == exact.count(item.shape) == 12


@pytest.mark.parametrize(
    ("given", "signal"), [(0.375, Signal("received_attention", 0.375)), (9, Signal("received_attention", 8)),
                          (1.0, Signal("received_attention", 0))],
)  # fmt: skip
def test_the_object_layer_is_asked_for(given, signal):
    assert accelerate_methods.get("hiprune", object_layer=given).signals == {DEEP, signal}


@pytest.mark.parametrize("wrong", [{"object_layer": 0}, {"object_layer": 2.5}, {"alpha": 1.5}, {"neighbours": "all"}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="hiprune"):
        accelerate_methods.get("hiprune", **wrong)


def test_a_layer_that_the_encoder_does_not_have(tiny):
    with pytest.raises(MethodError, match="has layers 0"):
        accelerate_methods.accelerate(tiny("tiny-llava-1.5"), "hiprune", object_layer=9)
