"""Assisted decoding and caches in the tree: look-ups give the greedy answer, crops and copies leave no trace."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from accelerate_methods import MethodError, accelerate
from accelerate_methods.registry import method_class
from tests.methods.test_every_method import FAMILY, IMAGES, NAMES, OV, QUESTIONS, V15, inputs, why_not
from tests.support.configured import BEFORE_DECODING, configured

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")
NEW = 24
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
ASKED = {V15: IMAGES["image"], OV: QUESTIONS[OV]["image and video"]}
COMPOSED = {V15: ["visionzip+fastv"], OV: ["fastvid+fastv", "prunevid+random_prefill"]}
CASES = [
    (name, names)
    for name in ASKED
    for names in ["dense", *NAMES, *COMPOSED[name]]
    if names == "dense" or not any(why_not(method_class(part), FAMILY[name]) for part in names.split("+"))
]
each_case = pytest.mark.parametrize(("name", "names"), CASES)


def method_of(names):
    if names == "dense":
        return "dense"
    parts = names.split("+")
    more = {"prunevid": {"selection": False}} if len(parts) > 1 else {}
    return [configured(part, **BEFORE_DECODING.get(part, {}), **more.get(part, {})) for part in parts]


@pytest.fixture
def asked(tiny, name):
    model = tiny(name)
    return model, inputs(model, ASKED[name])


@pytest.mark.share(2, each=("names",))
@each_case
def test_look_ups_give_the_greedy_answer(asked, names):
    model, given = asked
    calls = []
    counting = model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with accelerate(model, method_of(names)):
            wanted = model.generate(**given, **GREEDY)
            assert len(calls) == NEW
            assert torch.equal(model.generate(**given, **GREEDY, prompt_lookup_num_tokens=3), wanted)
    finally:
        counting.remove()
    assert len(calls) < 2 * NEW, "some drafts were right"


@each_case
def test_what_was_cropped_leaves_no_trace(asked, names):
    model, given = asked
    question = torch.tensor([[30, 31, 32]])
    with accelerate(model, method_of(names)):
        caches = []
        for detour in (False, True):
            cache = DynamicCache(config=model.config)
            length = model(**given, past_key_values=cache, use_cache=True).past_key_values.get_seq_length()
            if detour:
                for ids in ([[50, 51, 52, 53]], [[54]], [[55]]):
                    model(input_ids=torch.tensor(ids), past_key_values=cache)
                cache.crop(-6)
            assert cache.get_seq_length() == length
            caches.append(cache)
        caches.append(copy.deepcopy(caches[0]))
        straight, *others = (model(input_ids=question, past_key_values=cache).logits for cache in caches)
        for other in others:
            torch.testing.assert_close(other, straight, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [OV])
def test_methods_that_decide_in_every_step_are_refused(asked):
    model, given = asked
    with accelerate(model, "dycoke"), pytest.raises(MethodError, match="drafts cannot be checked"):
        model.generate(**given, **GREEDY, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(("method", "error"), [("dense", NotImplementedError), ("fastv", MethodError)])
def test_draft_models_are_refused(asked, method, error):
    model, given = asked
    with accelerate(model, method):
        with pytest.raises(error, match="draft model"):
            model.generate(**given, **GREEDY, assistant_model=copy.deepcopy(model))
        with pytest.raises(error, match="assistant_early_exit"):
            model.generate(**given, **GREEDY, assistant_early_exit=1)


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("method", ["fastv", "visionzip"])
def test_static_cache_is_refused(asked, method):
    model, given = asked
    with accelerate(model, method):
        with pytest.raises(MethodError, match="needs a DynamicCache"):
            model.generate(**given, **GREEDY, cache_implementation="static")
        with pytest.raises(MethodError, match="needs a DynamicCache"):
            model(**given, past_key_values=StaticCache(config=model.config, max_cache_len=4096))
    assert model.generate(**given, **GREEDY).shape == (1, NEW)  # nothing is left behind
