"""What users do to the cache of a cut prompt: crops, copies for several questions, another batch, later turns."""

import copy

import pytest
import torch
from transformers import DynamicCache

from accelerate_methods import MethodError, accelerate, detach
from tests.hosts.native.test_assisted import GREEDY, HOSTS, NEW, method_of
from tests.support import native_questions as llava
from tests.support import qwen_inputs as qwen

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
CASES = [
    *(("llava", "random"), ("llava", "fastv"), ("llava", "visionzip+fastv")),
    *(("onevision", "prunevid"), ("onevision", "fastvid+fastv")),
    *(("next_video", "fastv"), ("qwen2", "fastv"), ("qwen2_5", "random"), ("qwen2_5", "prunevid"), ("qwen3", "fastv")),
    ("internvl", "random+fastv"),
]
each_case = pytest.mark.parametrize(("where", "names"), CASES)
QUESTION, OTHER = torch.tensor([[30, 31, 32]]), torch.tensor([[40, 41]])


@pytest.fixture
def begun(where, names):
    """The model with the method, the inputs, and a function that makes a cache of the prompt."""
    model, asked = HOSTS[where]()

    def cache_of(inputs=asked):
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache, use_cache=True)
        return cache

    with accelerate(model, method_of(names, where)):
        yield model, asked, cache_of
    detach(model)


def logits_of(model, ids, cache):
    return model(input_ids=ids, past_key_values=cache).logits


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)


@each_case
def test_what_was_cropped_leaves_no_trace(begun):
    model, asked, cache_of = begun
    straight, around = cache_of(), cache_of()
    length = asked["input_ids"].shape[1]
    assert around.get_seq_length() == length, "as the caller counts"
    logits_of(model, torch.tensor([[50, 51, 52, 53]]), around)
    for token in (54, 55):
        logits_of(model, torch.tensor([[token]]), around)
    around.crop(-6)
    assert around.get_seq_length() == length
    for ids in (QUESTION, OTHER[:, :1], OTHER):
        assert_close(logits_of(model, ids, around), logits_of(model, ids, straight))


@each_case
def test_one_prompt_and_several_questions(begun):
    """The recipe of prefix caching: a deep copy of the cache for each question, given behind the whole prompt."""
    model, asked, cache_of = begun
    prompt = cache_of()
    answers = []
    for question in (QUESTION, OTHER, QUESTION):
        chat = torch.cat([asked["input_ids"], question], dim=1)
        on_copy, alone = (
            model.generate(chat, past_key_values=cache, **GREEDY)[0, chat.shape[1] :].tolist()
            for cache in (copy.deepcopy(prompt), cache_of())
        )
        assert on_copy == alone and len(alone) == NEW
        answers.append(alone)
    assert answers[0] == answers[2]
    assert prompt.get_seq_length() == asked["input_ids"].shape[1], "the copies went on alone"


@pytest.mark.parametrize(("where", "names"), [case for case in CASES if "qwen" not in case[0]])
def test_whole_chat_on_a_cache_is_its_new_tokens_on_it(begun):
    """``generate`` leaves out what the cache holds, by the count of the caller."""
    model, asked, cache_of = begun
    chat, cache = torch.cat([asked["input_ids"], QUESTION], dim=1), cache_of()
    wanted, new, end = [], QUESTION, model.generation_config.eos_token_id
    for _ in range(NEW):
        logits = logits_of(model, new, cache)[0, -1]
        if end is not None:
            logits[end] = -torch.inf  # GREEDY has a least length
        new = logits.argmax()[None, None]
        wanted.append(new.item())
    got = model.generate(chat, past_key_values=cache_of(), **GREEDY)[0, chat.shape[1] :].tolist()
    assert got == wanted


