"""What a native host leaves alone and puts back, and what it refuses: the wrappers around transformers' models."""

import copy
import inspect
import threading

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, accelerate, detach, record
from accelerate_methods.hosts.native.host import HOST
from accelerate_methods.hosts.native.llava_onevision import TOWER_VARIABLE
from tests.conftest import CHECKPOINTS
from tests.hosts.native.test_llava import PAIRS, assert_same, built
from tests.methods import test_every_method as tree_side
from tests.methods.test_every_method import OV, TEXT, V15, V16
from tests.support import native_questions as asking
from tests.support.configured import configured
from tests.support.native_models import tree_model
from tests.support.native_questions import GREEDY, MAIN, QUESTIONS, answer, native

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
EXAMPLES = [("fastv", V15), ("visionzip", V15), ("visionzip+fastv", V16), ("fastvid", OV), ("dycoke", OV)]


@pytest.fixture
def model(name):
    model = native(name)
    yield model
    detach(model)


def question(name):
    return asking.inputs(name, QUESTIONS[name][MAIN[name]])


def plain_attributes(module):
    return {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_forward")}


def fingerprint(model):
    """Everything about a model object that attaching could change."""
    modules = [
        (name, id(module), type(module), plain_attributes(module),
         len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_with_kwargs))
        for name, module in model.named_modules()
    ]  # fmt: skip
    state = {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()}
    return modules, state, model.config.to_dict(), model.generation_config.to_dict()


# -- on and off --------------------------------------------------------------------------------------------------------


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize(("method", "name"), [pair for pair in PAIRS if pair[0] is not None])
def test_nothing_is_left_on_the_model(method, name, model, tmp_path):
    asked = question(name)
    whole, before, state = model(**asked).logits, fingerprint(model), torch.get_rng_state()
    with accelerate(model, built(method)):
        assert fingerprint(model)[1:] == before[1:], "weights, their names and the configs are untouched"
        answer(model, asked)
        assert HOST.attached(model) is not None
    assert fingerprint(model) == before
    assert torch.equal(model(**asked).logits, whole)
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"


def test_saving_an_accelerated_model(tmp_path):
    model = native(V15)
    model.save_pretrained(tmp_path / "plain")
    with accelerate(model, "visionzip+fastv"):
        model.save_pretrained(tmp_path / "accelerated")
    files = [{f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("plain", "accelerated")]
    assert files[0] == files[1]
    again = type(model).from_pretrained(tmp_path / "accelerated").eval()
    assert torch.equal(again(**question(V15)).logits, model(**question(V15)).logits)


@pytest.mark.parametrize(("method", "name"), EXAMPLES)
def test_nesting(method, name, model):
    asked = question(name)
    before, plain = fingerprint(model), answer(model, asked)
    outer = accelerate(model, built(method))
    alone = answer(model, asked)
    inner = accelerate(model, "uniform", retention_ratio=0.5)
    uniform = answer(model, asked)
    with pytest.raises(MethodError, match="later"):
        outer.detach()
    innermost = accelerate(model, None)
    assert_same(answer(model, asked), plain, 0)  # only the last one attached acts
    innermost.detach()
    assert_same(answer(model, asked), uniform, 0)
    inner.detach()
    assert_same(answer(model, asked), alone, 0)
    outer.detach()
    outer.detach()
    assert fingerprint(model) == before
    accelerate(model, built(method))
    accelerate(model, "uniform", retention_ratio=0.5)
    detach(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(("method", "name"), EXAMPLES)
def test_attaching_before_and_after_a_move(method, name):
    model, asked = copy.deepcopy(native(name)), question(name)
    with accelerate(model, built(method)):
        expected = answer(model, asked)
        model.to(torch.float64)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in asked.items()}
        before, logits = answer(model, wide), model(**wide).logits
    with accelerate(model, built(method)):
        assert_same(answer(model, wide), before, 1e-9)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(model(**wide).logits, logits, atol=1e-9, rtol=1e-9)
    assert_same(before, expected, 1e-3)


def test_two_models_do_not_know_of_each_other():
    answered, two = copy.deepcopy(native(V15)), copy.deepcopy(native(V15))
    asked = question(V15)
    plain = answer(two, asked)
    with accelerate(answered, "visionzip", retention_ratio=0.2), accelerate(two, "fastv", k=1, retention_ratio=0.3):
        both = answer(answered, asked), answer(two, asked)
    with accelerate(answered, "visionzip", retention_ratio=0.2):
        assert_same(answer(answered, asked), both[0], 0)
        assert_same(answer(two, asked), plain, 0)
    with accelerate(two, "fastv", k=1, retention_ratio=0.3):
        assert_same(answer(two, asked), both[1], 0)


def test_two_threads_with_a_model_each():
    models = {"visionzip": copy.deepcopy(native(V15)), "fastv": copy.deepcopy(native(V15))}
    asked = question(V15)
    expected, got, errors = {}, {}, []
    for method, model in models.items():
        with accelerate(model, configured(method)):
            expected[method] = answer(model, asked)
    meet = threading.Barrier(2)

    def work(method):
        try:
            with torch.no_grad(), accelerate(models[method], configured(method)), record() as requests:
                meet.wait(60)
                got[method] = [answer(models[method], asked) for _ in range(5)], requests
        except BaseException as error:  # told to the thread of the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(method,)) for method in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    for method, (answers, requests) in got.items():
        assert len(requests) == 5 and all(r.decode_steps == 2 for r in requests)
        for answered in answers:
            assert_same(answered, expected[method], 0)


def test_two_threads_with_one_model():
    """Requests of two threads on one accelerated model keep apart."""
    model = native(V15)
    asked = [asking.inputs(V15, q) for q in QUESTIONS[V15].values()]
    with accelerate(model, "visionzip+fastv"):
        expected, got = [answer(model, a) for a in asked], {}

        def work(number):
            with torch.no_grad(), record() as requests:
                got[number] = [answer(model, asked[number]) for _ in range(4)], len(requests)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for number, (answers, count) in got.items():
        assert count == 4
        for answered in answers:
            assert_same(answered, expected[number], 0)
    assert len(got) == len(asked)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["between vision and prompt", "in the language model", "in a method", "in decoding"])
