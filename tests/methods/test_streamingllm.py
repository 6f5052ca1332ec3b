"""StreamingLLM beyond its golden vectors: its three forms on whole models, in chats, batches and assisted decoding."""

import copy

import pytest
import torch
from transformers import DynamicCache

import accelerate_methods
from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.stages.decode import EvictStep
from accelerate_methods.streamingllm import StreamingLLM, budget_ends, space_ends
from tests.hosts.native.test_assisted import GREEDY, HOSTS, answer, drafting
from tests.methods import test_every_method as every
from tests.support import native_questions as native
from tests.support import qwen_inputs as qwen
from tests.support.configured import configured

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
A, R = 3, 9
FORMS = {
    "cache": {},
    "entered": {"pos_shift": False},
    "original": {"original_positions": True},
}
each_form = pytest.mark.parametrize("form", FORMS)
TEXT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]])


def sized(form="cache", start=A, recent=R, **more):
    return StreamingLLM(start_size=start, recent_size=recent, **FORMS[form], **more)


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_room_for_what_comes():
    """Section by section as in StartRecentKVCache.evict_for_space."""
    for entries in range(1, 40):
        for coming in range(1, 30):
            first, last = space_ends(entries, coming, A, R)
            kept = {n for n in range(entries) if n < first or n >= entries - last}
            if entries + coming <= A + R:
                assert len(kept) == entries
            else:
                assert kept == {*range(min(A, entries)), *range(max(0, entries - R + coming), entries)}
            both = space_ends(torch.tensor([[entries]]), torch.tensor([[coming]]), A, R)
            assert {n for n in range(entries) if n < both[0] or n >= entries - both[1].item()} == kept


def test_shares_of_a_prompt():
    for entries in (1, 2, 7, 9, 10, 130, 640, 999):
        for budget in (1e-6, 0.05, 0.1, 0.29, 0.4, 0.7, 1.0):
            for window in (0.0, 0.1, 0.29, 1.0):
                first, last = budget_ends(entries, budget, window)
                cap = max(1, int(entries * budget))
                assert (first, last) == (cap - max(1, int(cap * window)), max(1, int(cap * window)))
                tensors = budget_ends(torch.tensor([[entries]]), budget, window)
                assert [part.item() for part in tensors] == [first, last]


def test_what_is_given_and_what_not():
    assert accelerate_methods.get("streamingllm", budget=0.2).start_size is None
    assert StreamingLLM().checks_drafts is False and StreamingLLM(policy="for_space").checks_drafts
    for wrong, text in (
        ({"start_size": 0, "recent_size": 0}, "something has to stay"),
        ({"start_size": 4}, "start_size and recent_size belong together"),
        ({"start_size": 4, "recent_size": 9, "budget": 0.2}, "exactly one budget"),
        ({"budget": 1.5}, "outside the allowed range"),
        ({"policy": "before"}, "after"),
        ({"cache_size": 100}, "give start_size and recent_size"),
    ):
        with pytest.raises(MethodError, match=text):
            accelerate_methods.get("streamingllm", **wrong)


def test_a_form_acts_at_its_moment_only():
    def acts(method, when, call):
        visual = torch.zeros(1, 30, dtype=torch.bool)
        return method.evict(EvictStep(when, call, [0], 30, visual, coming=4 * (when == "before"))) is not None

    moments = [(when, call) for when in ("before", "after") for call in ("prompt", "turn", "step")]
    for method, wanted in (
        (sized(), {("after", call) for call in ("prompt", "turn", "step")}),
        (sized(policy="for_space"), {("before", "turn")}),
        (StreamingLLM(start_size=None, recent_size=None, budget=0.3), {("after", "prompt")}),
    ):
        assert {moment for moment in moments if acts(method, *moment)} == wanted


# -- whole models ------------------------------------------------------------------------------------------------------


def models(tiny):
    return {"tree": tiny(every.V15), "native": native.native(native.V15)}


def say(model, ids, **more):
    """New ids of a prompt of text, and the record of the request (of transformers' models with a method only)."""
    with record() as requests:
        out = model.generate(ids, do_sample=False, eos_token_id=None, pad_token_id=0, **more)
    new = out if out.shape[1] == more["max_new_tokens"] else out[:, ids.shape[1] :]
    return new, (requests or [None])[0]


