"""transformers' LLaVA classes and this project's tree give the same answers with the same weights, under every method.

Methods come from the registry and families from the compatibility table; a method added later is tested by itself.
"""

import inspect
import itertools
import random

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from accelerate_methods import MethodError, accelerate, available, detach, record, resolve
from accelerate_methods.hosts.native.family import Seen
from accelerate_methods.hosts.native.host import family_class
from accelerate_methods.registry import method_class
from accelerate_methods.stages.sample import outside_of_models
from tests.methods import test_every_method as tree_side
from tests.methods.test_every_method import FAMILY, IMAGE, OV, TEXT, TILE, V15, V16, Question, why_not
from tests.support import native_questions as asking
from tests.support.configured import configured, variants
from tests.support.native_models import tree_model
from tests.support.native_questions import BATCH, MAIN, QUESTIONS, answer, native

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
NAMES = (V15, V16, OV)
RATIO = 0.3


def acts_before_encoding(method):
    return "sample" in method_class(method).class_stages()


PAIRS = [
    (method, name)
    for name in NAMES
    for method in (None, *available())
    if method is None or (why_not(method_class(method), FAMILY[name]) is None and not acts_before_encoding(method))
]
each_pair = pytest.mark.parametrize(("method", "name"), PAIRS)
COMBINED = [
    *(("visionzip+fastv", name) for name in NAMES),
    *(("fastvid+fastv", OV), ("dycoke+fastv", OV), ("fastervlm+fastv", V16), ("uniform+fastv", V15)),
]


@pytest.fixture
def models(name):
    """(tree, native) with the same weights; nothing may be left on either."""
    both = tree_model(name), native(name)
    yield both
    left = [m for m in both if "acceleration" in m.__dict__]
    for model in both:
        detach(model)
    assert not left


def built(method, **params):
    """A pipeline; None and names joined by "+" too."""
    if method is None:
        return None
    if "+" not in method:
        return configured(method, RATIO, **params)
    parts = method.split("+")
    if parts == ["dycoke", "fastv"]:  # both cut in the decoder; DyCoke without its decode stage
        return resolve([configured("dycoke", RATIO, dp=False), configured("fastv", RATIO)])
    return resolve([configured(part, RATIO) for part in parts])


def assert_same(got, expected, tolerance=1e-5):
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=tolerance, rtol=tolerance)


def assert_same_record(request, expected):
    """What the native host records is what the tree records."""
    assert len(request.samples) == len(expected.samples)
    for row, (sample, wanted) in enumerate(zip(request.samples, expected.samples, strict=True)):
        assert (sample.dense_length, sample.length) == (wanted.dense_length, wanted.length)
        assert request.layer_lengths(row) == expected.layer_lengths(row)
        for item, other in zip(sample.items, wanted.items, strict=True):
            assert (item.modality, item.tokens_before, item.grid) == (other.modality, other.tokens_before, other.grid)
            tree_side.assert_same_tokens(item, other)
    assert request.decode_steps == expected.decode_steps
    assert set(request.stage_ms) == set(expected.stage_ms)


def compare(models, method, name, question):
    tree, model = models
    with accelerate(tree, method), record() as expected:
        wanted = tree_side.answer(tree, question)
        whole = tree(**tree_side.inputs(tree, question)).logits
    with accelerate(model, method) as attached, record() as got:
        given = answer(model, asking.inputs(name, question))
        logits = model(**asking.inputs(name, question)).logits
    assert_same(given, wanted)
    assert logits.shape == whole.shape, "as many rows are left"
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    assert len(got) == len(expected) == 2
    for asked, other in zip(got, expected, strict=True):
        assert_same_record(asked, other)
    return attached


CASES = [pytest.param(m, n, q, id=f"{m}-{n.removeprefix('tiny-')}-{q}") for m, n in PAIRS for q in QUESTIONS[n]]


@pytest.mark.share(3, each=("method", "name"))
@pytest.mark.parametrize(("method", "name", "question"), CASES)
def test_same_as_the_tree(method, name, question, models):
    compare(models, built(method), name, QUESTIONS[name][question])


@pytest.mark.share(3, each=("method", "params"))
@pytest.mark.parametrize(
    ("method", "params", "name"),
    [(m, p, n) for m, p in variants() for n in NAMES if p and (m, n) in PAIRS],
)
def test_variants_are_the_same_as_in_the_tree(method, params, name, models):
    compare(models, built(method, **params), name, QUESTIONS[name][MAIN[name]])


@pytest.mark.parametrize(("method", "name"), COMBINED)
def test_combinations_are_the_same_as_in_the_tree(method, name, models):
    compare(models, built(method), name, QUESTIONS[name][MAIN[name]])