def test_a_failed_request_leaves_nothing_behind(where, monkeypatch):
    name, model = V15, native(V15)
    asked = question(name)
    answer(model, asked)  # what transformers itself notes on a model that generates
    before = fingerprint(model)

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    with accelerate(model, "visionzip+fastv"):
        expected = answer(model, asked)
        text = answer(model, asking.inputs(name, TEXT))
        with monkeypatch.context() as patch:
            more = {}
            if where == "between vision and prompt":
                patch.setattr(type(model), "_expand_inputs_for_generation", fail)
            elif where == "in the language model":
                patch.setattr(type(model.model.language_model.layers[2].mlp), "forward", fail)
            elif where == "in a method":
                patch.setattr(accelerate_methods.visionzip.VisionZip, "compress_views", fail)
            else:
                more = {"logits_processor": [lambda ids, scores: scores if ids.shape[1] == length else fail()]}
                length = asked["input_ids"].shape[1]
            with pytest.raises(RuntimeError, match="broken"), record():
                answer(model, asked, **more)
        with record() as requests:
            assert_same(answer(model, asking.inputs(name, TEXT)), text, 0)
            assert_same(answer(model, asked), expected, 0)
        assert len(requests) == 2 and [len(r.samples[0].items) for r in requests] == [0, 2]
    assert fingerprint(model) == before


@pytest.mark.parametrize("off", [-1, 1])
def test_wrong_number_of_placeholders(off):
    """transformers refuses it, with or without an acceleration; nothing is left behind."""
    model, asked = native(V15), question(V15)
    at = int((asked["input_ids"][0] == asking.IMAGE_TOKEN).nonzero()[0])
    ids = asked["input_ids"]
    ids = torch.cat([ids[:, : at + max(off, 0)], ids[:, at + max(-off, 0) :]], 1)
    wrong = {**asked, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for method in (None, "visionzip", "fastv"):
        with accelerate(model, method), pytest.raises(ValueError, match="features and image tokens do not match"):
            model(**wrong)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"output_attentions": True}, "output_attentions is not available while visionzip is attached"),
        ({"output_hidden_states": True}, "output_hidden_states is not available while visionzip is attached"),
        ({"input_ids": None}, "cannot act on a prompt given as inputs_embeds"),
        ({"attention_mask": "4d"}, "2-D attention_mask"),
        ({"vision_feature_layer": -1}, "vision_feature_layer=-1: only that of the checkpoint"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full': only that of"),
    ],
)
def test_what_a_request_cannot_have(arguments, says):
    model, asked = native(V15), question(V15)
    plain = model(**asked).logits
    if arguments.get("attention_mask") == "4d":
        length = asked["input_ids"].shape[1]
        arguments = {"attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool)}
    if "input_ids" in arguments:
        arguments["inputs_embeds"] = model.get_input_embeddings()(asked["input_ids"])
    with accelerate(model, "visionzip"):
        if "vision_feature_select_strategy" in arguments:  # a row more per image
            ids = torch.tensor([[5, *[asking.IMAGE_TOKEN] * (2 * 577)]])
            arguments |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with pytest.raises(MethodError, match=says):
            model(**{**asked, **arguments})
    assert torch.equal(model(**asked).logits, plain)


def test_static_caches_are_refused():
    model, asked = native(V15), question(V15)
    for method in ("visionzip", "fastv"):
        with accelerate(model, method), pytest.raises(MethodError, match="do not set cache_implementation"):
            answer(model, asked, cache_implementation="static")


# -- models that are not built as expected -----------------------------------------------------------------------------


def _renamed(name, path, new):
    """A copy of a model in which a part has another name, as in another release of transformers."""
    model = copy.deepcopy(native(name))
    *parents, last = path.split(".")
    owner = model.get_submodule(".".join(parents))
    setattr(owner, new, owner._modules.pop(last))
    return model


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (V15, "model.language_model"),
        (V15, "model.language_model.layers"),
        (V15, "model.language_model.norm"),
        (V15, "model.language_model.rotary_emb"),
        (V15, "model.language_model.embed_tokens"),
        (V15, "model.language_model.layers.0.input_layernorm"),
        (V15, "model.language_model.layers.0.self_attn.q_proj"),
        (V15, "model.multi_modal_projector"),
        (V15, "model.vision_tower"),
        (V15, "model.vision_tower.encoder"),
        (V15, "model.vision_tower.encoder.layers"),
        (OV, "model.vision_tower.encoder.layers.25.self_attn"),
        (OV, "model.vision_tower.encoder.layers.25.self_attn.k_proj"),
        (OV, "model.vision_tower.encoder.layers.25.layer_norm1"),
    ],
)
def test_a_renamed_part_is_an_error_when_attaching(name, path):
    if path.endswith(("25.self_attn", "25.self_attn.k_proj", "25.layer_norm1")):
        path = path.replace("25", str(len(native(name).model.vision_tower.encoder.layers) - 1))
    model = _renamed(name, path, "other")
    before = fingerprint(model)
    with pytest.raises(MethodError, match=r"not built as this host expects .*\b" + path.rsplit(".", 1)[1]):
        accelerate(model, "random+random_prefill", **{"random.retention_ratio": 0.5})
    assert fingerprint(model) == before


