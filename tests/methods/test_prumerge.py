"""PruMerge beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.engine.sequences import assemble_views
from accelerate_methods.prumerge import CLS, KEYS, RECEIVED, outlier_ratio
from accelerate_methods.stages.errors import MethodError
from tests.support.items import make_item, make_views


def test_outliers_of_all_views_are_counted_together():
    views, item = make_views((2, 2), 5, True, "random", torch.float32, 0)
    views.signals[CLS] = torch.full((5, 25), 0.01)
    views.signals[CLS][1, :10] = 0.9  # all of them in one view: every view keeps two
    compressed = accelerate_methods.get("prumerge").compress_views(views)
    assert int(25 * outlier_ratio(views.signals[CLS])) == 2
    assert compressed.patch.view(5, 3)[1, :2].tolist() == [0, 1], "by falling attention, of equal ones the first"
    # the tokens for the rest follow after all patches of the tiles
    assert compressed.section.view(5, 3).tolist() == [[0, 0, 1]] * 5
    sequence = assemble_views(item, views, compressed, lambda rows: rows[:, :1])
    assert torch.equal(sequence.tokens[-4:, 0], compressed.tokens.view(5, 3, -1)[1:, 2, 0])


def test_without_outliers_one_token_holds_all():
    item = make_item("one_token", 3, 4, "random", torch.float32, 0)
    item.signals[RECEIVED] = item.signals[CLS] = torch.full((3, 16), 1 / 16)
    compressed = accelerate_methods.get("prumerge").compress(item)
    torch.testing.assert_close(compressed.tokens, item.features.mean(1))
    assert compressed.owner.tolist() == [[frame] * 16 for frame in range(3)]


@pytest.mark.parametrize(("params", "count"), [({"reduction_ratio": 0.125}, 73), ({"retention_ratio": 0.125}, 72)])
def test_the_token_for_the_rest_is_part_of_a_retention_ratio(params, count):
    views, _ = make_views(None, 24, True, "random", torch.float32, 0)
    assert len(accelerate_methods.get("prumerge", **params).compress_views(views).tokens) == count


def test_half_precision_is_summed_in_float32():
    views, _ = make_views(None, 8, True, "random", torch.float32, 0)
    views.signals = {CLS: torch.rand(1, 64).softmax(1), KEYS: torch.randn(1, 64, 8)}
    method = accelerate_methods.get("prumerge", retention_ratio=0.2)
    exact = method.compress_views(views)
    views.features = views.features.bfloat16()
    half = method.compress_views(views)
    assert half.tokens.dtype == torch.bfloat16
    torch.testing.assert_close(half.tokens.float(), exact.tokens, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("wrong", [{"reduction_ratio": 0}, {"reduction_ratio": 0.1, "retention_ratio": 0.1}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="prumerge"):
        accelerate_methods.get("prumerge", **wrong)
