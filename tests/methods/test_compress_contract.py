"""What every method with a compress stage must keep to, whichever it is. New methods are picked up by themselves."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import accelerate_methods
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.recording import ItemRecord, RequestRecord, SampleRecord
from accelerate_methods.engine.sequences import assemble, assemble_views, uncompressed
from accelerate_methods.hosts.layouts import flat_item, image_item, video_item
from accelerate_methods.registry import method_class
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.budget import BudgetedMethod
from accelerate_methods.stages.compress import CompressMethod, VisualItem
from accelerate_methods.stages.decode import DecodeMethod
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from accelerate_methods.stages.prefill import PrefillMethod, VisualSpan
from accelerate_methods.stages.signals import SIGNALS
from accelerate_methods.stages.views import ViewCompressMethod, Views
from tests.support.configured import configured, variants

pytestmark = pytest.mark.usefixtures("one_thread")
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


def each_variant(*stages):
    return pytest.mark.parametrize(
        ("name", "params"),
        [pytest.param(n, p, id=",".join([n, *(f"{k}={v}" for k, v in p.items())])) for n, p in variants(*stages)],
    )


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


# -- views of images, before the projector -----------------------------------------------------------------------------

ANYRES = type("Config", (), {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"})


def make_views(tiles, side, special, kind, dtype, seed):
    """The views of an image and its layout in the language model (of one channel, as a method before it gets it)."""
    generator = torch.Generator().manual_seed(seed)
    across, down = tiles or (0, 0)
    shape = (1 + across * down, side * side)
    features = features_of(kind, (*shape, WIDTH), generator).to(dtype)
    views = Views(
        features=features,
        grid=(side, side),
        special=features_of(kind, (shape[0], 1, WIDTH), generator).to(dtype) if special else None,
        tiles=tiles,
        signals={
            name: features_of(kind, (*shape, 8) if name == "key_states" else shape, generator).to(dtype)
            for name in ("cls_attention", "received_attention", "key_states")
        },
    )
    newline = torch.randn(1, generator=generator).to(dtype)
    config = type("Config", (ANYRES,), {"image_grid_pinpoints": [[across * side, down * side]]})
    size = (max(1, across * side - 1), max(1, down * side)) if tiles else None
    return views, image_item(features[..., :1], newline, size, side, config)


view_items = st.builds(
    make_views,
    tiles=st.sampled_from([None, (2, 1), (1, 3), (2, 2)]),
    side=st.sampled_from([2, 3, 5]),
    special=st.booleans(),
    kind=st.sampled_from(FEATURES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 5),
)


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
    alone = (shares == 1) & (patch >= 0)
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


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(method_class(n), ViewCompressMethod)])
@examples
@given(image=view_items)
def test_full_budget_leaves_the_views_alone(name, image):
    if "retention_ratio" in method_class(name).parameters():
        assert configured(name, 1.0).compress_views(image[0]) is None


# -- inside the language model -----------------------------------------------------------------------------------------

LAYERS = 4


@functools.cache
def decoder(dtype=torch.float32):
    """A tiny random decoder, GQA 4 heads on 2."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        return Qwen2ForCausalLM(config).eval().to(dtype)


@dataclasses.dataclass
class Prompts:
    """Prompts of different length and content, padded on the left."""

    samples: list[list[tuple[str, int, bool]]]  # items: modality, visual tokens, whether a newline follows
    lengths: list[int]
    embeds: list[torch.Tensor]

    @property
    def layout(self):
        longest = max(self.lengths)
        visual = torch.zeros(len(self.samples), longest, dtype=torch.bool)
        spans = []
        for row, (items, length) in enumerate(zip(self.samples, self.lengths, strict=True)):
            start, here = longest - length + 1, []
            for modality, tokens, newline in items:
                here.append(VisualSpan(start, tokens + newline, modality, tokens))
                visual[row, start : start + tokens] = True
                start += tokens + newline + 1
            spans.append(here)
        return PromptLayout(visual, [*self.lengths], spans)

    @property
    def inputs(self):
        longest = max(self.lengths)
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in self.lengths])
        return {
            "inputs_embeds": torch.stack(
                [torch.nn.functional.pad(e, (0, 0, longest - len(e), 0)) for e in self.embeds]
            ),
            "attention_mask": mask if longest > min(self.lengths) else None,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "layout": self.layout,
        }

    def sample(self, row):
        return Prompts(self.samples[row : row + 1], self.lengths[row : row + 1], self.embeds[row : row + 1])

    def record(self):
        """A request whose items are uncompressed."""
        request = RequestRecord()
        for spans in self.layout.spans:
            request.samples.append(SampleRecord(items=[
                ItemRecord(
                    modality=s.modality, tokens_before=s.num_content, tokens_after=s.num_content, start=s.start,
                    owner=torch.arange(s.num_content)[None], positions=torch.arange(s.length),
                    kept=torch.ones(1, s.num_content, dtype=torch.bool),
                )
                for s in spans
            ]))  # fmt: skip
        request.started(LAYERS)
        return request


