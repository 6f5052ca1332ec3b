"""What every method that acts on the views of an image must keep to, whichever it is."""

import pytest
import torch
from hypothesis import given

import accelerate_methods
from accelerate_methods.engine.sequences import assemble_views
from accelerate_methods.registry import method_class
from accelerate_methods.stages.compress import ViewCompressMethod
from tests.support.configured import OVERLAPPING, configured
from tests.support.items import WIDTH, each_variant, examples, ratios, view_items

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [n for n in accelerate_methods.available() if issubclass(method_class(n), ViewCompressMethod)]


@each_variant(ViewCompressMethod)
@examples
@given(image=view_items, ratio=ratios)
def test_views(name, params, image, ratio):
    method, (views, item) = configured(name, ratio, **params), image
    count, patches = views.num_views, views.tokens_per_view
    before = {k: v.clone() for k, v in {"features": views.features, "special": views.special, **views.signals}.items()
              if v is not None}  # fmt: skip
    state = torch.get_rng_state()
    compressed = method.compress_views(views)
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    after = {"features": views.features, "special": views.special, **views.signals}
    assert all(torch.equal(value, after[k]) for k, value in before.items()), "the input was changed"
    if compressed is None:  # left as it is
        return

    # form
    tokens, view, patch = compressed.tokens, compressed.view, compressed.patch
    kept = tokens.shape[0]
    assert tokens.shape == (kept, WIDTH) and view.shape == patch.shape == compressed.section.shape == (kept,)
    assert tokens.dtype == views.features.dtype and torch.isfinite(tokens).all()
    assert 1 <= kept < count * patches + count, "a method that drops nothing leaves the image alone"
    if "retention_ratio" in method.parameters() and method.retention_ratio is not None:
        assert kept <= count * max(1, int(patches * ratio + 0.5))
    assert ((view >= 0) & (view < count) & (patch >= -1) & (patch < patches)).all()
    assert (view.diff() >= 0).all() and torch.bincount(view, minlength=count).min() >= 1, "view after view"
    assert len(torch.bincount(view).unique()) == 1, "each view keeps the same number"
    assert views.special is not None or (patch >= 0).all()
    places = (view * patches + patch)[patch >= 0]
    assert len(places.unique()) == len(places), "one token per place"
    assert compressed.newlines in ("none", "single", "checkpoint") and compressed.section.min() >= 0
    assert compressed.newlines != "checkpoint" or compressed.section.max() == 0

    # provenance
    owner = compressed.owner
    assert owner.shape == (count, patches) and owner.dtype == torch.long and -1 <= owner.min() <= owner.max() < kept
    standing = (patch >= 0).nonzero().flatten()
    assert torch.equal(owner.flatten()[places], standing), "a token that stays is held by itself"
    held = owner >= 0
    assert torch.equal(view[owner[held]], held.nonzero()[:, 0]), "nothing moves from view to view"
    shares = torch.bincount(owner[held], minlength=kept)
    alone = (shares == 1) & (patch >= 0) & (name not in OVERLAPPING)
    source = views.features.flatten(0, 1)[(view * patches + patch)[alone]]
    assert torch.equal(tokens[alone], source), "what nothing was merged into is unchanged"
    assert torch.equal(tokens[patch < 0], views.special[view[patch < 0], 0] if (patch < 0).any() else tokens[:0])

    # in reading order
    sequence = assemble_views(item, views, compressed, lambda rows: rows[:, :1])
    content = sequence.is_content
    assert sequence.num_content == int(content.sum()) <= kept and sequence.length == item.length
    assert (sequence.positions.diff() > 0).all()
    assert -1 <= sequence.owner.min() <= sequence.owner.max() < len(sequence.positions)
    assert content[sequence.owner[sequence.owner >= 0]].all()
    assert sequence.stands.shape == sequence.owner.shape and (sequence.owner[sequence.stands] >= 0).all()
    if compressed.newlines == "checkpoint":
        assert int((~content).sum()) == len(item.newlines)
        assert torch.equal(sequence.owner >= 0, sequence.stands)
        at = sequence.owner[sequence.stands]
        assert torch.equal(sequence.tokens[at], item.features[sequence.stands])
    else:
        assert sequence.num_content == kept
        assert int((~content).sum()) == (compressed.newlines == "single" and count == 1)
        assert torch.equal(sequence.owner >= 0, owner >= 0)
        assert torch.equal(sequence.tokens[sequence.owner[held], 0], tokens[owner[held], 0])
        if views.tiles is not None:  # the base view, then the rest of the sections one after the other
            base = (view == 0).sum()
            assert torch.equal(sequence.tokens[:base, 0], tokens[:base, 0])

    # again, the same
    again = method.compress_views(views)
    assert torch.equal(again.tokens, tokens) and torch.equal(again.owner, owner) and torch.equal(again.patch, patch)


@pytest.mark.parametrize("name", NAMES)
@examples
@given(image=view_items)
def test_full_budget_leaves_the_views_alone(name, image):
    if "retention_ratio" in method_class(name).parameters():
        assert configured(name, 1.0).compress_views(image[0]) is None
