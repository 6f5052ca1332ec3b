"""Assisted decoding of transformers' models: whoever drafts, the answer is that of greedy decoding."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache

import accelerate_methods
from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.registry import families, method_class
from accelerate_methods.registry.compatibility import why_not
from tests.hosts.native import test_internvl as internvl
from tests.hosts.native import test_llava_next_video as next_video
from tests.support import native_questions as llava
from tests.support import qwen_inputs as qwen
from tests.support.configured import BEFORE_DECODING, configured

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
NEW = 14
STATIC = r"needs a DynamicCache .* got StaticCache"
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

#: model and a prompt with everything it takes
HOSTS = {
    "llava": lambda: (llava.native(llava.V15), llava.inputs(llava.V15, llava.QUESTIONS[llava.V15]["image"])),
    "onevision": lambda: (
        llava.native(llava.OV),
        llava.inputs(llava.OV, llava.QUESTIONS[llava.OV]["video of 5"]),
    ),
    "next_video": lambda: (next_video.tiny(), next_video.inputs(next_video.tiny(), "image and video")),
    "qwen2": lambda: _qwen(qwen.QWEN2),
    "qwen2_5": lambda: _qwen(qwen.QWEN25),
    "qwen3": lambda: _qwen(qwen.QWEN3),
    "internvl": lambda: (internvl.internvl(), internvl.inputs("tiled image")),
}
FAMILY = {
    "llava": families.LLAVA_1_5_HF,
    "onevision": families.LLAVA_ONEVISION_HF,
    "next_video": families.LLAVA_NEXT_VIDEO_HF,
    **dict.fromkeys(("qwen2", "qwen2_5", "qwen3"), families.QWEN_VL),
    "internvl": families.INTERNVL,
}
COMPOSED = {
    "llava": ["visionzip+fastv"],
    "onevision": ["fastvid+fastv", "random+random_prefill"],
    "next_video": ["fastervlm+fastv"],
    "qwen3": ["random+fastv"],
}
#: parameters for hosts whose models are of another kind
OF_HOST = {
    "fastvid": {"qwen2": {"c": 2}, "qwen2_5": {"c": 2}, "qwen3": {"c": 2}},
    **{name: {"*": params} for name, params in BEFORE_DECODING.items()},
}


def _qwen(name):
    model = qwen.qwen(name)
    return model, qwen.inputs(model, qwen.QUESTIONS["image and video"])


def method_of(names, where):
    """One method, or several joined by +, with parameters for ``where``."""
    out = []
    for name in names.split("+"):
        params = OF_HOST.get(name, {})
        out.append(configured(name, **params.get(where, params.get("*", {}))))
    return out


def cases():
    for where in HOSTS:
        for names in [*accelerate_methods.available(), *COMPOSED.get(where, ())]:
            if not any(why_not(method_class(name), FAMILY[where]) for name in names.split("+")):
                yield where, names


def drafting(model, prompt=None, right=None, wrong_at=None):
    """A copy of the model that drafts four tokens at a time.

    What transformers 5 lets a model draft is mostly wrong (it does not see the image). With ``right``, the answer to
    the prompt, it drafts that instead, with another token at every ``wrong_at``-th.
    """
    draft = copy.deepcopy(model)
    config = draft.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0  # draft whatever comes
    if right is not None:

        def generate(input_ids, max_new_tokens, **_):
            done = input_ids.shape[1] - prompt
            new = torch.tensor([right[done : done + max_new_tokens]])
            if wrong_at is not None:
                new[:, wrong_at - 1 :: wrong_at] = (new[:, wrong_at - 1 :: wrong_at] + 1) % 50
            scores = tuple(torch.zeros(1, model.lm_head.weight.shape[0]) for _ in range(new.shape[1]))
            ids = torch.cat([input_ids, new], dim=1)
            return SimpleNamespace(sequences=ids, scores=scores, past_key_values=None)

        draft.generate = generate
    return draft


def answer(model, asked, **more):
    """Ids [NEW], and how often the model was called."""
    calls = []
    counting = model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        ids = model.generate(**asked, **GREEDY, **more)
    finally:
        counting.remove()
    return ids[0, asked["input_ids"].shape[1] :].tolist(), len(calls)


def asked_with(where):
    model, asked = HOSTS[where]()
    return model, asked, asked["input_ids"].shape[1]


# -- the answer --------------------------------------------------------------------------------------------------------


@pytest.mark.share(5, each=("names",))
@pytest.mark.parametrize(("where", "names"), list(cases()))
def test_assisted_is_greedy(where, names):
    model, asked, prompt = asked_with(where)
    with accelerate(model, method_of(names, where)):
        wanted, calls = answer(model, asked)
        assert calls == NEW
        for wrong_at in (None, 3, 1):
            got, fewer = answer(model, asked, assistant_model=drafting(model, prompt, wanted, wrong_at))
            assert got == wanted, wrong_at
            # five tokens a call, three, one; the first call is made in two, and the last needs no draft
            assert fewer <= {None: 4, 3: 6, 1: NEW + 1}[wrong_at]
        assert answer(model, asked, prompt_lookup_num_tokens=3)[0] == wanted


@pytest.mark.parametrize("attached", [("main",), ("draft",), ("main", "draft")])
@pytest.mark.parametrize("where", ["llava", "qwen2_5", "internvl"])
def test_real_draft_models_with_and_without_a_method(where, attached):
    model, asked, _ = asked_with(where)
    draft = drafting(model)
    with contextlib.ExitStack() as on:
        if "main" in attached:
            on.enter_context(accelerate(model, method_of("random+fastv", where)))
        wanted = answer(model, asked)[0]
        if "draft" in attached:
            on.enter_context(accelerate(draft, method_of("uniform+fastv", where)))
        assert answer(model, asked, assistant_model=draft)[0] == wanted


def test_a_look_up_in_the_prompt_drafts_from_the_first_call_on():
    """The end of this prompt stands in it already, so the first call holds drafts: they are not its last token."""
    model = qwen.qwen(qwen.QWEN25)
    asked = qwen.inputs(model, (7, 8, 9, 40, qwen.image(8, 12), 30, 31, 7, 8))
    seen, layer = [], model.model.language_model.layers[0]
    with accelerate(model, "fastv", r=0.6):
        wanted = answer(model, asked)[0]
        spy = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        assert answer(model, asked, prompt_lookup_num_tokens=3)[0] == wanted
        spy.remove()
    assert seen[:2] == [asked["input_ids"].shape[1], 3]


def test_a_look_up_that_drafts_placeholders():
    """A prompt that ends as it begins, with an image between: the drafts are image tokens, which bring no image."""
    model = qwen.qwen(qwen.QWEN25)
    asked = qwen.inputs(model, (7, 8, qwen.image(8, 12), 30, 31, 7, 8))
    with accelerate(model, "random", retention_ratio=0.5):
        assert answer(model, asked, prompt_lookup_num_tokens=3)[0] == answer(model, asked)[0]


@pytest.mark.parametrize("names", ["random", "fastv", "random+fastv"])
@pytest.mark.parametrize("where", ["llava", "qwen2_5", "internvl"])
def test_later_turn_of_a_chat(where, names):
    """transformers 5 itself gives the whole chat to the model again, on top of its cache."""
    model, asked, _ = asked_with(where)
    with accelerate(model, method_of(names, where)):
        turns = {}
        for kind, more in {"greedy": {}, "look-up": {"prompt_lookup_num_tokens": 3}}.items():
            out = model.generate(**asked, **GREEDY, **more, return_dict_in_generate=True)
            chat = torch.cat([out.sequences, torch.tensor([[17, 18, 19]])], dim=1)
            again = model.generate(chat, past_key_values=out.past_key_values, **GREEDY, **more)
            turns[kind] = again[0, chat.shape[1] :].tolist()
    assert turns["greedy"] == turns["look-up"]


def test_sampling_takes_the_same_way():
    """The speculative choice is transformers'; here only the drafted scores matter, and a certain choice is greedy."""
    model, asked, prompt = asked_with("qwen2")
    with accelerate(model, "fastv"):
        wanted = answer(model, asked)[0]
        draft = drafting(model, prompt, wanted, 3)
        ids = model.generate(**asked, **{**GREEDY, "do_sample": True}, top_k=1, assistant_model=draft)
    assert ids[0, prompt:].tolist() == wanted