def test_towers_and_features_that_are_not_known():
    model = copy.deepcopy(native(V15))
    model.model.vision_tower.config.model_type = "pixtral"
    with pytest.raises(MethodError, match="vision tower pixtral: only CLIP and SigLIP"):
        accelerate(model, "random", retention_ratio=0.5)
    for field, value, says in (
        ("vision_feature_layer", 99, "not built as this host expects"),
        ("vision_feature_layer", [], "not built as this host expects"),
        ("vision_feature_select_strategy", "full", "'full' with a clip_vision_model tower"),
    ):
        model = copy.deepcopy(native(V15))
        setattr(model.config, field, value)
        with pytest.raises(MethodError, match=says):
            accelerate(model, "random", retention_ratio=0.5)
        assert "forward" not in model.__dict__


def test_models_of_no_host():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(MethodError, match="LlamaForCausalLM"):
        accelerate(LlamaForCausalLM(LlamaConfig(vocab_size=10, **small)), "fastv")


def test_where_the_pooling_head_comes_from(monkeypatch, tmp_path):
    model, asked = native(OV), question(OV)
    with accelerate(model, configured("fastvid")):
        expected = answer(model, asked)
    monkeypatch.delenv(TOWER_VARIABLE)
    monkeypatch.setattr(model.config, "name_or_path", str(CHECKPOINTS / OV))  # its folder vision_tower
    with accelerate(model, configured("fastvid")):
        assert_same(answer(model, asked), expected, 0)
    monkeypatch.setattr(model.config, "name_or_path", "")
    for named, says in (
        (str(tmp_path / "nowhere"), "cannot find config.json of vision tower"),
        (str(CHECKPOINTS / V15 / "vision_tower"), "only SigLIP has an attention-pooling head"),
    ):
        monkeypatch.setenv(TOWER_VARIABLE, named)
        with pytest.raises(MethodError, match=rf"Say where .* environment variable {TOWER_VARIABLE} .*{says}"):
            accelerate(model, configured("fastvid"))
    assert "acceleration" not in model.__dict__ and "forward" not in model.__dict__


# -- several turns -----------------------------------------------------------------------------------------------------

TURNS = [(None, V15), *EXAMPLES, ("fastvid+fastv", OV)]


