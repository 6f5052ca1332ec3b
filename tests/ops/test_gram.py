"""Inner products of a set's rows with each other, half of them computed."""

import pytest
import torch

from accelerate_methods.ops.gram import BLOCK, QUICK_BLOCK, gram


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2 * BLOCK + 7), (torch.bfloat16, QUICK_BLOCK + 3)])
def test_all_products(dtype, size):
    states = torch.randint(-4, 5, (2, size, 6), generator=torch.Generator().manual_seed(0)).to(dtype)  # exact sums
    found = gram(states)
    assert found.dtype == dtype and torch.equal(found, states @ states.mT)
    assert torch.equal(gram(states[0]), found[0]) and torch.equal(gram(states[:, :5]), found[:, :5, :5])