def make_prompts(samples, tail, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + sum(n + newline + 1 for _, n, newline in items) + tail for items in samples]
    return Prompts(samples, lengths, [features_of(kind, (n, 32), generator) for n in lengths])


prompts = st.builds(
    make_prompts,
    samples=st.lists(
        st.lists(st.tuples(st.sampled_from(["image", "video"]), st.integers(1, 12), st.booleans()), max_size=3),
        min_size=1,
        max_size=3,
    ),
    tail=st.integers(1, 3),
    kind=st.sampled_from(["random", "ties"]),
    seed=st.integers(0, 5),
)
some = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


def in_llm(name, ratio, params, stage):
    """A pipeline of one method, where its stage is on."""
    method = configured(name, ratio, **params)
    return Pipeline((method,)) if stage in method.stages else None


@each_variant(PrefillMethod)
@some
@given(asked=prompts, ratio=ratios)
def test_prefill_stage(name, params, asked, ratio):
    pipeline = in_llm(name, ratio, params, "prefill")
    if pipeline is None:
        return
    method, model, layout, inputs = pipeline.prefill, decoder(), asked.layout, asked.inputs
    given_embeds, given_visual, given_spans = inputs["inputs_embeds"].clone(), layout.visual.clone(), layout.spans
    request, state, cache = asked.record(), torch.get_rng_state(), DynamicCache(config=model.config)
    with torch.no_grad():
        out = run_decoder(model.model, pipeline, **inputs, request=request, past_key_values=cache, use_cache=True)
        again = run_decoder(model.model, pipeline, **inputs)
        alone = [run_decoder(model.model, pipeline, **asked.sample(row).inputs) for row in range(len(asked.samples))]
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    assert torch.equal(inputs["inputs_embeds"], given_embeds) and inputs["layout"].spans == given_spans
    assert torch.equal(inputs["layout"].visual, given_visual), "the input was changed"
    assert torch.isfinite(out.last_hidden_state).all()
    assert torch.equal(again.last_hidden_state, out.last_hidden_state)
    longest = max(asked.lengths)
    kept = torch.arange(longest).expand(len(asked.samples), -1) if out.kept is None else out.kept
    real = torch.arange(longest) >= longest - torch.tensor(asked.lengths)[:, None]
    valid = real if out.kept is None else torch.ones_like(kept).bool() if out.kept_valid is None else out.kept_valid
    own = layout.only(method.modalities)
    for row, single in enumerate(alone):
        rows = kept[row][valid[row]]
        assert (rows.diff() > 0).all() and real[row][rows].all(), "ascending, and no padding"
        left = torch.zeros(longest, dtype=torch.bool).index_fill(0, rows, True)
        block = own.blocks()[row]
        assert left[real[row] & ~block].all(), "text and other modalities stay"
        visual = int((left & block).sum())
        if "retention_ratio" in method.parameters() and int(block.sum()):
            assert visual <= max(1, int(block.sum() * ratio + 0.5)) + int((block & ~layout.visual[row]).sum())
        # the same as alone
        own_rows = torch.arange(asked.lengths[row]) if single.kept is None else single.kept[0]
        assert torch.equal(rows - (longest - asked.lengths[row]), own_rows)
        torch.testing.assert_close(
            out.last_hidden_state[row][valid[row]], single.last_hidden_state[0], atol=2e-5, rtol=2e-5
        )
        # the record
        (layer,) = method.prefill_layers(LAYERS)
        lengths = request.layer_lengths(row)
        assert lengths[:layer] == [asked.lengths[row]] * layer
        assert lengths[layer:] == [len(rows)] * (LAYERS - layer)
        for item, span in zip(request.samples[row].items, layout.spans[row], strict=True):
            here = left[span.start : span.start + span.num_content]
            assert torch.equal(item.left_at[0], torch.where(here, LAYERS, layer))
    with torch.no_grad():
        assert_decodes(model, pipeline, inputs, cache, len(asked.samples))


def assert_decodes(model, pipeline, inputs, cache, batch, steps=2):
    """Decode steps on top of a prompt, whose layers each cache one key more in every step."""
    lengths = [cache.get_seq_length(i) for i in range(LAYERS)]
    mask = inputs["attention_mask"]
    for step in range(1, steps + 1):
        mask = None if mask is None else torch.cat([mask, mask.new_ones(batch, 1)], 1)
        new = torch.randn(batch, 1, 32, generator=torch.Generator().manual_seed(step))
        out = run_decoder(model.model, pipeline, inputs_embeds=new, attention_mask=mask, past_key_values=cache)
        assert torch.isfinite(out.last_hidden_state).all()
        assert [cache.get_seq_length(i) for i in range(LAYERS)] == [n + step for n in lengths], "the cache stays whole"


