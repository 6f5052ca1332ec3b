"""What every method with a compress stage must keep to, whichever it is. New methods are picked up by themselves."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods.engine.sequences import assemble, uncompressed
from accelerate_methods.registry import method_class
from accelerate_methods.stages.budget import BudgetedMethod
from accelerate_methods.stages.compress import CompressMethod, VisualItem
from accelerate_methods.stages.errors import MethodError
from tests.support.configured import OVERLAPPING, SHARING, configured
from tests.support.items import WIDTH, acts_on, each_variant, examples, items, make_item, ratios, with_budget

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [n for n in accelerate_methods.available() if issubclass(method_class(n), CompressMethod)]
each_method = pytest.mark.parametrize("name", NAMES)


@each_variant(CompressMethod)
@examples
@given(item=items, ratio=ratios)
def test_contract(name, params, item, ratio):
    method = configured(name, ratio, **params)
    if "compress" not in method.stages or not acts_on(method, item):
        return
    before = {k: v.clone() for k, v in {"features": item.features, **item.signals}.items()}
    state = torch.get_rng_state()
    compressed = method.compress(item)
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    assert all(torch.equal(before[k], v) for k, v in {"features": item.features, **item.signals}.items())
    sequence = assemble(item, compressed)

    # form
    kept = compressed.positions.shape[0]
    assert compressed.tokens.shape == (kept, WIDTH) and sequence.num_content == kept
    assert compressed.tokens.dtype == item.features.dtype and compressed.tokens.device == item.features.device
    assert torch.isfinite(compressed.tokens).all()
    assert 1 <= kept <= item.num_tokens
    if isinstance(method, BudgetedMethod):
        assert kept <= method.budget(item)

    # positions
    places = sequence.positions
    if compressed.newlines == "each":  # copies of newlines share their place
        places = places[sequence.is_content]
    ordered = places if compressed.order == "layout" else places.sort().values
    assert (ordered.diff() >= (0 if name in SHARING else 1)).all() and ordered[0] >= 0
    assert ordered[-1] < sequence.length == item.length
    content = torch.isin(compressed.positions, item.positions)
    assert content.all(), "tokens stand where content tokens stood"
    if item.newline_positions is not None:
        newlines = sequence.positions[~sequence.is_content]
        assert torch.isin(newlines, item.newline_positions).all()
        closed = set(item.newline_of[compressed.positions].tolist()) - {-1}
        everything = item.keep_all_newlines or compressed.newlines in ("all", "behind")
        expected = len(item.newline_positions) if everything else len(closed)
        assert len(newlines) == {"last": 1, "each": kept}.get(compressed.newlines, expected)

    # provenance
    assert sequence.owner.shape == item.positions.shape and sequence.owner.dtype == torch.long
    assert sequence.owner.min() >= -1 and sequence.owner.max() < len(sequence.positions)
    held = sequence.owner[sequence.owner >= 0]
    assert sequence.is_content[held].all()
    flat, own = item.positions.flatten(), sequence.owner.flatten()
    stays = torch.isin(flat, compressed.positions)
    assert (own[stays] >= 0).all(), "a token that stays is held"
    if params.get("grid_order") != "as_released":  # that release puts tokens in each other's places
        assert torch.equal(sequence.positions[own[stays]], flat[stays]), "a token that stays is held by itself"

    # again, the same
    again = method.compress(item)
    assert torch.equal(again.tokens, compressed.tokens) and torch.equal(again.positions, compressed.positions)
    assert torch.equal(again.owner, compressed.owner)


@each_method
@examples
@given(item=items, budget=st.sampled_from(["ratio", "frame", "image"]))
def test_full_budget_changes_nothing(name, item, budget):
    parameters = method_class(name).parameters()
    given_as = {
        "ratio": {"retention_ratio": 1.0},
        "frame": {"retention_ratio": None, "tokens_per_frame": 10**6},
        "image": {"retention_ratio": None, "tokens_per_image": 10**6},
    }[budget]
    if not set(given_as) <= set(parameters):
        return
    method = accelerate_methods.get(name, **given_as)
    if acts_on(method, item):
        sequence, dense = assemble(item, method.compress(item)), uncompressed(item)
        assert torch.equal(sequence.tokens, dense.tokens) and torch.equal(sequence.positions, dense.positions)
        assert torch.equal(sequence.is_content, dense.is_content)


@each_method
def test_budget_as_a_count(name):
    if not issubclass(method_class(name), BudgetedMethod):
        pytest.skip("no free budget")
    item = make_item("one_token", 7, 5, "random", torch.float32, 0)
    for unit, limit in (("tokens_per_frame", 7 * 3), ("tokens_per_image", 3)):
        kept = accelerate_methods.get(name, **{unit: 3}).compress(item).positions.shape[0]
        assert limit - 7 < kept <= limit


@each_method
def test_selected_tokens_are_unchanged(name):
    """A token that no other was merged into is the original one, bit for bit."""
    method, item = with_budget(name, 0.3), make_item("one_token", 6, 4, "random", torch.float32, 1)
    compressed = method.compress(item)
    shares = torch.bincount(compressed.owner[compressed.owner >= 0], minlength=len(compressed.positions))
    alone = (shares == 1) & (name not in OVERLAPPING)
    source = item.dense()[compressed.positions]
    assert torch.equal(compressed.tokens[alone], source[alone])


def test_missing_signal_is_named():
    item = dataclasses.replace(make_item("one_token", 8, 5, "random", torch.float32, 0), signals={})
    assert isinstance(item, VisualItem)
    with pytest.raises(MethodError, match="frame_features"):
        accelerate_methods.get("fastvid").compress(item)