@pytest.mark.parametrize(("method", "name"), TURNS)
def test_text_after_images_on_the_same_cache(method, name, model):
    """In a forward (as in the tree) and in generate, which is given the whole chat."""
    tree, asked = tree_model(name), question(name)
    follow = torch.tensor([[9, 11, 12]])
    with accelerate(tree, built(method)):
        out = tree(**tree_side.inputs(tree, QUESTIONS[name][MAIN[name]]), use_cache=True)
        expected = tree(input_ids=follow, past_key_values=out.past_key_values).logits
    with accelerate(model, built(method)):
        out = model(**asked, use_cache=True)
        got = model(input_ids=follow, past_key_values=out.past_key_values)
        torch.testing.assert_close(got.logits, expected, atol=1e-5, rtol=1e-5)

        first = model.generate(**asked, **GREEDY, return_dict_in_generate=True)
        chat = torch.cat([first.sequences, follow], 1)
        by_hand = copy.deepcopy(first.past_key_values)
        for name_ in ("accelerate_prompt", "accelerate_request"):
            assert hasattr(by_hand, name_) == hasattr(first.past_key_values, name_)
        second = model.generate(
            chat, attention_mask=torch.ones_like(chat), past_key_values=first.past_key_values, **GREEDY
        )[:, chat.shape[1] :]
        new = torch.cat([first.sequences[:, -1:], follow], 1)  # the last token said is not in the cache yet
        for step in range(3):
            out = model(input_ids=new, past_key_values=by_hand)
            new = out.logits[:, -1:].argmax(-1)
            assert torch.equal(new, second[:, step : step + 1])


@pytest.mark.parametrize(("method", "name"), [("visionzip", V15), ("fastv", V15), ("fastvid", OV)])
def test_a_batch_goes_on_over_turns(method, name, model):
    """A chat of two padded prompts goes on as each alone does."""
    questions = asking.BATCH[name][:2]
    follow = torch.tensor([[9, 11, 12]])

    def turns(*those):
        asked = asking.inputs(name, *those)
        first = model.generate(**asked, **GREEDY, return_dict_in_generate=True)
        chat = torch.cat([first.sequences, follow.expand(len(those), -1)], 1)
        mask = torch.cat([asked["attention_mask"], torch.ones(len(those), 6, dtype=torch.long)], 1)
        second = model.generate(chat, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
        return second[:, asked["input_ids"].shape[1] :]

    with accelerate(model, built(method)):
        together = turns(*questions)
        for row, answered in enumerate(questions):
            assert torch.equal(together[row : row + 1], turns(answered))


@pytest.mark.parametrize(("method", "name"), [("visionzip", V15), ("fastv", V15), ("fastvid", OV)])
def test_images_of_a_later_turn_need_a_new_cache(method, name, model):
    asked = question(name)
    text = asking.inputs(name, TEXT)
    with accelerate(model, built(method)):
        cache = model(**text, use_cache=True).past_key_values
        with pytest.raises(MethodError, match="images of a later turn need a new cache; give the whole chat again"):
            model(**{**asked, "attention_mask": None}, past_key_values=cache)
        first = model.generate(**asked, **GREEDY, return_dict_in_generate=True)
        chat = {**asked, "input_ids": torch.cat([first.sequences, asked["input_ids"]], 1)}
        chat["attention_mask"] = torch.ones_like(chat["input_ids"])
        with pytest.raises(MethodError, match="images of a later turn need a new cache"):
            model.generate(**chat, **GREEDY, past_key_values=first.past_key_values)
        again = model.generate(**asked, **GREEDY)
        assert torch.equal(again, first.sequences)


def test_features_from_elsewhere_are_refused():
    """Pieces of a prompt (chunked prefill), or features computed before attaching: there is nothing to read from."""
    model, asked = native(V15), question(V15)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers takes no features that were computed before")
    features = model.model.get_image_features(asked["pixel_values"], return_dict=True)
    text = {k: asked[k] for k in ("input_ids", "attention_mask")}
    plain = model(**text, mm_encoder_outputs={"image": features}).logits
    with accelerate(model, "visionzip"):
        with pytest.raises(MethodError, match="the features of the images were computed before it was attached"):
            model(**text, mm_encoder_outputs={"image": features})
        with pytest.raises(MethodError, match="prefill_chunk_size"):
            model.generate(**asked, **GREEDY, prefill_chunk_size=100)
        own = model.model.get_image_features(asked["pixel_values"], return_dict=True)
        given = model(**text, mm_encoder_outputs={"image": own}).logits
        torch.testing.assert_close(given, model(**asked).logits, atol=0, rtol=0)
    with accelerate(model, None):
        assert torch.equal(model(**text, mm_encoder_outputs={"image": features}).logits, plain)


def test_a_failed_attachment_keeps_the_former_one(monkeypatch):
    model, asked = native(OV), question(OV)
    before = fingerprint(model)
    with accelerate(model, "uniform", retention_ratio=0.5):
        expected = answer(model, asked)
        monkeypatch.setenv(TOWER_VARIABLE, "/nowhere")
        with pytest.raises(MethodError):
            accelerate(model, configured("fastvid"))
        assert_same(answer(model, asked), expected, 0)
        monkeypatch.setattr(HOST.attached(model).family.__class__, "watch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            accelerate(model, "fastv")
        monkeypatch.undo()
    assert fingerprint(model) == before
