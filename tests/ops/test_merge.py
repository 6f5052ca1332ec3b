"""Anchors and their members, against a loop over pools, sets and tokens."""

import pytest
import torch

from accelerate_methods.ops.contextual import contextual_merge
from accelerate_methods.ops.merge import AnchorSets, blend_into_anchors, group_means, nearest_anchors, running_means

PROBLEMS = [
    AnchorSets(0, 8, 0, 1, 3),  # three pools of one form in a row are one product
    AnchorSets(8, 16, 3, 1, 3),
    AnchorSets(16, 24, 6, 1, 3),
    AnchorSets(24, 48, 9, 2, 2),
    AnchorSets(24, 48, 13, 1, 4),  # the same pool again, with sets of another size
    AnchorSets(56, 64, 17, 1, 3),  # a stretch that is nobody's pool lies before
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_members_and_means_as_in_a_loop():
    tokens, anchors, beta = randn(64, 5), randn(20, 5, seed=1), 0.3
    takes_part = randn(64, seed=2) > 0
    member = nearest_anchors(tokens, anchors, PROBLEMS)
    expected, entries = anchors.clone(), []
    for problem in PROBLEMS:
        pool = range(problem.start, problem.end)
        for place in range(problem.sets):
            first = problem.first + place * problem.size
            rows = anchors[first : first + problem.size]
            members = [[] for _ in rows]
            for token in pool:
                similarity = torch.stack([tokens[token] @ row / row.norm() for row in rows])
                entries.append((token, first + int(similarity.argmax()), place, similarity.max()))
                if takes_part[token]:
                    members[int(similarity.argmax())].append(tokens[token])
            for anchor, own in enumerate(members, first):
                if own:
                    weight = max(beta, 1 / (len(own) + 1))
                    expected[anchor] = weight * anchors[anchor] + (1 - weight) * torch.stack(own).mean(0)
    token, anchor, place, similarity = zip(*entries, strict=True)
    assert member.token.tolist() == list(token) and member.anchor.tolist() == list(anchor)
    assert member.place.tolist() == list(place) and member.most_places == 2
    torch.testing.assert_close(member.similarity, torch.stack(similarity))
    part = takes_part[member.token]
    blended = blend_into_anchors(tokens, anchors, member, part, int(part.sum()), beta)
    torch.testing.assert_close(blended, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_of_large_groups_do_not_overflow(dtype):
    tokens = torch.full((3000, 4), 60.0).to(dtype)  # their sum is beyond half precision
    means, sizes = group_means(tokens, torch.arange(3000) % 2, 3)
    assert sizes.tolist() == [1500, 1500, 0]
    torch.testing.assert_close(means[:2].float(), torch.full((2, 4), 60.0), atol=0.2, rtol=0)
    assert (means[2] == 0).all(), "nobody's"
    merged, _, _ = contextual_merge(tokens[None], tokens[None], torch.ones(1, 3000, dtype=torch.bool), 3000, 1)
    torch.testing.assert_close(merged.float(), torch.full((1, 1, 4), 120.0), atol=0.5, rtol=0)


def test_means_have_gradients():
    tokens = randn(9, 4).double().requires_grad_()
    owner = torch.tensor([2, 0, 1, 1, 3, 0, 2, 2, 3])  # the two of owner 3 count for nothing
    assert torch.autograd.gradcheck(lambda x: group_means(x, owner, 3, used=7)[0], tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_means_are_taken_one_after_the_other(dtype):
    anchors, tokens = randn(6, 5).to(dtype), randn(40, 5, seed=1).to(dtype)
    owner = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(2))  # nobody comes to the last one
    expected = anchors.float().clone()
    for token, at in zip(tokens.float(), owner.tolist(), strict=True):
        expected[at] = (expected[at] + token) / 2
    found = running_means(anchors, tokens, owner)
    torch.testing.assert_close(found, expected.to(dtype))
    assert torch.equal(found[5], anchors[5]) and found.dtype == dtype
    assert torch.equal(running_means(anchors, tokens[:0], owner[:0]), anchors)
