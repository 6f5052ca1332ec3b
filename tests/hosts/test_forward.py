"""What ``forward`` is given and gives back while a method is attached, in the LLaVA tree and in transformers' models.

Rows stand where they stand without a method, the loss is that of the same labels, text alone is left alone, and what a
method cannot do is one clear error.
"""

import copy
import functools

import pytest
import torch

from accelerate_methods import MethodError, accelerate, available, detach, resolve
from accelerate_methods.engine.output_rows import as_the_caller_had_them, on_the_right, shifted, unshifted
from accelerate_methods.engine.prompt import goes_on
from accelerate_methods.registry import method_class
from tests.hosts.native import test_internvl as internvl_side
from tests.hosts.native.test_llava import PAIRS
from tests.methods import test_every_method as tree_side
from tests.methods.test_every_method import IMAGE, OV, PLAIN, TEXT, TILE, V15, V16, Item, Question, video
from tests.support import native_questions as asking
from tests.support import qwen_inputs as qwen_side
from tests.support.configured import configured
from tests.support.native_models import tree_model

pytestmark = pytest.mark.usefixtures("one_thread", "siglip_tower")

HOSTS = ("tree", "native")
NAMES = (V15, V16, OV)
FULL = [(m, n) for m, n in PAIRS if m is not None and "retention_ratio" in method_class(m).parameters()]
FEW = [("fastv", V15), ("visionzip", V15), ("fastv", V16), ("fastvid", OV), ("dycoke", OV), ("prunevid", OV)]

#: samples of unequal length, one of them without anything visual
BATCH = {
    V15: [Question((IMAGE, 9), (Item(seed=1),)), TEXT, asking.IMAGES["two images"]],
    V16: [Question((6, 7, IMAGE, 5), (PLAIN,)), TEXT],
    OV: [Question((IMAGE, 9), (video(2, 5),)), TEXT, Question((5, 6, IMAGE, 7, 8, 9), (TILE,))],
}

each_host = pytest.mark.parametrize("host", HOSTS)


def model_of(host, name):
    return tree_model(name) if host == "tree" else asking.native(name)


@pytest.fixture
def model(host, name):
    model = model_of(host, name)
    yield model
    detach(model)


def inputs(host, name, *questions, left=False):
    """Arguments of ``forward``, with a mask also for a single prompt."""
    if host == "native":
        return asking.inputs(name, *questions, left=left)
    asked = tree_side.inputs(tree_model(name), *questions, left=left)
    return {**asked, "attention_mask": mask_of(asked)}


def mask_of(asked):
    mask = asked["attention_mask"]
    return torch.ones_like(asked["input_ids"]) if mask is None else mask


def real_rows(host, name, asked):
    """[B, L] real rows of the logits without a method."""
    if host == "native" or "images" not in asked:
        return asked["attention_mask"].bool()
    spliced = tree_model(name).prepare_multimodal(
        asked["input_ids"], asked["attention_mask"], None, asked["images"], asked["modalities"], asked["image_sizes"]
    )
    return spliced.mask


@functools.cache
def logits_without_a_method(host, name, left):
    """[B, L, V] of the batch, and [B, L] which rows are real."""
    asked = inputs(host, name, *BATCH[name], left=left)
    return model_of(host, name)(**asked).logits, real_rows(host, name, asked)


