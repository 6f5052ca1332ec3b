"""Trees along time: links, roots, and what a tree becomes."""

import pytest
import torch

from accelerate_methods.ops.trees import links_to_previous, roots_of, tree_values


def test_links_go_to_the_most_similar_available_token_of_the_frame_before():
    states = torch.eye(4)[None].repeat(3, 1, 1)
    states[1] = states[1, [1, 0, 3, 2]] * 5.0  # length plays no part
    available = torch.ones(3, 4, dtype=torch.bool)
    available[0, 0] = available[2, 3] = False
    similarity, parent = links_to_previous(states, available)
    assert similarity.tolist() == [[-1.0] * 4, [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, -1.0]]
    assert parent[1, [0, 2, 3]].tolist() == [1, 3, 2] and parent[2, :3].tolist() == [1, 0, 3]
    assert links_to_previous(states, available, (0, 2))[0].tolist() == [[-1.0] * 4, similarity[1].tolist(), [-1.0] * 4]
    assert (links_to_previous(states, available, (0, 1, 2))[0] == -1).all(), "frames that are all cut off"


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 30])
def test_a_chain_has_one_root(length):
    parent = torch.arange(length).sub(1).clamp(min=0)
    assert roots_of(parent, length).tolist() == [0] * length


def test_a_tree_is_its_sum_over_one_more_than_the_children_of_its_root():
    # 0 <- 1 <- 3, 0 <- 2; 4 by itself; 5 in no tree
    parent, owner = torch.tensor([0, 0, 0, 1, 4, 5]), torch.tensor([0, 0, 0, 0, 1, 2])
    states = torch.tensor([[1.0], [2.0], [4.0], [8.0], [5.0], [9.0]])
    roots = torch.tensor([0, 4])
    assert tree_values(states, parent, owner, roots, used=5).tolist() == [[15 / 3], [5.0]]
    assert tree_values(states, parent, owner, roots, used=5, mean=True).tolist() == [[15 / 4], [5.0]]
