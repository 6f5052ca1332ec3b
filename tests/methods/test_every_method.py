"""Every registered method on every tiny model that it can act on, with every kind of input that the model takes.

Methods come from the registry and models from the compatibility table; a method added later is tested by itself.
"""

import dataclasses
import functools
import itertools

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, accelerate, detach, record, resolve
from accelerate_methods.registry import method_class
from accelerate_methods.registry.compatibility import FAMILIES, why_not
from accelerate_methods.stages.budget import BudgetedMethod
from accelerate_methods.stages.sample import outside_of_models
from llava.mm_utils import get_anyres_image_grid_shape
from tests.conftest import CHECKPOINTS
from tests.support.configured import SHARING, configured

V15, V16, OV, VIDEO = "tiny-llava-1.5", "tiny-llava-1.6", "tiny-llava-onevision", "tiny-llava-video"
FAMILY = {
    model: next(f for f in FAMILIES if f.name == name)
    for model, name in ((V15, "LLaVA-1.5"), (V16, "LLaVA-NeXT"), (OV, "LLaVA-OneVision"), (VIDEO, "LLaVA-Video"))
}
IMAGE = -200
RATIO = 0.3


# -- what is asked -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Item:
    """An image of a size (width, height), None for a single view; or a video of some frames."""

    kind: str = "image"
    frames: int = 1
    size: tuple[int, int] | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Question:
    ids: tuple[int, ...]
    items: tuple[Item, ...] = ()

    @property
    def text(self):
        return sum(i != IMAGE for i in self.ids)

    @property
    def kinds(self):
        return {item.kind for item in self.items}


ONE, TWO = (5, IMAGE, 7, 8), (5, IMAGE, 6, 9, IMAGE, 7)
TEXT = Question((5, 6, 7, 8, 9))
SINGLE, OTHER = Item(), Item(seed=1)
# of few tokens, since most of their tiles is padding that is cut away; the square one has four tiles
WIDE, TALL, SQUARE = Item(size=(640, 90)), Item(size=(120, 600), seed=1), Item(size=(390, 400), seed=2)
PLAIN = Item(size=(150, 140), seed=2)  # two tiles beside the whole image

TILE = Item(size=(384, 100), seed=4)  # one tile beside the whole image


def video(frames, seed=3):
    return Item("video", frames, seed=seed)


IMAGES = {"image": Question(ONE, (SINGLE,)), "two images": Question(TWO, (SINGLE, OTHER))}
ANYRES = {
    "wide image": Question(ONE, (WIDE,)), "tall image": Question(ONE, (TALL,)),
    "square image": Question(ONE, (SQUARE,)), "two anyres images": Question(TWO, (WIDE, TALL)),
}  # fmt: skip
VIDEOS = {
    **{f"video of {n}": Question(ONE, (video(n),)) for n in (1, 2, 5, 8)},
    "two videos": Question(TWO, (video(3), video(2, 4))),
    "image and video": Question(TWO, (SINGLE, video(3))),
}
QUESTIONS = {
    V15: IMAGES,
    V16: {"image": IMAGES["image"], **ANYRES},
    OV: {
        "image": IMAGES["image"],
        "wide image": ANYRES["wide image"],
        "two anyres images": Question(TWO, (TILE, TALL)),
        **VIDEOS,
    },
    VIDEO: {**IMAGES, "square image": Question(ONE, (TILE,)), **VIDEOS},
}
#: one question per model that every method of its row acts on
MAIN = {V15: "image", V16: "wide image", OV: "image and video", VIDEO: "image and video"}
BATCH = {
    V15: [TEXT, IMAGES["image"], IMAGES["two images"], Question((IMAGE, 9), (OTHER,))],
    V16: [ANYRES["tall image"], TEXT, Question((6, 7, 8, 9, IMAGE, 5), (OTHER,)), Question((IMAGE, 9), (PLAIN,))],
    OV: [Question((IMAGE, 9), (video(1),)), VIDEOS["image and video"], TEXT, Question((5, 6, IMAGE, 7, 8, 9), (TILE,)),
         Question(ONE, (video(2, 5),))],
    VIDEO: [TEXT, VIDEOS["two videos"], Question((IMAGE, 9), (OTHER,)), VIDEOS["image and video"]],
}  # fmt: skip