def test_adaptations_are_the_same_as_in_the_tree():
    for method, name in PAIRS:
        if method is not None:
            adaptations = []
            for model in (tree_model(name), native(name)):
                with accelerate(model, built(method)) as attached:
                    adaptations.append(attached.adaptations)
            assert adaptations[0] == adaptations[1], (method, name)


def test_every_method_is_covered():
    before = [m for m in available() if acts_before_encoding(m)]
    elsewhere = {"pixelprune"}  # looks at pixels, which none of these shows
    assert {m for m, _ in PAIRS} == {None, *available()} - set(before) - elsewhere
    for method, name in itertools.product(available(), NAMES):
        outside = name == OV and outside_of_models(method_class(method))  # chooses frames, where videos are read
        if (method, name) not in PAIRS and not outside:
            with pytest.raises(MethodError, match=f"{method} (needs|cannot act on|acts at the sample stage)"):
                accelerate(native(name), built(method))
            assert "acceleration" not in native(name).__dict__


@pytest.mark.parametrize("name", NAMES)
def test_a_full_budget_is_the_uncompressed_model(name, models):
    model, question = models[1], QUESTIONS[name][MAIN[name]]
    asked = asking.inputs(name, question)
    plain = answer(model, asked), model(**asked).logits
    for method in available():
        if (method, name) in PAIRS and "retention_ratio" in method_class(method).parameters():
            with accelerate(model, configured(method, 1.0)), record() as requests:
                assert_same(answer(model, asked), plain[0], 1e-4)
            sample = requests[0].samples[0]
            assert sample.visual_tokens_after == sample.visual_tokens_before
            assert set(requests[0].layer_lengths(0)) == {sample.dense_length}
            assert torch.equal(model(**asked).logits, plain[1]), "restored"


# -- sizes of images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [V16, OV])
def test_an_image_of_any_size_is_laid_out_as_transformers_does(name):
    """Rows, newlines and shrinking, also where float arithmetic puts a whole number of cells below itself."""
    model = native(name)
    family = family_class(model)(model)
    side = model.config.vision_config.image_size
    cells = side // model.config.vision_config.patch_size
    rng = random.Random(5)
    sizes = [(352, 836), (836, 352), *((rng.randint(20, 1500), rng.randint(20, 1500)) for _ in range(40))]
    newline = torch.tensor([-1.0])
    for width, height in sizes:
        views = image_size_to_num_patches((height, width), model.config.image_grid_pinpoints, side)
        numbers = torch.arange(views * cells * cells, dtype=torch.float32).view(views, -1, 1)
        more = {"vision_aspect_ratio": model.config.vision_aspect_ratio} if name == OV else {}
        more |= {"vision_feature_select_strategy": "default"} if name == V16 else {}
        (expected,), _ = model.model.pack_image_features([numbers], [(height, width)], image_newline=newline, **more)
        seen = Seen({"image_sizes": torch.tensor([[height, width]])})
        ((count, item, _),) = family._image_layouts(seen, numbers)
        assert (count, item.length) == (views, len(expected)), (width, height)
        rows = expected[:, 0]
        assert (rows[item.newline_positions] == -1).all() and (rows[item.positions] >= 0).all()
        if item.source is not None:
            assert torch.equal(rows[item.positions[0]].long(), item.source), (width, height)


# -- several prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.share(2, each=("method",))
@each_pair
def test_a_batch_is_each_prompt_alone(method, name, models):
    """Left padding in generate, right padding in a forward."""
    tree, model = models
    with accelerate(tree, built(method)), record() as expected:
        alone = [tree_side.answer(tree, question) for question in BATCH[name]]
    right = asking.inputs(name, *BATCH[name], left=False)
    with accelerate(model, built(method)), record() as got:
        ids, logits = answer(model, asking.inputs(name, *BATCH[name]))
        out = model(**right)
    for row, (wanted, asked) in enumerate(zip(expected, alone, strict=True)):
        assert_same((ids[row], logits[row]), (asked[0][0], asked[1][0]), 1e-4)
        for request in got:
            assert request.layer_lengths(row) == wanted.layer_lengths(0)
            for item, other in zip(request.samples[row].items, wanted.samples[0].items, strict=True):
                tree_side.assert_same_tokens(item, other)
        last = wanted.layer_lengths(0)[-1] - 1  # padding stays on the caller's side
        torch.testing.assert_close(out.logits[row, last], asked[1][0, 0], atol=1e-4, rtol=1e-4)