def text_batch(left=False):
    rows = [[5, 6, 7, 8, 9], [11, 12, 13]]
    ids = torch.tensor([[*[0] * (5 - len(r)), *r] if left else [*r, *[0] * (5 - len(r))] for r in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def labels_of(asked):
    """Labels of the text behind the first visual token of each sample (of all text but the first in one without)."""
    ids, text = asked["input_ids"], (asked["input_ids"] >= 0) & (asked["input_ids"] < asking.IMAGE_TOKEN)
    mask = asked["attention_mask"].bool()
    behind = ((~text).cumsum(1) > 0) | (text & mask & ((text & mask).cumsum(1) > 1)) & ~(~text).any(1, keepdim=True)
    return ids.masked_fill(~(text & mask & behind), -100)


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.share(4, each=("method",))
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@each_host
@pytest.mark.parametrize(("method", "name"), FULL)
def test_a_full_budget_gives_the_rows_of_the_model(method, name, host, left, model):
    plain, real = logits_without_a_method(host, name, left)
    with accelerate(model, configured(method, 1.0)):
        logits = model(**inputs(host, name, *BATCH[name], left=left)).logits
    assert logits.shape == plain.shape
    torch.testing.assert_close(logits[real], plain[real], atol=1e-5, rtol=1e-5)


@pytest.mark.share(2, each=("method",))
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@each_host
@pytest.mark.parametrize(("method", "name"), FEW)
def test_a_sample_of_a_padded_batch_is_the_sample_alone(method, name, host, left, model):
    """At a real budget the rows that are left follow each other, and padding is on the caller's side."""
    questions = BATCH[name]
    with accelerate(model, configured(method, 0.3)):
        together = model(**inputs(host, name, *questions, left=left)).logits
        for row, question in enumerate(questions):
            alone = model(**inputs(host, name, question)).logits[0]
            # the tree makes the padding of a prompt with images anew, on the side of its config
            mine = together[row, -len(alone) :] if left and host == "native" else together[row, : len(alone)]
            torch.testing.assert_close(mine, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("pads", [(0, 3), (3, 0), (2, 1)], ids=["right", "left", "both"])
@pytest.mark.parametrize("method", ["fastv", "visionzip"])
def test_a_single_prompt_with_padding(method, pads):
    """Padding that no other sample needs (``pad_to_multiple_of``) stays, too."""
    model, asked = asking.native(V15), inputs("native", V15, asking.IMAGES["image"])
    padded = {
        **asked,
        "input_ids": torch.nn.functional.pad(asked["input_ids"], pads, value=0),
        "attention_mask": torch.nn.functional.pad(asked["attention_mask"], pads, value=0),
    }
    real = padded["attention_mask"].bool()
    plain = model(**padded).logits
    with accelerate(model, configured(method, 1.0)):
        full = model(**padded).logits
    assert full.shape == plain.shape
    torch.testing.assert_close(full[real], plain[real], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("method", ["fastv", "visionzip"])
def test_generate_answers_right_padded_prompts_as_left_padded_ones(method):
    """transformers reads the last row, which is padding there; a prompt that is cut has its padding on the left."""
    model = asking.native(V15)
    questions = asking.IMAGES["image"], asking.IMAGES["two images"]
    with accelerate(model, configured(method, 0.3)):
        left, right = (
            model.generate(**(asked := inputs("native", V15, *questions, left=side)), **asking.GREEDY)[
                :, asked["input_ids"].shape[1] :
            ]
            for side in (True, False)
        )
    assert torch.equal(left, right)


@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize(("method", "name"), [("fastv", V15), ("visionzip", V15)])
def test_the_last_rows_are_those_of_all(method, name, ratio, host, model):
    with accelerate(model, configured(method, ratio)):
        for left in (True, False):
            asked = inputs(host, name, *BATCH[name], left=left)
            some, every = (model(**asked, logits_to_keep=n).logits for n in (5, 0))
            torch.testing.assert_close(some, every[:, -5:], atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize(("method", "name"), [("fastv", V15), ("visionzip", V15)])
def test_logits_of_rows_by_number(method, name, host, model):
    """Numbers are those of the caller's rows: right as long as no row was dropped."""
    asked, wanted = inputs(host, name, asking.IMAGES["image"]), torch.tensor([0, 7, 578])
    plain = model(**asked, logits_to_keep=wanted).logits
    with accelerate(model, configured(method, 1.0)):
        torch.testing.assert_close(model(**asked, logits_to_keep=wanted).logits, plain, atol=1e-5, rtol=1e-5)
    with accelerate(model, configured(method, 0.3)):
        with pytest.raises(MethodError, match=f"{method} has dropped rows of the prompt: logits_to_keep"):
            model(**asked, logits_to_keep=wanted)
        text = {"input_ids": torch.tensor([[5, 6, 7]]), "logits_to_keep": torch.tensor([1])}
        assert model(**text).logits.shape[1] == 1


def test_moving_rows():
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    states = torch.arange(8.0).view(2, 4, 1) + 1
    right = on_the_right(left)
    assert right.of_states(states).squeeze(-1).tolist() == [[3, 4, 0, 0], [5, 6, 7, 8]]
    assert right.of_labels(torch.arange(8).view(2, 4)).tolist() == [[2, 3, -100, -100], [4, 5, 6, 7]]
    holes = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, 0]])
    assert as_the_caller_had_them(left, holes).of_states(states).squeeze(-1).tolist() == [
        [0, 3, 0, 4, 0], [5, 6, 7, 8, 0]
    ]  # fmt: skip
    assert as_the_caller_had_them(left, left.long()) is None
    shorter = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])  # a row of each was dropped
    moved = as_the_caller_had_them(left, shorter)
    assert moved.valid.tolist() == [[True, True, False, False], [True] * 4]
    assert as_the_caller_had_them(left, shorter.flip(1)) is None