@each_form
def test_a_long_answer_to_text_has_a_short_cache(form, tiny):
    """Tree and transformers' class of the same weights say the same, and not what the model says with all in view."""
    said = {}
    for host, model in models(tiny).items():
        with accelerate(model, sized(form)):
            said[host], request = say(model, TEXT, max_new_tokens=40)
        assert len(request.cached) == 40 and all(set(cached) == {A + R} for cached in request.cached)
        assert request.layer_lengths(0) == [16] * 6
        said["all"], _ = say(model, TEXT, max_new_tokens=40)
        with accelerate(model, sized(form, recent=90)):
            wide, request = say(model, TEXT, max_new_tokens=40)
        assert torch.equal(wide, said["all"]) and request.cached[-1] == [55] * 6
    assert torch.equal(said["tree"], said["native"]) and not torch.equal(said["tree"], said["all"])


@each_form
def test_images_and_videos(form, tiny):
    """The loop cuts what the prompt has cached; the first token still saw everything."""
    asked = native.QUESTIONS[native.OV][native.MAIN[native.OV]]
    tree, model = tiny(every.OV), native.native(native.OV)
    with accelerate(tree, sized(form)), record() as requests:
        expected = every.answer(tree, asked)
    assert requests[0].cached == [[A + R] * 6] * 3
    with accelerate(model, sized(form)), record() as others:
        got = native.answer(model, native.inputs(native.OV, asked))
    every.assert_close(got, expected, 1e-4)
    assert others[0].cached == requests[0].cached
    dense = every.answer(tree, asked)
    torch.testing.assert_close(dense[1][:, 0], expected[1][:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dense[1][:, 1], expected[1][:, 1], atol=1e-3)


def test_one_shot_keeps_a_share_of_the_prompt_and_grows(tiny):
    model, asked = tiny(every.OV), every.QUESTIONS[every.OV]["image and video"]
    with accelerate(model, "streamingllm", budget=0.3), record() as requests:
        every.answer(model, asked)
    share = int(requests[0].samples[0].length * 0.3)
    assert requests[0].cached == [[share + n] * 6 for n in range(3)]


@pytest.mark.parametrize("method", ["fastv", "random_prefill", "fastvid", "uniform"])
def test_with_another_method_in_front(method, tiny):
    model, asked = tiny(every.OV), every.QUESTIONS[every.OV]["image and video"]
    with accelerate(model, [configured(method), sized("original")]), record() as requests:
        together = every.answer(model, asked, every.TEXT)
        alone = every.answer(model, asked), every.answer(model, every.TEXT)
    assert requests[0].cached == [[A + R] * 6] * 3
    for row, one in enumerate(alone):
        torch.testing.assert_close(together[1][row], one[1][0], atol=1e-4, rtol=1e-4)
    prefill = "prefill" in configured(method).stages
    if prefill:
        with pytest.raises(MethodError, match="cannot number them by their place"):
            accelerate(model, [configured(method), sized()])


@pytest.mark.parametrize("form", ["cache", "original"])
def test_beams(form, tiny):
    model, asked = tiny(every.V15), every.inputs(tiny(every.V15), every.IMAGES["image"])
    more = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**asked, **more)
    with accelerate(model, sized(form, recent=900)):
        assert torch.equal(model.generate(**asked, **more), plain)
    with accelerate(model, sized(form)), record() as requests:
        assert model.generate(**asked, **more).shape == (1, 6)
    assert requests[0].cached == [[A + R] * 6] * 6


# -- chats -------------------------------------------------------------------------------------------------------------


@each_form
def test_a_chat_makes_room_before_each_turn(form):
    """generate says how long an answer may get; 4 + 44 with turns of 5 tokens and answers of 8."""
    model, cache = native.native(native.V15), DynamicCache()
    ids, lengths = torch.tensor([[5, 6, 7, 8, 9]]), []
    with accelerate(model, sized(form, start=4, recent=44, policy="for_space")):
        for turn in range(6):
            out = model.generate(ids, past_key_values=cache, **GREEDY | {"max_new_tokens": 8, "min_new_tokens": 8})
            lengths.append(cache.get_seq_length(0))
            assert out.shape[1] == ids.shape[1] + 8 and cache.get_seq_length() == out.shape[1] - 1
            ids = torch.cat([out, torch.tensor([[20 + turn, 21, 22, 23]])], 1)
    # the last token of an answer comes with the next turn; room is made for 5 + 8, of which 12 are then cached
    assert lengths == [12, 24, 36, 47, 47, 47]