@each_variant(PrefillMethod)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill_stage_in_half_precision(name, params, dtype):
    pipeline = in_llm(name, 0.3, params, "prefill")
    if pipeline is None:
        return
    asked = make_prompts([[("video", 12, True)], [], [("image", 3, False), ("video", 5, True)]], 2, "random", 0)
    asked.embeds = [e.to(dtype) for e in asked.embeds]
    with torch.no_grad():
        out = run_decoder(decoder(dtype).model, pipeline, **asked.inputs)
    assert out.last_hidden_state.dtype == dtype and torch.isfinite(out.last_hidden_state).all()
    assert out.kept.shape[1] < max(asked.lengths)


@each_variant(PrefillMethod, DecodeMethod)
@some
@given(asked=prompts)
def test_stages_in_the_llm_leave_the_rest_alone(name, params, asked):
    """Text, and modalities that are not the method's own, run as without it: the prompt and the decode steps."""
    method = configured(name, 0.3, **params)
    pipeline, model, inputs = Pipeline((method,)), decoder(), asked.inputs
    inputs["layout"] = inputs["layout"].only(frozenset({"image", "video"}) - method.modalities)
    with torch.no_grad():
        mine, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
        out = run_decoder(model.model, pipeline, **inputs, past_key_values=mine)
        dense = run_decoder(model.model, Pipeline(), **inputs, past_key_values=plain)
        assert out.kept is None and torch.equal(out.last_hidden_state, dense.last_hidden_state)
        mask = inputs["attention_mask"]
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        new = torch.randn(len(asked.samples), 1, 32, generator=torch.Generator().manual_seed(1))
        steps = [
            run_decoder(model.model, p, inputs_embeds=new, attention_mask=mask, past_key_values=c).last_hidden_state
            for p, c in ((pipeline, mine), (Pipeline(), plain))
        ]
    assert torch.equal(*steps)


@each_variant(DecodeMethod)
@some
@given(asked=prompts)
def test_decode_stage(name, params, asked):
    pipeline = in_llm(name, 0.3, params, "decode")
    if pipeline is None:
        return
    method, model, batch = pipeline.decode, decoder(), len(asked.samples)
    cls, original, seen = type(method), type(method).decode, []

    def look(self, step):
        visual = step.visual.clone()
        keep = original(self, step)
        assert torch.equal(step.visual, visual), "the input was changed"
        seen.append((visual, step.valid, keep))
        return keep

    def run(asked, steps=3):
        seen.clear()
        inputs, out = asked.inputs, []
        cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
        run_decoder(model.model, pipeline, **inputs, past_key_values=cache)
        for step in range(steps):
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            new = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(step)).expand(
                len(asked.samples), -1, -1
            )
            out.append(
                run_decoder(model.model, pipeline, inputs_embeds=new, attention_mask=mask, past_key_values=cache)
            )
        assert [cache.get_seq_length(i) for i in range(LAYERS)] == [max(asked.lengths) + steps] * LAYERS
        return torch.cat([o.last_hidden_state for o in out], 1), [*seen]

    state = torch.get_rng_state()
    with torch.no_grad(), mock.patch.object(cls, "decode", look):
        together, steps = run(asked)
        again, same = run(asked)
        alone = [run(asked.sample(row)) for row in range(batch)]
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    assert torch.isfinite(together).all() and torch.equal(together, again)
    own = asked.layout.only(method.modalities).visual
    acts = method.decode_layer(LAYERS) < LAYERS and own.any()
    assert len(steps) == len(same) == (3 if acts else 0)
    for number, (visual, _, keep) in enumerate(steps):
        assert visual.shape == (batch, max(asked.lengths) + number + 1)
        assert torch.equal(visual[:, : own.shape[1]], own) and not visual[:, own.shape[1] :].any()
        if keep is None:
            continue
        assert keep.shape == visual.shape and keep.dtype == torch.bool
        assert not (~keep & ~visual).any(), "only visual keys can be hidden"
        if same[number][2] is not None:
            assert torch.equal(keep, same[number][2])
        for row, (_, looks) in enumerate(alone):
            hidden = int((~keep[row]).sum())
            assert hidden == (0 if not looks or looks[number][2] is None else int((~looks[number][2]).sum()))
    for row, (one, _) in enumerate(alone):
        torch.testing.assert_close(together[row], one[0], atol=2e-5, rtol=2e-5)


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
