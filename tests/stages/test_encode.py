"""The contract of the encode stage."""

import dataclasses

import pytest
import torch

from accelerate_methods.stages.contract import check_merge
from accelerate_methods.stages.encode import Merge, PatchMap, TokenMap
from accelerate_methods.stages.errors import MethodError

HIDDEN = torch.zeros(2, 5, 3)
INDEX = torch.arange(5).expand(2, -1)
GOOD = Merge(HIDDEN[:, :3], torch.tensor([[0, 1, 2, 1, -1]] * 2), torch.tensor([[0, 1, 2]] * 2))


def test_a_merge_that_fits():
    check_merge("mine", GOOD, HIDDEN, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": HIDDEN[:1, :3]}, "hidden must be float32"),
        ({"hidden": HIDDEN[:, :3].half()}, "hidden must be float32"),
        ({"hidden": torch.zeros(2, 6, 3)}, "1 < T' <= 5"),
        ({"hidden": HIDDEN[:, :1]}, "1 < T' <= 5"),
        ({"owner": torch.full((2, 5), 3)}, "owner holds 3"),
        ({"owner": torch.zeros(2, 4, dtype=torch.long)}, r"owner must be integers \[2, 5\]"),
        ({"source": torch.tensor([[0, 1, 5]] * 2)}, "source holds 5"),
        ({"source": torch.tensor([[1, 0, 2]] * 2)}, "1 special tokens must stay in front"),
        ({"sizes": torch.ones(2, 4)}, r"sizes must be \[2, 3\]"),
    ],
)
def test_one_that_does_not_is_refused(change, says):
    with pytest.raises(MethodError, match=rf"mine\.encode: .*{says}"):
        check_merge("mine", dataclasses.replace(GOOD, **change), HIDDEN, 1)
    with pytest.raises(MethodError, match="must return Merge"):
        check_merge("mine", HIDDEN, HIDDEN, 1)


def test_where_patches_are():
    tokens = TokenMap(torch.tensor([[1, 1, -1, 0]]), torch.tensor([[3, -1]]))
    assert tokens.first_patch().tolist() == [[3, 0]] and tokens.places().tolist() == [[3, 0]]
    two = TokenMap(tokens.owner.expand(2, -1), tokens.stands.expand(2, -1))
    patches = PatchMap.of(two, (2, 2))
    assert patches.owner.tolist() == [[1, 1, -1, 0], [3, 3, -1, 2]], "counted through all views"
    assert patches.stands.tolist() == [[False, False, False, True]] * 2, "a new token stands nowhere"