def test_a_single_token_is_a_turn_if_generate_begins_with_it():
    model, cache = native.native(native.V15), DynamicCache()
    with accelerate(model, sized(policy="for_space", reserve=2)):
        model(input_ids=TEXT, past_key_values=cache)
        model(input_ids=TEXT[:, :1], past_key_values=cache)
        assert cache.get_seq_length(0) == 17, "a decode step"
        model.generate(torch.cat([TEXT, TEXT[:, :2]], 1), past_key_values=cache, max_new_tokens=1, pad_token_id=0)
        assert cache.get_seq_length(0) == A + R - 2
        model(input_ids=TEXT[:, :2], past_key_values=cache)
        assert cache.get_seq_length(0) == A + R - 2


def test_an_answer_can_be_taken_back_and_a_former_turn_not():
    model, cache = native.native(native.V15), DynamicCache()
    with accelerate(model, sized(policy="for_space", reserve=0)):
        model(input_ids=TEXT, past_key_values=cache)
        twin = None
        for _ in range(2):
            twin = twin or copy.deepcopy(cache)
            first = model(input_ids=TEXT[:, :4], past_key_values=cache).logits
            assert cache.get_seq_length(0) == A + R
            cache.crop(-4)
        torch.testing.assert_close(first, model(input_ids=TEXT[:, :4], past_key_values=twin).logits)
        with pytest.raises(MethodError, match="only the 0 that came since can be cropped"):
            cache.crop(-1)


# -- assisted decoding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["llava", "qwen2_5"])
@pytest.mark.parametrize("params", [{"budget": 0.3}, {"start_size": 3, "recent_size": 9, "policy": "for_space"}])
def test_drafts(where, params):
    model, asked = HOSTS[where]()
    params = params if "budget" in params else {**params, "original_positions": True}
    with accelerate(model, "streamingllm", **params):
        wanted, _ = answer(model, asked)
        draft = drafting(model, asked["input_ids"].shape[1], wanted, 3)
        assert answer(model, asked, assistant_model=draft)[0] == wanted
    refused = pytest.raises(MethodError, match="assisted decoding is not available")
    with accelerate(model, sized("original")), refused:
        answer(model, asked, prompt_lookup_num_tokens=3)


def test_drafts_are_no_turns():
    """Several tokens come in one call, and no room is made for them."""
    model, cache = native.native(native.V15), DynamicCache()
    with accelerate(model, sized(policy="for_space")):
        out = model.generate(TEXT, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
        assert cache.get_seq_length(0) == cache.get_seq_length() >= out.shape[1] - 1


# -- models with several position ids per token ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [qwen.QWEN2, qwen.QWEN25, qwen.QWEN3])
def test_qwen(name):
    model = qwen.qwen(name)
    asked = qwen.inputs(model, qwen.QUESTIONS["image and video"])
    text = {"max_new_tokens": 30}
    for form in ("cache", "entered"):
        with accelerate(model, sized(form)):
            with pytest.raises(MethodError, match=r"three coordinates each .*Keep original positions"):
                answer(model, asked)
            _, request = say(model, TEXT, **text)
            assert request.cached == [[A + R] * len(request.cached[0])] * 30
    plain, _ = say(model, TEXT, **text)
    with accelerate(model, sized("cache", recent=90)):
        assert torch.equal(say(model, TEXT, **text)[0], plain)
    for spec in (sized("original"), accelerate_methods.get("streamingllm", budget=0.3)):
        with accelerate(model, spec), record() as requests:
            answer(model, asked)
        ends = requests[0].cached
        assert len(ends) == 14 and ends[-1][0] == (A + R if spec.budget is None else ends[0][0] + 13)


# -- calls that nothing can be said about ------------------------------------------------------------------------------


def test_packed_text_is_refused(tiny):
    for host, model in models(tiny).items():
        with accelerate(model, sized()):
            packed = torch.tensor([[0, 1, 2, 0, 1]])
            with pytest.raises(MethodError, match="cannot on packed prompts"):
                model(input_ids=TEXT[:, :5], position_ids=packed, use_cache=True)
            without = model(input_ids=TEXT[:, :5], position_ids=packed, use_cache=False).logits
        assert torch.equal(model(input_ids=TEXT[:, :5], position_ids=packed, use_cache=False).logits, without), host


def test_a_cache_of_the_model_alone_is_refused(tiny):
    for model in models(tiny).values():
        cache = DynamicCache()
        model(input_ids=TEXT, past_key_values=cache)
        refused = pytest.raises(MethodError, match="filled before streamingllm was attached")
        with accelerate(model, sized()), refused:
            model(input_ids=TEXT[:, :1], past_key_values=cache)
