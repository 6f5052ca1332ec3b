"""What a new method may give back from its stages: everything else is told to its author, in terms of the contract."""

import dataclasses

import pytest
import torch

from accelerate_methods import CompressMethod, DecodeMethod, MethodError, PrefillMethod, accelerate
from accelerate_methods.engine.sequences import compressed_sequence
from accelerate_methods.stages.compress import Compressed, VisualItem, selection
from accelerate_methods.stages.prefill import Selection
from tests.support.native_models import tree_model
from tests.support.paths import CHECKPOINTS

ITEM = VisualItem("video", torch.randn(2, 5, 4), torch.arange(10).view(2, 5), 10)
GOOD = selection(ITEM, torch.tensor([1, 7]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Returns(CompressMethod):
    """Gives back whatever it was made with."""

    name = "returns"
    value: object = None

    def compress(self, item):
        return self.value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefills(PrefillMethod):
    """The same between the layers: the value is made of the step."""

    name = "prefills"
    make: object = None

    def prefill_layers(self, num_layers):
        return (1,)

    def prefill(self, step):
        return self.make(step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decodes(DecodeMethod):
    """The same in decode steps."""

    name = "decodes"
    make: object = None

    def decode_layer(self, num_layers):
        return 1

    def decode(self, step):
        return self.make(step)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (torch.ones(10, dtype=torch.bool), r"kept must be integers \[10\] .*of a mask: .*got bool \[10\]"),
        (torch.tensor([[1, 2]]), r"kept must be integers \[1\].*got int64 \[1, 2\]"),
        (torch.tensor([1.0]), r"got float32 \[1\]"),
        ([1, 2], "got list"),
        (None, "got None"),
        (torch.tensor([3, -1]), "kept holds -1; .* are counted from 0 to 9"),
        (torch.tensor([3, 10]), "kept holds 10; .* are counted from 0 to 9"),
        (torch.tensor([3, 4, 3]), "kept names a token twice"),
    ],
)
def test_selection_of_a_compress_method(kept, says):
    with pytest.raises(MethodError, match=says):
        selection(ITEM, kept)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, r"must return Compressed \(for a plain selection: selection\(item, indices\)\), got None"),
        (ITEM.features[0], r"got float32 \[5, 4\]"),
        (dataclasses.replace(GOOD, tokens=GOOD.tokens[:, :3]), r"tokens must be floating point \[K, 4\], got float32"),
        (dataclasses.replace(GOOD, tokens=GOOD.tokens.long()), r"tokens must be floating point .*got int64"),
        (dataclasses.replace(GOOD, positions=torch.tensor([1])), r"positions must be integers \[2\].*got int64 \[1\]"),
        (dataclasses.replace(GOOD, positions=torch.tensor([1, 10])), "positions holds 10; rows of the item's layout"),
        (dataclasses.replace(GOOD, owner=GOOD.owner.flatten()), r"owner must be integers \[2, 5\].*got int64 \[10\]"),
        (dataclasses.replace(GOOD, owner=GOOD.owner + 1), "owner holds 2; output tokens"),
        (Compressed(None, None, None), "tokens must be floating point .*got None"),
        (dataclasses.replace(GOOD, order="any"), r"order 'any' is none of 'layout', 'given'"),
        (dataclasses.replace(GOOD, newlines="some"), "newlines 'some' is none of 'closing'"),
        (selection(ITEM, torch.zeros(0, dtype=torch.long)), "nothing is left of the video; at least one token"),
    ],
)
def test_what_compress_gives_back(value, says):
    with pytest.raises(MethodError, match=says):
        compressed_sequence(ITEM, Returns(value=value), lambda tokens: tokens)
    assert compressed_sequence(ITEM, Returns(value=GOOD), lambda tokens: tokens).num_content == 2


def ask(method):
    model = tree_model("tiny-llava-1.5")
    pixels = torch.zeros(1, 3, 336, 336)
    with torch.no_grad(), accelerate(model, method):
        return model.generate(torch.tensor([[5, -200, 7, 8]]), images=pixels, max_new_tokens=3, min_new_tokens=3)


def rows(*values):
    return lambda step: Selection(torch.tensor([values]))


@pytest.mark.skipif(not CHECKPOINTS.is_dir(), reason="needs the tiny checkpoints")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda step: step.visual, r"must return Selection .*Selection.from_mask\(mask\)\), got bool \[1, 579\]"),
        (lambda step: Selection(step.visual), r"indices must be integers \[1, 579\].*got bool"),
        (rows(0, 579), "indices holds 579; rows of the layer are counted from 0 to 578"),
        (rows(-1, 3), "indices holds -1"),
        (rows(3, 3, 578), "indices must rise from row to row, each only once"),
        (rows(5, 3, 578), "indices must rise from row to row"),
        (lambda step: Selection(torch.tensor([[0, 578]]), valid=torch.ones(2)), r"valid must be a bool"),
        (lambda step: Selection(torch.tensor([0, 578])), r"indices must be integers \[1, 1\].*got int64 \[2\]"),
    ],
)
def test_what_prefill_gives_back(make, says):
    with pytest.raises(MethodError, match=says):
        ask(Prefills(make=make))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda step: step.visual[:, :-1], r"decodes.decode must return a bool mask \[1, \d+\].*got bool \[1, \d+\]"),
        (lambda step: step.visual.float(), "got float32"),
        (lambda step: torch.tensor([0, 1]), r"got int64 \[2\]"),
        (lambda step: [0, 1], "got list"),
    ],
)
def test_what_decode_gives_back(make, says):
    with pytest.raises(MethodError, match=says):
        ask(Decodes(make=make))


def test_what_is_right_goes_through():
    assert ask(Prefills(make=lambda step: None)).shape == ask(Decodes(make=lambda step: None)).shape
    ask(Prefills(make=lambda step: Selection.from_mask(~step.visual)))
    ask(Decodes(make=lambda step: ~step.visual))