def test_shifted_labels_and_back():
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, 7, 8]])
    valid = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    behind = shifted(labels, valid, torch.tensor([4, 9]))
    assert behind.tolist() == [[1, 2, 4, -100], [-100, 7, 8, 9]]
    assert unshifted(torch.tensor([[1, 2, 3, 4]])).tolist() == [[-100, 1, 2, 3]]


def test_positions_that_go_on():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert goes_on(None, None) and goes_on(torch.arange(3)[None], mask) and goes_on(torch.arange(5, 8)[None], None)
    assert goes_on(torch.tensor([[1, 0, 1], [0, 1, 1]]), mask)
    assert not goes_on(torch.tensor([[0, 1, 0]]), None) and not goes_on(torch.tensor([[0, 2, 3]]), None)
    assert not goes_on(torch.tensor([[0, 1, 3], [0, 1, 2]]), mask)
    assert goes_on(torch.zeros(3, 1, 4), None), "coordinates"
    assert not goes_on(torch.tensor([[[0, 1, 0]]] * 4), None)


# -- losses ------------------------------------------------------------------------------------------------------------


@each_host
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(("method", "name"), [("fastv", V15), ("visionzip", V15), ("fastvid", OV)])
def test_losses_and_gradients_at_a_full_budget(method, name, left, host, model):
    asked = inputs(host, name, *BATCH[name], left=left)
    labels = labels_of(asked)
    behind = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], 1)
    if left:  # a label behind the last token: only shifted labels can say it
        behind[:, -1] = 17
    ways = {
        "mean": {},
        "sum": {"num_items_in_batch": torch.tensor(40)},
        "shifted": {"shift_labels": behind, "num_items_in_batch": 40},
    }

    def losses():
        return {way: model(**asked, labels=labels, **more).loss for way, more in ways.items()}

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    plain = losses()
    wanted = gradients(plain["sum"])
    with accelerate(model, configured(method, 1.0)):
        got = losses()
        found = gradients(got["sum"])
    for way, loss in plain.items():
        torch.testing.assert_close(got[way], loss, atol=1e-5, rtol=1e-5, msg=way)
    assert plain["sum"] < plain["mean"], "gradient accumulation divides by the number that it was given"
    assert any("projector" in key for key in wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-3, msg=key)


@each_host
@pytest.mark.parametrize(("method", "name"), [(None, V15), ("fastv", V15), ("visionzip", V15), ("dycoke", OV)])
def test_gradient_checkpointing(method, name, host):
    """Layers that run twice: nothing is cached, and the gradients are the same."""
    model = copy.deepcopy(model_of(host, name)).train()
    asked = inputs(host, name, BATCH[name][0])
    labels = labels_of(asked)

    def trained():
        model.zero_grad()
        with accelerate(model, method and configured(method, 0.3)):
            output = model(**asked, labels=labels)
        output.loss.backward()
        return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, wanted = trained()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output, found = trained()
    torch.testing.assert_close(output.loss, plain.loss)
    assert output.past_key_values is None and found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize(("method", "name"), FEW)