@pytest.mark.parametrize(("where", "names"), [(where, "uniform") for where in HOSTS])
def test_whole_chat_on_a_cache_is_the_whole_chat(begun):
    """Where what is dropped does not depend on the text behind."""
    model, asked, cache_of = begun
    chat = torch.cat([asked["input_ids"], QUESTION], dim=1)
    more = {
        name: torch.cat([value, fill(QUESTION)], dim=1)
        for name, fill in (("attention_mask", torch.ones_like), ("mm_token_type_ids", torch.zeros_like))
        for value in [asked.get(name)] if value is not None
    }  # fmt: skip
    fresh = model.generate(**{**asked, **more, "input_ids": chat}, **GREEDY)
    assert torch.equal(model.generate(chat, past_key_values=cache_of(), **GREEDY), fresh)


@pytest.mark.parametrize("name", ["llava", "qwen"])
@pytest.mark.parametrize("names", ["random", "fastv", "random+fastv"])
def test_rows_of_a_padded_batch_change(name, names):
    if name == "llava":
        model, batch = llava.native(llava.V15), llava.inputs(llava.V15, *llava.BATCH[llava.V15][:3])
    else:
        model = qwen.qwen(qwen.QWEN25)
        batch = qwen.inputs(model, *qwen.BATCH[:3])
    real = batch["attention_mask"]
    with accelerate(model, method_of(names, name)):
        changed, plain = (model(**batch, use_cache=True).past_key_values for _ in range(2))
        changed.batch_select_indices(torch.tensor([2, 0]))
        changed.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        new = torch.tensor([[30, 31], [40, 41], [50, 51]])
        for at, ids in enumerate((new, new[:, :1], new.flip(1))):
            # several ids per token: transformers keeps on the model where they go on, for the batch of the prompt
            positions = torch.arange(ids.shape[1]).expand(3, 3, -1) + real.shape[1] + 2 * at if name == "qwen" else None
            wanted = model(input_ids=ids, position_ids=positions, past_key_values=plain).logits
            positions = None if positions is None else positions[:, :1].expand(-1, 4, -1)
            got = model(input_ids=ids[rows], position_ids=positions, past_key_values=changed).logits
            assert_close(got, wanted[rows])


@pytest.mark.parametrize(("where", "names"), [("llava", "fastv"), ("onevision", "prunevid")])
def test_a_cut_prompt_cannot_lose_its_end(begun):
    model, _, cache_of = begun
    cache = cache_of()
    with pytest.raises(MethodError, match="cannot be cropped"):
        cache.crop(-1)
    logits_of(model, QUESTION, cache)


@pytest.mark.parametrize(("where", "names"), [("llava", "random"), ("llava", "fastv"), ("qwen2_5", "random")])
def test_a_cut_prompt_is_no_prompt_of_the_model_alone(begun):
    model, _, cache_of = begun
    cache = cache_of()
    detach(model)
    with pytest.raises(MethodError, match="has cut"):
        logits_of(model, QUESTION, cache)


@pytest.mark.parametrize(("where", "names"), [("llava", "random"), ("qwen2_5", "random")])
def test_the_end_of_a_compressed_prompt_may_be_cropped(begun):
    """What was dropped before the model does not depend on the text that is taken away."""
    model, asked, cache_of = begun
    cropped = cache_of()
    cropped.crop(-1)
    shorter = dict(asked)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in shorter:
            shorter[name] = shorter[name][:, :-1]
    fresh = cache_of(shorter)
    assert cropped.get_seq_length() == fresh.get_seq_length()
    assert_close(logits_of(model, QUESTION, cropped), logits_of(model, QUESTION, fresh))


@pytest.mark.parametrize(("where", "names"), [("llava", "fastv"), ("llava", "random+fastv"), ("qwen2_5", "fastv")])
def test_a_cache_that_was_cropped_after_an_answer_is_as_good_as_new(begun):
    model, asked, cache_of = begun
    cache, chat = cache_of(), torch.cat([asked["input_ids"], QUESTION], dim=1)
    assisted = model.generate(chat, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    cache.crop(asked["input_ids"].shape[1] - cache.get_seq_length())
    assert torch.equal(model.generate(chat, past_key_values=cache, **GREEDY), assisted)
