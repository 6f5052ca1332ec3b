"""SCOPE beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.scope import salient_coverage
from accelerate_methods.stages.errors import MethodError
from tests.support.items import make_views


@pytest.mark.parametrize(
    ("params", "views", "each"),
    [
        ({"tokens_per_image": 160}, 3, 53),
        ({"tokens_per_image": 2}, 5, 1),  # the release keeps nothing
        ({"tokens_per_image": 9999}, 1, 576),
        ({"tokens_per_view": 600}, 5, 576),
        ({"retention_ratio": 0.2222}, 5, 128),
        ({"retention_ratio": 0.0001}, 1, 1),
    ],
)
def test_budget(params, views, each):
    assert accelerate_methods.get("scope", **params).view_budget(576, views) == each


def test_a_token_without_direction_covers_nothing():
    """The release keeps the first tokens of such a view, whatever they are."""
    draw = torch.Generator().manual_seed(0)
    tokens, saliency = torch.randn(2, 30, 8, generator=draw), torch.rand(2, 30, generator=draw)
    tokens[0, 4], tokens[1, 7] = 0.0, torch.nan
    order, gain = salient_coverage(tokens, saliency, 30, 1.0)
    assert torch.isfinite(gain).all() and all(len(row.unique()) == 30 for row in order)
    assert 4 not in order[0, :5] and 7 not in order[1, :5]
    assert gain[0, order[0] == 4] == gain[1, order[1] == 7] == 0


def test_attention_decides_between_equals_and_alpha_0_ignores_it():
    tokens = torch.eye(4).repeat(3, 1)[None]
    saliency = torch.arange(12.0)[None] + 1
    assert salient_coverage(tokens, saliency, 4, 1.0)[0].tolist() == [[11, 10, 9, 8]]
    assert salient_coverage(tokens, saliency, 4, 0.0)[0].tolist() == [[0, 1, 2, 3]]


def test_half_precision_features_are_compared_in_float32():
    draw = torch.Generator().manual_seed(1)
    tokens, saliency = torch.randn(1, 64, 8, generator=draw).half(), torch.rand(1, 64, generator=draw)
    order, _ = salient_coverage(tokens, saliency, 20, 1.0)
    assert torch.equal(order, salient_coverage(tokens.float(), saliency, 20, 1.0)[0])


def test_says_the_order_of_its_picks():
    views, _ = make_views((2, 1), 3, True, "random", torch.float32, 0)
    compressed = accelerate_methods.get("scope", tokens_per_view=4).compress_views(views)
    assert torch.equal(compressed.info["order"].sort(1).values.flatten(), compressed.patch)
    assert compressed.newlines == "single"


def test_without_a_cls_token_tokens_are_compared_as_the_language_model_gets_them():
    """Both what they receive and what they resemble then come from where the port for Qwen2.5-VL takes them."""
    views, _ = make_views((1, 1), 4, False, "random", torch.float32, 0)
    views.signals = {"received_attention": views.signals["received_attention"]}
    turned = torch.randn(views.features.shape[-1], 6, generator=torch.Generator().manual_seed(0))
    views.project = lambda features: features @ turned
    order = accelerate_methods.get("scope", tokens_per_view=5).compress_views(views).info["order"]
    expected, _ = salient_coverage(views.features @ turned, views.signals["received_attention"], 5, 1.0)
    assert torch.equal(order, expected)


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"combine": "max"}, {"tokens_per_image": 0}, {"heads": 0}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="scope"):
        accelerate_methods.get("scope", **wrong)
