"""Outliers, and tokens that take in their most similar others, against the rules written out."""

import numpy as np
import pytest
import torch

from accelerate_methods.ops.neighbours import above_whisker, fold_into


def test_outliers_are_those_of_a_box_plot():
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 50, generator=draw) ** 6
    for row, found in zip(scores.numpy(), above_whisker(scores), strict=True):
        first, third = np.percentile(row, [25, 75])
        assert found.tolist() == (row > third + 1.5 * (third - first)).tolist()
    assert not above_whisker(torch.full((9,), 0.5)).any() and not above_whisker(torch.full((9,), float("nan"))).any()


def by_hand(features, keys, weights, chosen, neighbours):
    """One set, token by token, in float64."""
    features, weights = features.double(), weights.double()
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    left = [i for i in range(len(weights)) if i not in chosen]
    rest = left[len(chosen) - len(set(chosen)) :]
    entries, tokens = [*chosen, *rest], []
    for place, token in enumerate(chosen):
        others = [e for number, e in enumerate(entries) if number != place]
        others.sort(key=lambda e: -float(unit[token] @ unit[e]))
        tokens.append(features[token] + sum(weights[e] * features[e] for e in others[:neighbours]))
    tokens.append(sum((weights[e] * features[e] for e in rest), torch.zeros_like(features[0])))
    return torch.stack(tokens[: len(chosen) + bool(rest)]).float(), rest


@pytest.mark.parametrize(
    ("chosen", "neighbours"), [([4, 9, 0], 3), ([7], 19), ([7], 40), ([], 3), ([3, 5, 3, 12], 4), (list(range(20)), 3)]
)
def test_fold(chosen, neighbours):
    draw = torch.Generator().manual_seed(1)
    features, keys = torch.randn(2, 20, 6, generator=draw), torch.randn(2, 20, 5, generator=draw)
    weights = torch.rand(2, 20, generator=draw)
    index = torch.tensor([chosen, chosen], dtype=torch.long)
    folded = fold_into(features, keys, weights, index, neighbours)
    for one in range(2):
        tokens, rest = by_hand(features[one], keys[one], weights[one], chosen, neighbours)
        torch.testing.assert_close(folded.tokens[one], tokens, atol=1e-5, rtol=1e-5)
        # where they stand, and who holds what
        places, slot = folded.places[one].tolist(), folded.slot[one]
        if rest:
            assert places.pop() == max(rest, key=lambda i: weights[one, i])
        firsts = [chosen.index(token) for token in chosen]
        assert places == [token if chosen.index(token) == at else -1 for at, token in enumerate(chosen)]
        assert slot[chosen].tolist() == firsts
        lost = set(range(20)) - set(chosen) - set(rest)
        assert [i for i in range(20) if slot[i] < 0] == sorted(lost)


def test_a_token_that_is_no_number_spoils_only_itself():
    features = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    features[0, 5] = float("nan")
    folded = fold_into(features, features.nan_to_num(), torch.full((1, 12), 0.1), torch.tensor([[5, 2]]), 4)
    assert folded.tokens[0, 0].isnan().all() and folded.tokens[0, 1:].isfinite().all()