def test_losses_at_a_real_budget(method, name, host, model):
    """The loss is that of the rows that are left: a mean, a sum, and by shifted labels the same."""
    questions = [q for q in BATCH[name] if q.items] + [TEXT]
    with accelerate(model, configured(method, 0.3)):
        sums, counts = [], []
        for question in questions:
            asked = inputs(host, name, question)
            labels = labels_of(asked)
            counts.append(int((labels[:, 1:] != -100).sum()))
            sums.append(model(**asked, labels=labels, num_items_in_batch=1).loss)
        total, count = torch.stack(sums).sum(), sum(counts)
        for left in (True, False):
            asked = inputs(host, name, *questions, left=left)
            labels = labels_of(asked)
            behind = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], 1)
            for more, wanted in (
                ({}, total / count),
                ({"num_items_in_batch": torch.tensor(50)}, total / 50),
                ({"shift_labels": behind}, total / count),
            ):
                loss = model(**asked, labels=labels, **more).loss
                torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-4, msg=f"{left} {more}")


@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize(("method", "name"), [("fastv", V15), ("visionzip", V15)])
def test_a_loss_in_every_form_of_output(method, name, host, model):
    asked = inputs(host, name, asking.IMAGES["image"])
    labels = labels_of(asked)
    plain = model(**asked, labels=labels, return_dict=False)
    with accelerate(model, configured(method, 1.0)):
        output, parts = model(**asked, labels=labels), model(**asked, labels=labels, return_dict=False)
    assert output["loss"] is output.loss is output[0] and next(iter(output)) == "loss"
    assert isinstance(parts, tuple) and len(parts) == len(plain)
    torch.testing.assert_close(parts[0], plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[1], plain[1], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("no_grad")
def test_arguments_by_place():
    model, asked = asking.native(V15), inputs("native", V15, asking.IMAGES["image"])
    first = asked["input_ids"], asked["pixel_values"], asked["attention_mask"]
    labels = labels_of(asked)
    with accelerate(model, configured("fastv", 0.3)):
        wanted = model(**asked, labels=labels)
        got = model(*first, labels=labels)
        placed = model(*first, None, None, None, None, None, labels)
    for output in (got, placed):
        assert torch.equal(output.logits, wanted.logits) and torch.equal(output.loss, wanted.loss)


# -- other families ----------------------------------------------------------------------------------------------------


def on_the_other_side(asked):
    """The same batch, padded on the right."""
    order = [torch.cat([m.nonzero().flatten(), (m == 0).nonzero().flatten()]) for m in asked["attention_mask"]]
    order = torch.stack(order)
    rows = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {k: v.gather(1, order) if k in rows else v for k, v in asked.items()}


def internvl_asked():
    return internvl_side.inputs("text", *list(internvl_side.QUESTIONS)[:2])


FAMILIES = {
    **{name: (functools.partial(qwen_side.qwen, name), qwen_side.IMAGE) for name in qwen_side.MODELS},
    "internvl": (internvl_side.internvl, internvl_side.IMAGE),
}


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("method", ["visionzip", "fastv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_losses_and_refusals_of_other_families(family, method):
    make, image = FAMILIES[family]
    model = make()
    asked = internvl_asked() if family == "internvl" else qwen_side.inputs(model, *qwen_side.BATCH[:3])
    length = asked["input_ids"].shape[1]
    labels = asked["input_ids"].masked_fill((asked["attention_mask"] == 0) | (asked["input_ids"] >= image - 2), -100)
    labels = labels.masked_fill(asked["attention_mask"].cumsum(1) == 1, -100)
    for left, given in ((True, asked), (False, on_the_other_side(asked))):
        targets = labels if left else on_the_other_side({**asked, "input_ids": labels})["input_ids"]
        behind = torch.cat([targets[:, 1:], torch.full((len(targets), 1), -100)], 1)
        more = {"labels": targets, "num_items_in_batch": 20, "shift_labels": behind}
        plain, real = model(**given, **more), given["attention_mask"].bool()
        with accelerate(model, configured(method, 1.0)):
            full = model(**given, **more)
        torch.testing.assert_close(full.logits[real], plain.logits[real], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(full.loss, plain.loss, atol=1e-5, rtol=1e-5)
        with accelerate(model, configured(method, 0.3)):
            assert model(**given, labels=targets).loss.isfinite()
    ids = torch.tensor([[5, 6, 7, 8, 9, 11, 12]])
    again = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    if family != "internvl":  # text positions first, then coordinates
        again = again.expand(4, -1, -1)
    plain = model(input_ids=ids, position_ids=again, use_cache=False).logits
    with accelerate(model, configured(method, 0.3)):
        assert torch.equal(model(input_ids=ids, position_ids=again, use_cache=False).logits, plain)
        with pytest.raises(MethodError, match="inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        packed = torch.cat([torch.arange(3), torch.arange(length - 3)]).expand(len(labels), -1)
        packed = packed if family == "internvl" else packed.expand(4, -1, -1)
        with pytest.raises(MethodError, match="packed"):
            model(**{**asked, "attention_mask": None}, position_ids=packed, use_cache=False)


# -- text alone --------------------------------------------------------------------------------------------------------

PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])


def text_calls():
    ids = torch.randint(10, 600, (1, 12), generator=torch.Generator().manual_seed(4))
    packed = (PACKED.diff(prepend=PACKED[:, :1] - 1) != 1).cumsum(1)
    seen = (packed[:, :, None] == packed[:, None]) & torch.ones(12, 12).tril().bool()
    return {
        "left": text_batch(left=True),
        "right": text_batch(),
        "packed": {"input_ids": ids, "position_ids": PACKED, "use_cache": False},
        "4-D mask": {"input_ids": ids, "position_ids": PACKED, "attention_mask": seen[:, None]},
        "labels": {"input_ids": ids, "labels": ids, "num_items_in_batch": 40},
    }


@functools.cache
def text_without_a_method(host, name):
    return {way: model_of(host, name)(**call) for way, call in text_calls().items()}


@pytest.mark.share(3, each=("method",))
@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize(("method", "name"), [(m, n) for m, n in PAIRS if m is not None])
def test_text_alone_is_left_alone(method, name, host, model):
    plain = text_without_a_method(host, name)
    if resolve(configured(method, 0.3)).acts_on_text:
        pytest.skip("this method acts on text, too")
    with accelerate(model, configured(method, 0.3)):
        for way, call in text_calls().items():
            got = model(**call)
            assert torch.equal(got.logits, plain[way].logits), way
            assert "labels" not in call or torch.equal(got.loss, plain[way].loss)
    apart = [model(input_ids=text_calls()["packed"]["input_ids"][:, part]).logits for part in (slice(5), slice(5, 12))]
    for way in ("packed", "4-D mask"):
        torch.testing.assert_close(plain[way].logits, torch.cat(apart, 1), atol=1e-4, rtol=1e-4)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize(("method", "name"), [("fastv", V15), ("visionzip", V15), ("fastvid", OV)])
def test_packed_prompts_with_images_are_refused(method, name, host, model):
    asked = inputs(host, name, asking.QUESTIONS[name][asking.MAIN[name]])
    length = asked["input_ids"].shape[1]
    again = torch.cat([torch.arange(2), torch.arange(length - 2)])[None]
    cube = torch.ones(1, 1, length, length).tril().bool()
    unmasked = {**asked, "attention_mask": None}
    with accelerate(model, configured(method, 0.3)):
        for call, says in (
            ({**unmasked, "position_ids": again, "use_cache": False}, "packed"),
            ({**unmasked, "position_ids": again}, "packed"),
            ({**unmasked, "cu_seq_lens_q": torch.tensor([0, 2, length])}, "packed"),
            ({**asked, "attention_mask": cube}, "2-D attention_mask"),
        ):
            with pytest.raises(MethodError, match=says):
                model(**call)
        model(**unmasked)


@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize("method", ["fastv", "visionzip", "visionzip+fastv"])
@pytest.mark.parametrize("name", [V15])
def test_prompts_of_embeddings_are_refused(method, name, host, model):
    """Nobody can tell visual tokens among them. On a prompt in the cache they may go on."""
    asked = inputs(host, name, asking.IMAGES["image"])
    text = torch.tensor([[5, 6, 7]])
    embed = model.get_input_embeddings()
    calls = {"text": {"inputs_embeds": embed(text)}}
    if host == "tree":
        given = {k: asked[k] for k in ("images", "modalities", "image_sizes")}
        whole = model.prepare_multimodal(asked["input_ids"], None, None, **given).inputs_embeds
    else:
        whole = embed(asked["input_ids"])
        features = model.model.get_image_features(pixel_values=asked["pixel_values"]).pooler_output
        whole[asked["input_ids"] == asking.IMAGE_TOKEN] = torch.cat(list(features))
    calls["images"] = {"inputs_embeds": whole, "attention_mask": torch.ones(whole.shape[:2], dtype=torch.long)}
    plain = {way: model(**call).logits for way, call in calls.items()}
    with accelerate(model, method):
        for call in calls.values():
            with pytest.raises(MethodError, match="cannot act on a prompt given as inputs_embeds"):
                model(**call)
            with pytest.raises(MethodError if host == "native" else NotImplementedError, match="inputs_embeds"):
                model.generate(**call, max_new_tokens=2)
        cache = model(**asked, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        torch.testing.assert_close(
            model(inputs_embeds=embed(text), past_key_values=cache).logits,
            model(input_ids=text, past_key_values=other).logits,
        )
    with accelerate(model, None):
        for way, call in calls.items():
            assert torch.equal(model(**call).logits, plain[way])


@pytest.mark.usefixtures("no_grad")
@each_host
@pytest.mark.parametrize("output", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize(("method", "name"), [("fastv", V15), ("visionzip", V15)])
def test_states_of_layers_are_refused_however_they_are_asked_for(method, name, output, host, monkeypatch):
    model = copy.deepcopy(model_of(host, name))
    asked, text = inputs(host, name, asking.IMAGES["image"]), {"input_ids": torch.tensor([[5, 6, 7]])}
    config = model.config.get_text_config()
    config._attn_implementation = "eager"  # the only one that gives attention
    for call in (asked, text):
        with accelerate(model, method), pytest.raises(MethodError, match=f"{output} is not available while {method}"):
            model(**call, **{output: True})
    setattr(config, output, True)
    assert getattr(model(**text), output.removeprefix("output_")) is not None
    for call in (asked, text):
        with accelerate(model, method):
            with pytest.raises(MethodError, match=rf"{output} is not available while {method} .*\(the config asks"):
                model(**call)
            model(**call, **{output: False})
    setattr(config, output, False)
    setattr(model.generation_config, output, True)
    with accelerate(model, method), pytest.raises(MethodError, match=f"{output} is not available"):
        generated = {k: v for k, v in asked.items() if k != "input_ids"}
        model.generate(asked["input_ids"], **generated, max_new_tokens=2, return_dict_in_generate=True)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("method", [None, "visionzip", "fastv"])
@pytest.mark.parametrize("name", [V15, OV])
@pytest.mark.parametrize("host", ["tree"])
def test_pictures_and_placeholders_of_the_tree_belong_together(method, name, host, model):
    """At inference a picture that no prompt asks for is an error, not an answer from text alone."""
    picture = {"images": [tree_side.pixels(1, model.get_vision_tower().image_size, 0)]}
    both = torch.tensor([[5, IMAGE, 7], [5, 6, 7]])
    with accelerate(model, method):
        for ids, given, count in (
            (torch.tensor([[5, 6, 7]]), picture, "0 <image> placeholders but 1"),
            (torch.tensor([[5]]), picture, "0 <image> placeholders but 1"),
            (both, {"images": picture["images"] * 2}, "1 <image> placeholders but 2"),
            (torch.tensor([[5, IMAGE, 7]]), {}, "1 <image> placeholders but 0"),
            (torch.tensor([[5, IMAGE, 7]]), {"images": []}, "1 <image> placeholders but 0"),
        ):
            with pytest.raises(ValueError, match=count):
                model(input_ids=ids, **given)
            with pytest.raises(ValueError, match=count):
                model.generate(ids, **given, max_new_tokens=2)
        with pytest.raises(ValueError, match=r"input_ids|inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[5, 6, 7]])), **picture)
        alone = model(input_ids=torch.tensor([[IMAGE]]), **picture).logits
        assert alone.shape[1] > 1, "a prompt of nothing but a picture"
        cache = model(input_ids=torch.tensor([[5, IMAGE, 7]]), **picture, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[9]]), **picture, past_key_values=cache)  # a step of somebody's own loop


def test_every_method_is_covered():
    with_budget = {m for m in available() if "retention_ratio" in method_class(m).parameters()}
    assert {m for m, _ in FULL} >= with_budget - {"downsample", "fewer_frames"}