@functools.cache
def pixels(views, side, seed):
    return torch.randn(views, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.5


def inputs(model, *questions, left=False):
    """Arguments of ``generate`` and ``forward`` for a batch of questions, padded if need be."""
    side = model.get_vision_tower().image_size
    longest = max(len(q.ids) for q in questions)
    rows, mask, images, sizes = [], [], [], []
    for question in questions:
        pad = longest - len(question.ids)
        rows.append([*[0] * pad, *question.ids] if left else [*question.ids, *[0] * pad])
        mask.append([0] * pad + [1] * len(question.ids) if left else [1] * len(question.ids) + [0] * pad)
        for item in question.items:
            views = item.frames
            if item.size is not None:
                across, down = get_anyres_image_grid_shape(item.size, model.config.image_grid_pinpoints, side)
                views = 1 + across * down
            images.append(pixels(views, side, item.seed))
            sizes.append(item.size or (side, side))
    out = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask) if len(rows) > 1 else None}
    if images:
        modalities = [item.kind for question in questions for item in question.items]
        out |= {"images": images, "modalities": modalities, "image_sizes": sizes}
    return out


def answer(model, *questions, **kwargs):
    """Greedy ids [B, 3] and their logits [B, 3, V]."""
    out = model.generate(
        **inputs(model, *questions, **kwargs), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def equal(one, two):
    return torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def assert_close(one, two, tolerance):
    torch.testing.assert_close(one[1], two[1], atol=tolerance, rtol=tolerance)
    assert torch.equal(one[0], two[0])


# -- models and what they answer without a method ----------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def variant():
    """variant(name, dtype, attention): a tiny model loaded once."""
    from llava.model.builder import load_pretrained_model

    @functools.cache
    def load(name, dtype="float32", attention="sdpa"):
        return load_pretrained_model(
            str(CHECKPOINTS / name), device_map="cpu", torch_dtype=dtype, attn_implementation=attention
        )[1]

    return load


@pytest.fixture
def model(name, variant):
    model = variant(name)
    yield model
    detach(model)


@pytest.fixture(scope="module")
def dense():
    """dense(model, question): ids, logits and record of the model alone."""

    @functools.cache
    def run(model, question):
        with accelerate(model, None), record() as requests:
            return *answer(model, question), requests[0]

    return run


NAMES = accelerate_methods.available()
PAIRS = [(m, n) for n in FAMILY for m in NAMES if why_not(method_class(m), FAMILY[n]) is None]
each_pair = pytest.mark.parametrize(("method", "name"), PAIRS)


def small(method, name):
    """A short question that the method acts on."""
    return QUESTIONS[name]["image" if "image" in method_class(method).modalities else "video of 2"]


def test_every_method_and_model_is_covered():
    elsewhere = {m for m in NAMES if "patch_pixels" in method_class(m).signals}  # of transformers' models: tests/hosts
    assert {m for m, _ in PAIRS} == set(NAMES) - elsewhere and {n for _, n in PAIRS} == set(FAMILY)


# -- one request -------------------------------------------------------------------------------------------------------


def check_records(method, request, plain, questions, ratio=RATIO):
    """What the record says agrees with itself, with the uncompressed model's and with the budget."""
    assert len(request.samples) == len(questions)
    stages = set(method.stages)
    for row, (sample, before, question) in enumerate(zip(request.samples, plain, questions, strict=True)):
        assert sample.dense_length == before.length
        lengths = request.layer_lengths(row)
        at_once = "prefill" in stages and 0 in method.prefill_layers(len(lengths))  # before the first layer
        assert lengths[0] == sample.length or (at_once and lengths[0] < sample.length)
        assert all(a >= b for a, b in itertools.pairwise(lengths))
        assert sample.length == question.text + sum(len(i.positions) for i in sample.items)
        alive, newlines, special, allowed, doubles = torch.zeros(len(lengths), dtype=torch.long), 0, 0, 0, 0
        for item, original, asked in zip(sample.items, before.items, question.items, strict=True):
            rows, owner = len(item.positions), item.owner
            assert item.modality == asked.kind
            assert item.tokens_before == original.tokens_before == original.tokens_after
            doubled = rows - len(item.positions.unique())  # tokens that stand where another one does
            assert doubled == 0 or method.name in SHARING
            assert owner.dtype == torch.long and owner.min() >= -1 and owner.max() < rows
            held = owner[item.kept]
            assert item.kept.shape == owner.shape and (held >= 0).all(), "what stays is held"
            assert len(held.unique()) == len(held), "a row stands in one place"
            assert len(held) <= len(owner[owner >= 0].unique()) <= len(held) + doubled
            extra = item.tokens_after - len(held) - doubled  # of no patch: the CLS token of each view, fused ones
            assert extra in (0, owner.shape[0])
            if "compress" in stages and item.modality in method.modalities:
                if isinstance(method, BudgetedMethod):
                    assert item.tokens_after <= max(1, int(ratio * item.tokens_before))
            elif not {"sample", "encode"} & stages:
                assert item.kept.all() and item.tokens_after == item.tokens_before
            # inside the language model
            assert item.num_layers == len(lengths) and item.left_at.shape == owner.shape
            assert torch.equal(item.left_at > 0, owner >= 0) and item.left_at.max() <= len(lengths)
            if item.modality not in method.modalities or "prefill" not in stages:
                assert torch.equal(item.left_at, (owner >= 0) * len(lengths)), "nothing is dropped in the LLM"
            alive += torch.stack([alive_rows(item, layer) for layer in range(len(lengths))])
            newlines, special, doubles = newlines + rows - item.tokens_after, special + extra, doubles + doubled
            if item.modality in method.modalities:
                # rounded, and at least one, in each view or frame
                allowed += ratio * max(owner.numel(), len(original.positions)) + owner.shape[0]
            else:
                allowed += item.tokens_after
        if "retention_ratio" in method.parameters() and "sample" not in stages:
            assert alive[-1] + special <= allowed
        for length, rows in zip(lengths, alive.tolist(), strict=True):
            assert 0 <= length - question.text - rows - special <= newlines + doubles


def assert_same_tokens(item, same):
    for part in ("owner", "kept", "positions", "left_at"):
        assert torch.equal(getattr(item, part), getattr(same, part)), part
    assert item.tokens_after == same.tokens_after


def alive_rows(item, layer):
    """Rows of an item that hold tokens and get into a decoder layer."""
    there = item.left_at > layer
    if item.merged_at is not None:
        there &= item.merged_at > layer
    return torch.tensor(len(item.owner[there].unique()))


CASES = [
    pytest.param(m, n, q, id=f"{m}-{n.removeprefix('tiny-')}-{q}") for m, n in PAIRS for q in QUESTIONS[n]
]  # fmt: skip


@pytest.mark.share(4, each=("method", "name"))
@pytest.mark.parametrize(("method", "name", "question"), CASES)
def test_request(method, name, question, model, dense):
    twice = question not in ("video of 5", "video of 8", "two videos", "two anyres images", "two images")
    method, question = configured(method, RATIO), QUESTIONS[name][question]
    ids, logits, plain = dense(model, question)
    before = [image.clone() for image in inputs(model, question)["images"]]
    with accelerate(model, method), record() as requests:
        state = torch.get_rng_state()
        first = answer(model, question)
        whole = model(**inputs(model, question)).logits if twice else None
        assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    assert all(map(torch.equal, before, inputs(model, question)["images"])), "the input was changed"
    assert first[0].shape == ids.shape and first[1].shape == logits.shape and first[1].dtype == logits.dtype
    assert torch.isfinite(first[1]).all()
    check_records(method, requests[0], plain.samples, [question])
    if twice:
        assert torch.isfinite(whole).all()
        torch.testing.assert_close(whole[:, -1], first[1][:, 0], atol=1e-4, rtol=1e-4)
        for item, same in zip(requests[0].samples[0].items, requests[1].samples[0].items, strict=True):
            assert_same_tokens(item, same)
    if not question.kinds & method.modalities:
        assert equal(first, (ids, logits)), "the method does not act on this"
    else:
        sample = requests[0].samples[0]
        fewer = requests[0].layer_lengths(0)[-1] < plain.samples[0].length
        free = "retention_ratio" in method.parameters() and not outside_of_models(method)
        assert fewer or not free, "nothing was dropped"
        assert sample.visual_tokens_before == plain.samples[0].visual_tokens_before


@pytest.mark.share(2, each=("method",))
@each_pair
def test_text_alone(method, name, model, dense):
    ids, logits, _ = dense(model, TEXT)
    with accelerate(model, configured(method)), record() as requests:
        got = answer(model, TEXT)
        forward = model(**inputs(model, TEXT)).logits
    assert equal(got, (ids, logits)) and requests[0].samples[0].items == []
    assert torch.equal(forward, model(**inputs(model, TEXT)).logits)


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize(
    ("method", "name"), [(m, n) for m, n in PAIRS if "retention_ratio" in method_class(m).parameters()]
)
def test_full_budget_is_the_uncompressed_model(method, name, model, dense):
    wanted = ("image", "wide image", "square image", "video of 1", "image and video")
    for question in (QUESTIONS[name][label] for label in wanted if label in QUESTIONS[name]):
        ids, logits, plain = dense(model, question)
        with accelerate(model, configured(method, 1.0)), record() as requests:
            assert_close(answer(model, question), (ids, logits), 1e-5)
        sample = requests[0].samples[0]
        assert requests[0].layer_lengths(0) == plain.layer_lengths(0)
        assert sample.visual_tokens_after == sample.visual_tokens_before
        assert all(item.kept.all() and (item.left_at == item.num_layers).all() for item in sample.items)


# -- several requests --------------------------------------------------------------------------------------------------


@pytest.mark.share(2, each=("method",))
@each_pair
def test_batch_equals_each_alone(method, name, model, dense):
    method, questions = configured(method, RATIO), BATCH[name]
    with accelerate(model, method), record() as requests:
        together = answer(model, *questions)
        alone = [answer(model, question) for question in questions]
        if name == V15:  # padding of the input itself has nothing to do with the model
            assert_close(answer(model, *questions, left=True), together, 1e-4)
    for row, one in enumerate(alone):
        assert_close((together[0][row], together[1][row]), (one[0][0], one[1][0]), 1e-4)
        assert requests[0].layer_lengths(row) == requests[1 + row].layer_lengths(0)
        for item, same in zip(requests[0].samples[row].items, requests[1 + row].samples[0].items, strict=True):
            assert_same_tokens(item, same)
    check_records(method, requests[0], [dense(model, q)[2].samples[0] for q in questions], questions)


@pytest.mark.share(2, each=("method",))
@each_pair
def test_second_turn_is_a_fresh_request(method, name, model):
    """The harness sends the whole conversation again: nothing of the first turn may live on."""
    question = small(method, name)
    with accelerate(model, configured(method, RATIO)):
        said = answer(model, question)[0]
    longer = dataclasses.replace(question, ids=(*question.ids, *said[0].tolist(), 9, 11))
    with accelerate(model, configured(method, RATIO)):
        fresh = answer(model, longer)
    with accelerate(model, configured(method, RATIO)):
        first = answer(model, question)
        assert torch.equal(first[0], said)
        assert equal(answer(model, longer), fresh)
        assert equal(answer(model, question), first)


# -- nothing is left behind --------------------------------------------------------------------------------------------


def fingerprint(model):
    """Everything about a model object that attaching could change."""
    modules = [
        (name, id(module), type(module), sorted(module.__dict__), vars(type(module)).get("forward"),
         len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]  # fmt: skip
    tower = model.get_vision_tower()
    implementations = [
        m.config._attn_implementation for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")
    ]
    return {
        "modules": modules,
        "state": {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()},
        "config": dict(model.config.__dict__),
        "tower": dict(tower.hub_config.__dict__),
        "implementations": implementations,
        "generation": model.generation_config.to_dict(),
    }


@pytest.mark.share(2, each=("method",))
@each_pair
def test_nothing_is_left_on_the_model(method, name, model):
    question = small(method, name)
    before, answers, keys = fingerprint(model), answer(model, question), list(model.state_dict())
    whole, state = model(**inputs(model, question)).logits, torch.get_rng_state()
    with accelerate(model, configured(method, RATIO)):
        assert list(model.state_dict()) == keys
        answer(model, question)
        during = fingerprint(model)
        assert all(during[part] == before[part] for part in ("state", "config", "tower", "implementations"))
    assert fingerprint(model) == before and "acceleration" not in model.__dict__
    assert equal(answer(model, question), answers)
    assert torch.equal(model(**inputs(model, question)).logits, whole)
    assert torch.equal(state, torch.get_rng_state()), "attaching used the global random state"


@pytest.mark.share(2, each=("method",))
@each_pair
def test_nesting(method, name, model):
    question = small(method, name)
    plain = answer(model, question)
    outer = accelerate(model, configured(method, RATIO))
    alone = answer(model, question)
    inner = accelerate(model, "uniform", retention_ratio=0.5)
    uniform = answer(model, question)
    with pytest.raises(MethodError, match="later"):
        outer.detach()
    innermost = accelerate(model, None)
    assert equal(answer(model, question), plain), "only the last one attached acts"
    innermost.detach()
    assert equal(answer(model, question), uniform)
    inner.detach()
    assert equal(answer(model, question), alone)
    outer.detach()
    assert "acceleration" not in model.__dict__


# -- dtypes and attention implementations ------------------------------------------------------------------------------


@pytest.mark.share(2, each=("method",))
@each_pair
def test_bfloat16(method, name, variant, dense):
    model, method, question = variant(name, "bfloat16"), configured(method, RATIO), QUESTIONS[name][MAIN[name]]
    with accelerate(model, method), record() as requests:
        ids, logits = answer(model, question)
    assert ids.shape == (1, 3) and torch.isfinite(logits).all()
    assert model.dtype == model(**inputs(model, small(method.name, name))).logits.dtype == torch.bfloat16
    check_records(method, requests[0], dense(model, question)[2].samples, [question])


@pytest.mark.share(2, each=("method",))
@each_pair
def test_eager_attention_keeps_the_same_tokens(method, name, model, variant):
    question, eager, answers, records = QUESTIONS[name][MAIN[name]], variant(name, "float32", "eager"), [], []
    for one, kind in ((model, "sdpa"), (eager, "eager")):
        assert one.config._attn_implementation == kind
        with accelerate(one, configured(method, RATIO)), record() as requests:
            answers.append(answer(one, question))
            assert one.config._attn_implementation == kind
        assert one.config._attn_implementation == kind
        records.append(requests[0])
    assert_close(*answers, 1e-4)
    assert records[0].layer_lengths(0) == records[1].layer_lengths(0)
    for item, same in zip(records[0].samples[0].items, records[1].samples[0].items, strict=True):
        assert_same_tokens(item, same)


# -- compositions ------------------------------------------------------------------------------------------------------

#: (first, second) methods; the second cuts inside the language model
COMPOSED = {
    "visionzip+fastv": ({"method": "visionzip", "retention_ratio": 0.4}, {"method": "fastv"}),
    "fastervlm+fastv": ({"method": "fastervlm", "retention_ratio": 0.4}, {"method": "fastv"}),
    "fastvid+fastv": ({"method": "fastvid", "retention_ratio": 0.4}, {"method": "fastv"}),
    "prunevid+fastv": ({"method": "prunevid", "selection": False}, {"method": "fastv"}),
    "dycoke+fastv": ({"method": "dycoke", "threshold": 2.0}, {"method": "fastv"}),
    "dycoke+prunevid": (
        {"method": "dycoke", "dp": False}, {"method": "prunevid", "merging": False, "selected_layer": 2}
    ),
    "uniform+random_prefill": ({"method": "uniform", "retention_ratio": 0.5}, {"method": "random_prefill"}),
    "visionzip+dart": ({"method": "visionzip", "retention_ratio": 0.4}, {"method": "dart", "retention_ratio": 0.5}),
    "downsample+fastv": ({"method": "downsample", "retention_ratio": 0.5}, {"method": "fastv"}),
}  # fmt: skip


def second_keeps(second, sample):
    """Rows of a sample that the second method leaves of what the first one has left."""
    rows, contents = [len(i.positions) for i in sample.items], [i.tokens_after for i in sample.items]
    if second.name == "fastv":  # of all visual rows together
        return round(sum(rows) * (1 - second.r))
    if second.name == "dart":
        return max(1, round(sum(rows) * second.retention_ratio))
    if second.name == "random_prefill":  # of all visual tokens together; newlines stay
        return max(1, int(sum(contents) * second.retention_ratio)) + sum(rows) - sum(contents)
    assert second.name == "prunevid"  # of each video; images and newlines stay
    kept = [int(n * second.alpha) if i.modality == "video" else n for i, n in zip(sample.items, contents, strict=True)]
    return sum(kept) + sum(rows) - sum(contents)


@pytest.mark.parametrize(
    ("composed", "name"),
    [(c, n) for c, specs in COMPOSED.items() for n in FAMILY
     if not any(why_not(method_class(spec["method"]), FAMILY[n]) for spec in specs)],
)  # fmt: skip
def test_composition(composed, name, model, dense):
    pipeline = resolve(list(COMPOSED[composed]))
    first, second = pipeline.methods
    assert pipeline.name == composed
    questions = BATCH[name][:3]
    with accelerate(model, first), record() as before:
        for question in questions:
            answer(model, question)
    with accelerate(model, pipeline), record() as requests:
        alone = [answer(model, question) for question in questions]
        together = answer(model, *questions)
    (cut,) = second.prefill_layers(6)
    for row, question in enumerate(questions):
        assert_close((together[0][row], together[1][row]), (alone[row][0][0], alone[row][1][0]), 1e-4)
        lengths = requests[row].layer_lengths(0)
        assert lengths == requests[-1].layer_lengths(row)
        if not question.items:
            assert equal(alone[row], dense(model, question)[:2]) and lengths == [question.text] * 6
            continue
        sample, left = requests[row].samples[0], before[row].samples[0]
        assert [i.tokens_after for i in sample.items] == [i.tokens_after for i in left.items]
        assert sample.length == left.length == lengths[0]
        after = question.text + second_keeps(second, left)
        assert lengths == [sample.length] * cut + [after] * (6 - cut)
        for item, earlier in zip(sample.items, left.items, strict=True):
            for part in ("owner", "kept", "positions"):
                assert torch.equal(getattr(item, part), getattr(earlier, part)), "the first stage acts as alone"
            assert set(item.left_at[item.owner >= 0].tolist()) <= {cut, 6}, "the second stage drops at its layer"
        alive = sum(int(alive_rows(item, 5)) for item in sample.items)
        held = sum(int(alive_rows(item, 0)) for item in sample.items)
        spare = sum(len(item.positions) for item in sample.items) - held  # newlines, and tokens of no patch
        assert question.text + alive <= after <= question.text + alive + spare
    assert equal(answer(model, questions[0]), dense(model, questions[0])[:2])


@pytest.mark.parametrize("k", range(6))
def test_decode_method_with_a_cut_at_any_layer(k, variant):
    """DyCoke hides keys from layer l=3 on. FastV may cut anywhere but right between layers l-1 and l."""
    model, question = variant(OV), VIDEOS["video of 5"]
    spec = [{"method": "dycoke", "threshold": 2.0}, {"method": "fastv", "k": k}]
    with accelerate(model, spec), record() as requests:
        if k == 3:
            with pytest.raises(MethodError, match="across the layer"):
                answer(model, question)
            return
        got = answer(model, question)
    with accelerate(model, [{"method": "dycoke", "dp": False}, {"method": "fastv", "k": k}]), record() as other:
        without = answer(model, question)
    torch.testing.assert_close(got[1][:, 0], without[1][:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[1][:, 1], without[1][:, 1], atol=1e-4), "keys are hidden from the first step on"
    assert requests[0].layer_lengths(0) == other[0].layer_lengths(0)


# -- images that the checkpoint shrinks --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in NAMES if "image" in method_class(m).modalities and (m, OV) in PAIRS])
def test_image_at_the_token_limit(method, tiny):
    """Its tokens are mixtures of patches, so there is no patch that each of them was."""
    model, question = tiny(OV, image_aspect_ratio="anyres_max_2"), Question(ONE, (Item(size=(760, 700)),))
    with record() as requests:
        plain = answer(model, question)
        with accelerate(model, configured(method, RATIO)):
            assert torch.isfinite(answer(model, question)[1]).all()
    assert requests[0].samples[0].visual_tokens_before < 5 * 729 / 1.5
    if method != "downsample":  # a smaller image is shrunk less
        check_records(configured(method, RATIO), requests[1], requests[0].samples, [question])
    if "retention_ratio" in method_class(method).parameters():
        with accelerate(model, configured(method, 1.0)):
            assert_close(answer(model, question), plain, 1e-5)