@each_pair
def test_text_alone(method, name, models):
    model = models[1]
    asked = asking.inputs(name, TEXT)
    plain = answer(model, asked), model(**asked).logits
    with accelerate(model, built(method)), record() as requests:
        got, logits = answer(model, asked), model(**asked).logits
    assert_same(got, plain[0], 1e-6)
    torch.testing.assert_close(logits, plain[1], atol=1e-6, rtol=1e-6)
    assert len(requests) == 2 and requests[0].samples[0].items == []
    assert requests[0].samples[0].length == len(TEXT.ids) and requests[0].decode_steps == 2


# -- ways of generating ------------------------------------------------------------------------------------------------

WAYS = {
    "beams": {"num_beams": 2},
    "several answers": {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5},
    "sampling": {"do_sample": True, "top_k": 50, "temperature": 0.8, "max_new_tokens": 6},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("method", "name"),
    [(None, V15), ("fastv", V15), ("visionzip", V15), ("visionzip", V16), ("visionzip+fastv", V16), ("fastvid", OV),
     ("dycoke", OV), ("prunevid", OV), ("fastv", OV)],
)  # fmt: skip
def test_ways_of_generating(method, name, way, models):
    tree, model = models
    question = QUESTIONS[name][MAIN[name]]
    if name == V15 and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        question = QUESTIONS[name]["image"]  # older transformers repeat images for beams as A, A, B, B
    arguments = {**asking.GREEDY, **WAYS[way]}
    torch.manual_seed(7)
    with accelerate(tree, built(method)):
        expected = tree.generate(**tree_side.inputs(tree, question), **arguments)
    torch.manual_seed(7)
    asked = asking.inputs(name, question)
    with accelerate(model, built(method)):
        got = model.generate(**asked, **arguments)[:, asked["input_ids"].shape[1] :]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("method", "name"), [(None, V15), ("visionzip", V15), ("fastv", V16), ("fastvid", OV), ("dycoke", OV)]
)
def test_without_a_cache_every_step_is_a_fresh_prompt(method, name, models):
    model = models[1]
    asked = asking.inputs(name, QUESTIONS[name][MAIN[name]])
    length = asked["input_ids"].shape[1]
    with accelerate(model, built(method)):
        got = model.generate(**asked, **asking.GREEDY, use_cache=False)
        said = dict(asked)
        for _ in range(3):
            new = model(**said, use_cache=False).logits[:, -1:].argmax(-1)
            said["input_ids"] = torch.cat([said["input_ids"], new], 1)
            said["attention_mask"] = torch.ones_like(said["input_ids"])
    assert torch.equal(got[:, length:], said["input_ids"][:, length:])


@pytest.mark.parametrize(("method", "name"), [("visionzip", V15), ("fastv", V16), ("fastvid+fastv", OV)])
def test_beams_of_a_batch(method, name, models):
    """Beams of padded prompts of different length find what each prompt's own beams find."""
    model = models[1]
    questions = [BATCH[name][1], BATCH[name][0]]
    arguments = {**asking.GREEDY, "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}
    with accelerate(model, built(method)):
        asked = asking.inputs(name, *questions)
        together = model.generate(**asked, **arguments)[:, asked["input_ids"].shape[1] :]
        for row, question in enumerate(questions):
            asked = asking.inputs(name, question)
            alone = model.generate(**asked, **arguments)[:, asked["input_ids"].shape[1] :]
            assert torch.equal(together[2 * row : 2 * row + 2], alone)


# -- losses ------------------------------------------------------------------------------------------------------------


@each_pair
def test_labels(method, name, models):
    tree, model = models
    question = Question((5, IMAGE, 6, 9, 11, 7), QUESTIONS[name][MAIN[name]].items[:1])
    asked, inputs = tree_side.inputs(tree, question), asking.inputs(name, question)
    text = inputs["input_ids"] < asking.IMAGE_TOKEN
    with accelerate(tree, built(method)):
        expected = tree(**asked, labels=asked["input_ids"].masked_fill(asked["input_ids"] < 0, -100)).loss
    with accelerate(model, built(method)):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(~text, -100)).loss
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_labels_of_a_batch(left):
    name, model = V16, native(V16)
    questions = [Question((5, IMAGE, 6, 9), (TILE,)), Question((5, 6, IMAGE, 9, 11, 12), (TILE,))]

    def loss(*those):
        asked = asking.inputs(name, *those, left=left)
        ignored = (asked["attention_mask"] == 0) | (asked["input_ids"] >= asking.IMAGE_TOKEN)
        return model(**asked, labels=asked["input_ids"].masked_fill(ignored, -100)).loss

    for method in ("visionzip", "fastv"):
        with accelerate(model, built(method)):
            # targets: 2 and 4 texts (the first token has none before it)
            counts = torch.tensor([2.0, 4.0])
            alone = torch.stack([loss(question) for question in questions])
            torch.testing.assert_close(loss(*questions), (alone * counts).sum() / counts.sum(), atol=1e-5, rtol=1e-5)
