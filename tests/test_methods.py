"""What every method with a compress stage must keep to, whichever it is. New methods are picked up by themselves."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods.base import SIGNALS, CompressMethod
from accelerate_methods.budget import BudgetedMethod
from accelerate_methods.errors import MethodError, UnknownNameError
from accelerate_methods.items import VisualItem, assemble, uncompressed
from accelerate_methods.registry import method_class
from llava.model.layout import flat_item, image_item, video_item

WIDTH = 16
NAMES = [n for n in accelerate_methods.available() if issubclass(method_class(n), CompressMethod)]
LAYOUTS = ("one_token", "grid", "frame", "no_token", "flat video", "flat", "anyres")
FEATURES = ("random", "constant", "zero", "ties", "large")


def features_of(kind, shape, generator):
    if kind == "constant":
        return torch.full(shape, 0.5)
    if kind == "zero":
        return torch.zeros(shape)
    values = torch.randn(shape, generator=generator)
    return values.sign() if kind == "ties" else values * 30 if kind == "large" else values


def make_item(layout, frames, side, kind, dtype, seed):
    """An item with every signal there is, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    newline = torch.randn(WIDTH, generator=generator).to(dtype)
    if layout == "anyres":
        config = type("Config", (), {
            "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[2 * side, 2 * side]],
        })  # fmt: skip
        views = features_of(kind, (5, side * side, WIDTH), generator).to(dtype)
        item = image_item(views, newline, (2 * side, 2 * side - 1), side, config)
    elif layout == "flat":
        item = flat_item(features_of(kind, (1, side * side, WIDTH), generator).to(dtype), side * side)
    else:
        pooled = features_of(kind, (frames, side * side, WIDTH), generator).to(dtype)
        merge = "flat" if layout == "flat video" else "spatial_unpad"
        item = video_item(pooled, newline, "one_token" if merge == "flat" else layout, merge)
    count, per_frame = item.num_frames, item.tokens_per_frame
    shapes = {"frame_features": (count, 8), "key_states": (count, per_frame, 8), "text_embeddings": (5, WIDTH)}
    item.signals = {
        name: features_of(kind, shapes.get(name, (count, per_frame)), generator).to(dtype) for name in SIGNALS
    }
    for name in ("pooling_attention", "cls_attention", "received_attention"):
        item.signals[name] = item.signals[name].float().softmax(-1).to(dtype)
    return item