def test_recorded_once():
    model, asked, prompt = asked_with("llava")
    with accelerate(model, "fastv"), record() as requests:
        wanted = answer(model, asked)[0]
        answer(model, asked, assistant_model=drafting(model, prompt, wanted))
    plain, assisted = requests
    assert plain.layer_lengths(0) == assisted.layer_lengths(0)
    assert plain.samples[0].visual_tokens_after == assisted.samples[0].visual_tokens_after


# -- refused -----------------------------------------------------------------------------------------------------------


def test_methods_that_decide_in_every_step_are_refused():
    model, asked, _ = asked_with("onevision")
    with accelerate(model, "dycoke"), pytest.raises(MethodError, match="drafts cannot be checked"):
        answer(model, asked, prompt_lookup_num_tokens=3)


def test_a_model_that_drafts_for_itself_is_refused():
    model, asked, _ = asked_with("llava")
    with accelerate(model, "fastv"), pytest.raises(MethodError, match="assistant_early_exit"):
        answer(model, asked, assistant_early_exit=2)


@pytest.mark.parametrize("where", HOSTS)
@pytest.mark.parametrize("names", ["fastv", "random"])
def test_static_cache_is_refused(where, names):
    model, asked, _ = asked_with(where)
    with accelerate(model, method_of(names, where)):
        with pytest.raises(MethodError, match=STATIC):
            answer(model, asked, cache_implementation="static")
        cache = StaticCache(config=model.config, max_cache_len=asked["input_ids"].shape[1] + 8)
        with pytest.raises(MethodError, match=STATIC):
            model(**asked, past_key_values=cache)
    assert len(answer(model, asked)[0]) == NEW  # nothing is left behind
