"""Something else compresses the KV cache of the model to which a method is attached, as NVIDIA's kvpress does.

kvpress puts a forward hook on every attention module. Behind the call that computes the prompt the hook leaves the
best entries in the cache, other ones in each head. Its releases so far need a transformers below 5.3; here a hook of
the same kind stands for it, and the package itself is tried where it runs.
"""

import contextlib

import pytest
import torch
from transformers import DynamicCache

from accelerate_methods import MethodError, accelerate, detach
from tests.hosts.native.test_assisted import HOSTS, method_of
from tests.support import hand_cut
from tests.support import native_questions as llava
from tests.support import qwen_inputs as qwen
from tests.support.configured import configured

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


@contextlib.contextmanager
def pressed(model, keep=0.5, every_call=False):
    """While open, every layer keeps the entries whose keys are shortest, head by head."""

    def hook(module, args, kwargs, output):
        hidden, cache = args[0] if args else kwargs["hidden_states"], kwargs["past_key_values"]
        layer = cache.layers[module.layer_idx]
        if every_call or layer.keys.shape[2] == hidden.shape[1]:
            count = int(layer.keys.shape[2] * keep)
            best = (-layer.keys.norm(dim=-1)).topk(count, dim=-1).indices[..., None]
            layer.keys, layer.values = (
                states.gather(2, best.expand(-1, -1, -1, states.shape[-1])) for states in (layer.keys, layer.values)
            )

    hooks = [
        layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.language_model.layers
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def answer(model, asked, **more):
    """Ids, logits of each step, entries of each layer."""
    out = model.generate(**asked, **GREEDY, **more, output_logits=True, return_dict_in_generate=True)
    entries = [out.past_key_values.get_seq_length(index) for index in range(len(out.past_key_values.layers))]
    return out.sequences, torch.stack(out.logits), entries


@pytest.mark.parametrize("where", HOSTS)
def test_a_full_budget_is_the_pressed_model(where):
    model, asked = HOSTS[where]()
    with pressed(model):
        ids, logits, entries = answer(model, asked)
    assert not torch.equal(logits, answer(model, asked)[1]), "the press does something"
    with accelerate(model, "random", retention_ratio=1.0), pressed(model):
        both = answer(model, asked)
    assert torch.equal(both[0], ids) and both[2] == entries
    torch.testing.assert_close(both[1], logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", qwen.MODELS)
def test_a_compressed_prompt_is_pressed_as_if_it_were_the_prompt(name):
    model, question = qwen.qwen(name), qwen.QUESTIONS["image and video"]
    asked, method = qwen.inputs(model, question), configured("visionzip", ratio=0.4)
    dense = hand_cut.dense_inputs(model, asked)
    cut = hand_cut.cut(dense, 0, qwen.items(model, asked, dense, 0, [question]), method)
    with pressed(model):
        logits, ids = hand_cut.language_model(model, cut, NEW)
    with accelerate(model, method), pressed(model):
        got = answer(model, asked)
    assert got[0][0, asked["input_ids"].shape[1] :].tolist() == ids
    torch.testing.assert_close(got[1][:, 0], logits, atol=2e-4, rtol=2e-4)
    assert set(got[2]) == {len(cut.source) // 2 + NEW - 1}, "both were saved"


@pytest.mark.parametrize("names", ["fastv", "random_prefill", "random+fastv", "prunevid"])
@pytest.mark.parametrize("where", ["onevision", "qwen2_5"])
def test_methods_inside_the_language_model_need_the_whole_cache(where, names):
    model, asked = HOSTS[where]()
    before = answer(model, asked)[0]
    with accelerate(model, method_of(names, where)):
        with pressed(model), pytest.raises(MethodError, match=r"layer 0 has \d+ entries.*kvpress.*inside the language"):
            answer(model, asked)
        answer(model, asked)
    assert torch.equal(answer(model, asked)[0], before), "nothing of it is left"


def test_decode_methods_need_the_whole_cache():
    model, asked = HOSTS["onevision"]()
    refused = pytest.raises(MethodError, match="acts inside the language model and needs the whole cache")
    with accelerate(model, configured("dycoke")), pressed(model), refused:
        answer(model, asked)


def test_nobody_knows_which_entries_of_a_pressed_batch_are_padding():
    model, asked = llava.native(llava.V15), llava.inputs(llava.V15, *llava.BATCH[llava.V15])
    refused = pytest.raises(MethodError, match="for prompts without padding only")
    with accelerate(model, "random", retention_ratio=0.5), pressed(model), refused:
        answer(model, asked)
    detach(model)


@pytest.mark.parametrize("names", ["random", "fastv"])
def test_a_cache_that_is_pressed_in_later_steps_is_refused(names):
    """How far the answer has come is counted by entries."""
    model, asked = HOSTS["llava"]()
    with accelerate(model, method_of(names, "llava")):
        cache = DynamicCache(config=model.config)
        model(**asked, past_key_values=cache)
        with pressed(model, every_call=True), pytest.raises(MethodError, match="not in later steps"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("names", ["random", "fastv"])
def test_kvpress_itself(names):
    kvpress = pytest.importorskip("kvpress")
    model, asked = HOSTS["llava"]()
    try:
        with kvpress.KnormPress(compression_ratio=0.5)(model):
            ids, _, entries = answer(model, asked)
    except (KeyError, TypeError) as error:
        pytest.skip(f"this kvpress does not run on this transformers: {error!r}")
    full = {"retention_ratio": 1.0} if names == "random" else {"k": 2, "r": 0.5}
    with accelerate(model, names, **full), kvpress.KnormPress(compression_ratio=0.5)(model):
        if names == "random":
            both = answer(model, asked)
            assert torch.equal(both[0], ids) and both[2] == entries
        else:
            with pytest.raises(MethodError, match="needs the whole cache"):
                answer(model, asked)