items = st.builds(
    make_item,
    layout=st.sampled_from(LAYOUTS),
    frames=st.sampled_from([1, 2, 3, 7, 8]),
    side=st.sampled_from([1, 2, 3, 5]),
    kind=st.sampled_from(FEATURES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)
ratios = st.sampled_from([1e-6, 0.01, 0.1, 0.25, 0.37, 0.5, 0.9, 0.99])
each_method = pytest.mark.parametrize("name", NAMES)
examples = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def with_budget(name, ratio):
    """The method at a ratio, or with its defaults if it has no free budget."""
    free = "retention_ratio" in method_class(name).parameters()
    return accelerate_methods.get(name, **({"retention_ratio": ratio} if free else {}))


def acts_on(method, item):
    return item.modality in method.modalities


@each_method
@examples
@given(item=items, ratio=ratios)
def test_contract(name, item, ratio):
    method = with_budget(name, ratio)
    if not acts_on(method, item):
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
    ordered = sequence.positions if compressed.order == "layout" else sequence.positions.sort().values
    assert (ordered.diff() > 0).all() and ordered[0] >= 0
    assert ordered[-1] < sequence.length == item.length
    content = torch.isin(compressed.positions, item.positions)
    assert content.all(), "tokens stand where content tokens stood"
    if item.newline_positions is not None:
        newlines = sequence.positions[~sequence.is_content]
        assert torch.isin(newlines, item.newline_positions).all()
        closed = set(item.newline_of[compressed.positions].tolist()) - {-1}
        everything = item.keep_all_newlines or compressed.newlines == "all"
        expected = len(item.newline_positions) if everything else len(closed)
        assert len(newlines) == (1 if compressed.newlines == "last" else expected)

    # provenance
    assert sequence.owner.shape == item.positions.shape and sequence.owner.dtype == torch.long
    assert sequence.owner.min() >= -1 and sequence.owner.max() < len(sequence.positions)
    held = sequence.owner[sequence.owner >= 0]
    assert sequence.is_content[held].all()
    flat, own = item.positions.flatten(), sequence.owner.flatten()
    stays = torch.isin(flat, compressed.positions)
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
    alone = shares == 1
    source = item.dense()[compressed.positions]
    assert torch.equal(compressed.tokens[alone], source[alone])


@pytest.mark.parametrize("name", accelerate_methods.available())
def test_description_of_every_method(name):
    cls = method_class(name)
    assert cls.name == name and cls.title and cls.paper and cls.__doc__
    assert cls.__dataclass_params__.frozen
    assert cls.signals <= set(SIGNALS) and cls.modalities <= {"image", "video"}
    assert cls.positions in ("original", "compact")
    needed = {"retention_ratio": 0.5} if issubclass(cls, BudgetedMethod) else {}
    method = accelerate_methods.get(name, **needed)
    assert method.stages and method == accelerate_methods.resolve(method.to_dict()).methods[0]
    assert hash(method) is not None
    for field in dataclasses.fields(method):
        assert field.name in cls.parameters()
    with pytest.raises(UnknownNameError):
        accelerate_methods.get(name, no_such_parameter=1)
    if "retention_ratio" in cls.parameters():
        for wrong in (0.0, -0.1, 1.5, float("nan"), "half", True):
            with pytest.raises(MethodError):
                accelerate_methods.get(name, retention_ratio=wrong)


# -- FastVID beyond the golden vectors ---------------------------------------------------------------------------------

VARIANTS = ("onevision", "llava_video", "qwen2_5_vl")


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=80, deadline=None)
@given(
    frames=st.integers(1, 12),
    side=st.sampled_from([1, 2, 4, 6]),
    ratio=st.sampled_from([0.001, 0.05, 0.1, 0.25, 0.5, 0.75, 0.99]),
    c=st.integers(1, 20),
    tau=st.sampled_from([-1.0, 0.0, 0.9, 1.0]),
    d=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    p=st.integers(1, 9),
    beta=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    kind=st.sampled_from(FEATURES),
)
def test_fastvid_never_fails_and_stays_in_budget(variant, frames, side, ratio, c, tau, d, p, beta, kind):
    item = make_item("grid" if variant == "llava_video" else "one_token", frames, side, kind, torch.float32, 3)
    method = accelerate_methods.get(
        "fastvid", variant=variant, retention_ratio=ratio, c=c, tau=tau, d=d, p=p, beta=beta
    )
    compressed = method.compress(item)
    quota = method.frame_budget(side * side)
    kept = compressed.positions.shape[0]
    assert 1 <= kept <= quota * frames and torch.isfinite(compressed.tokens).all()
    if quota < side * side:
        info = compressed.info
        assert sum(info["segment_sizes"]) == frames and len(info["segment_sizes"]) >= min(c, frames)
        assert sum(info["salient_per_frame"]) + sum(info["context_per_frame"]) == kept
        if variant == "llava_video" and d <= 0.4 and p <= 2 and ratio <= 0.5:
            assert kept == quota * frames


def test_fastvid_variant_follows_the_newlines():
    method = accelerate_methods.get("fastvid")
    for layout, variant in (("grid", "llava_video"), ("one_token", "onevision"), ("no_token", "onevision")):
        item = make_item(layout, 3, 5, "random", torch.float32, 0)
        assert method.compress(item).info["variant"] == variant


def test_fastvid_tie_noise_is_its_own():
    item = make_item("one_token", 8, 5, "random", torch.float32, 0)
    method, state = accelerate_methods.get("fastvid", retention_ratio=0.4, tie_noise=1e-6), torch.get_rng_state()
    first, second = method.compress(item), method.compress(item)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "wrong",
    [
        {"retention_ratio": 0.5, "tokens_per_frame": 3}, {"retention_ratio": None}, {"c": 0}, {"c": 1.5}, {"tau": 2},
        {"d": -0.1}, {"p": 0}, {"beta": 1.1}, {"tie_noise": -1}, {"variant": "qwen"},
    ],
)  # fmt: skip
def test_fastvid_refuses(wrong):
    with pytest.raises(MethodError, match="fastvid"):
        accelerate_methods.get("fastvid", **wrong)


def test_missing_signal_is_named():
    item = dataclasses.replace(make_item("one_token", 8, 5, "random", torch.float32, 0), signals={})
    assert isinstance(item, VisualItem)
    with pytest.raises(MethodError, match="frame_features"):
        accelerate_methods.get("fastvid").compress(item)
