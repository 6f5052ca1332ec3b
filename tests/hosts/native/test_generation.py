"""What programs do with ``generate`` and ``forward``, with methods attached that keep everything.

The kinds are those of transformers' own generation and model tests, and of scripts that call the model step by step.
Each gives what the untouched model gives, to the last score, or is one MethodError.
"""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from accelerate_methods import MethodError, accelerate, detach
from tests.hosts.native import test_internvl as internvl
from tests.hosts.native import test_llava_next_video as next_video
from tests.hosts.native.test_assisted import HOSTS
from tests.support import native_questions as llava
from tests.support import qwen_inputs as qwen

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")

NEW = 4
MANY = list(range(5, 60))  # ids that end an answer: samples of a batch stop at different times
FULL = {"random+fastv": {"random.retention_ratio": 1.0, "fastv.k": 2, "fastv.r": 0.0}}
MODELS = ("llava", "onevision", "qwen2", "qwen2_5", "qwen3", "internvl")
BATCHES = {
    **{
        where: lambda name=name: (llava.native(name), llava.inputs(name, *llava.BATCH[name]))
        for where, name in (("llava", llava.V15), ("next", llava.V16), ("onevision", llava.OV))
    },
    **{
        where: lambda name=name: (qwen.qwen(name), qwen.inputs(qwen.qwen(name), *qwen.BATCH))
        for where, name in (("qwen2", qwen.QWEN2), ("qwen2_5", qwen.QWEN25), ("qwen3", qwen.QWEN3))
    },
    "next_video": lambda: (next_video.tiny(), next_video.inputs(next_video.tiny(), *next_video.BATCH)),
    "internvl": lambda: (internvl.internvl(), internvl.inputs("tiled image", "text", "image")),
}


class Penalty(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.scatter_add(1, input_ids[:, -1:], torch.full_like(scores[:, :1], -5.0))


class AtThirds(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] % 3 == 0)


class Streamer:
    def __init__(self):
        self.parts = []

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        pass


# -- what clients do: (model, inputs) -> tensors -----------------------------------------------------------------------


def generate(model, asked, **more):
    torch.manual_seed(0)
    # without a cache, a placeholder in the answer would ask for another image
    suppressed = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    more = {"suppress_tokens": [token for token in suppressed if token is not None], **more}
    more = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **more}
    out = model.generate(
        **asked, pad_token_id=0, return_dict_in_generate=True, output_logits=True, output_scores=True, **more
    )
    found = {"ids": out.sequences, "logits": torch.stack(out.logits), "scores": torch.stack(out.scores).clamp(min=-1e4)}
    if getattr(out, "sequences_scores", None) is not None:
        found["beams"] = out.sequences_scores
    if isinstance(out.past_key_values, DynamicCache):
        found["length"] = torch.tensor(out.past_key_values.get_seq_length())
        for index, layer in enumerate(out.past_key_values.layers):
            found |= {f"keys {index}": layer.keys, f"values {index}": layer.values}
    return found


def forward(model, asked, **more):
    return {"logits": model(**{**asked, **more})[0]}


def generating(**more):
    return lambda model, asked: generate(model, asked, **more)


def without(asked, *names):
    return {name: value for name, value in asked.items() if name not in names}


def text_of(asked):
    return {name: asked[name][:, -3:] for name in ("input_ids", "attention_mask")}


def longer(mask, count):
    return torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)


def only_ids(model, asked):
    return {"ids": model.generate(**without(asked, "input_ids"), inputs=asked["input_ids"], max_new_tokens=NEW)}


def streamed(model, asked):
    streamer = Streamer()
    return {**generate(model, asked, streamer=streamer), "streamed": torch.cat(streamer.parts)}


def going_on(model, asked):
    first = model.generate(**asked, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    ids = first.sequences
    mask = longer(asked["attention_mask"], ids.shape[1] - asked["input_ids"].shape[1])
    return generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)


def without_caches(found):
    """Less what stands in padding: nobody's."""
    return {name: value for name, value in found.items() if not name.startswith(("keys", "values"))}


def padded(model, asked):
    more = {
        name: torch.nn.functional.pad(asked[name], (4, 0))
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in asked
    }
    return without_caches(generate(model, {**asked, **more}))


def assisted(model, asked, **more):
    draft = copy.deepcopy(model)
    draft.generation_config.num_assistant_tokens = 3
    return {"ids": generate(model, asked, assistant_model=draft, **more)["ids"]}


def looked_up(model, asked):
    return {"ids": generate(model, asked, prompt_lookup_num_tokens=2)["ids"]}


def step_by_step(model, asked):
    out, logits = model(**without(asked, "attention_mask"), use_cache=True), []
    for _ in range(NEW):
        logits.append(out.logits[:, -1])
        out = model(input_ids=logits[-1].argmax(-1)[:, None], past_key_values=out.past_key_values)
    return {"logits": torch.stack(logits)}


def with_masks(model, asked):
    cache, mask, logits = DynamicCache(config=model.config), asked["attention_mask"], []
    out = model(**asked, past_key_values=cache)
    for _ in range(NEW):
        logits.append(out.logits[:, -1])
        mask = longer(mask, 1)
        out = model(input_ids=logits[-1].argmax(-1)[:, None], attention_mask=mask, past_key_values=cache)
    return {"logits": torch.stack(logits)}


def as_generate_does(model, asked):
    ids, more, logits = asked["input_ids"], without(asked, "input_ids") | {"use_cache": True}, []
    more["past_key_values"] = DynamicCache(config=model.config)
    for step in range(NEW):
        new = {"next_sequence_length": 1} if step else {}
        out = model(**model.prepare_inputs_for_generation(ids, is_first_iteration=not step, **new, **more))
        more = model._update_model_kwargs_for_generation(out, more)
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1)[:, None]], dim=1)
    return {"logits": torch.stack(logits)}


def later_turn(model, asked):
    cache = DynamicCache(config=model.config)
    model(**asked, past_key_values=cache)
    return {"logits": model(input_ids=torch.tensor([[31, 32, 33]]), past_key_values=cache).logits}


def eager(model, asked, **more):
    model.set_attn_implementation("eager")
    try:
        return generate(model, asked, **more)
    finally:
        model.set_attn_implementation("sdpa")


def features(model, asked):
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
    given = {name: asked[name] for name in names if name in asked}
    found = model.get_image_features(**given).pooler_output if given else []
    return {str(number): part for number, part in enumerate(found)}


def embedded(model, asked, **more):
    embeds = model.get_input_embeddings()(asked["input_ids"])
    return generate(model, {**without(asked, "input_ids"), "inputs_embeds": embeds}, **more)


def positions(model, asked):
    at = torch.arange(asked["input_ids"].shape[1])[None]
    return forward(model, asked, position_ids=at)


def packed(model, asked):
    at = torch.arange(asked["input_ids"].shape[1])[None].clone()
    at[:, -2:] -= at[0, -2].item()
    return forward(model, without(asked, "attention_mask"), position_ids=at)


def square_mask(asked):
    length = asked["input_ids"].shape[1]
    return torch.ones(length, length).tril().bool()[None, None]


CLIENTS = {
    "greedy": generate,
    "ids alone": only_ids,
    "no mask": lambda model, asked: generate(model, without(asked, "attention_mask")),
    "no cache": generating(use_cache=False),
    "ends": generating(min_new_tokens=None, eos_token_id=MANY),
    "stopping criteria": generating(min_new_tokens=None, stopping_criteria=StoppingCriteriaList([AtThirds()])),
    "streamer": streamed,
    "not compiled": generating(disable_compile=True),
    "sampling": generating(do_sample=True, top_k=20, temperature=0.7),
    "several samples": generating(do_sample=True, num_return_sequences=2),
    "sampling without a cache": generating(do_sample=True, use_cache=False),
    "beams": generating(num_beams=3, num_return_sequences=2, length_penalty=2.0, early_stopping=True),
    "beams without a cache": generating(num_beams=2, use_cache=False),
    "beams that end": generating(num_beams=3, min_new_tokens=None, eos_token_id=MANY),
    "beam sampling": generating(num_beams=3, do_sample=True),
    "assisted": assisted,
    "assisted sampling": lambda model, asked: assisted(model, asked, do_sample=True),
    "prompt look-up": looked_up,
    "processors": generating(
        **{"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "bad_words_ids": [[1, 0]]},
        logits_processor=LogitsProcessorList([Penalty()]),
    ),
    "guidance": generating(guidance_scale=1.5),
    "watermark": generating(watermarking_config=WatermarkingConfig(bias=2.0)),
    "dynamic cache": generating(cache_implementation="dynamic"),
    "own cache": lambda model, asked: generate(model, asked, past_key_values=DynamicCache()),
    "going on": going_on,
    "left padding": padded,
    "step by step": step_by_step,
    "step by step with masks": with_masks,
    "as generate does": as_generate_does,
    "later turn": later_turn,
    "forward": forward,
    "tuples": lambda model, asked: forward(model, asked, return_dict=False),
    "last row": lambda model, asked: forward(model, asked, logits_to_keep=1),
    "rows by number": lambda model, asked: forward(model, asked, logits_to_keep=torch.tensor([-1, -3])),
    "positions": positions,
    "eager": eager,
    "features": features,
    "text": lambda model, asked: generate(model, text_of(asked)),
    "text, beams": lambda model, asked: generate(model, text_of(asked), num_beams=2),
    "text, look-up": lambda model, asked: looked_up(model, text_of(asked)),
    "text, packed": lambda model, asked: packed(model, text_of(asked)),
    "text, square mask": lambda model, asked: forward(
        model, text_of(asked), attention_mask=square_mask(text_of(asked))
    ),
}

#: what the untouched model cannot do, so there is nothing to compare with
IMPOSSIBLE = {
    # positions of Qwen's models come from ids and mask together; the recipes give only part of them
    **{name: {"qwen2", "qwen2_5", "qwen3"} for name in ("guidance", "step by step with masks", "as generate does")},
}

REFUSED = {
    "static cache": (generating(cache_implementation="static"), "needs a DynamicCache"),
    "a static cache": (
        lambda model, asked: generate(
            model, asked, past_key_values=StaticCache(model.config.get_text_config(), max_cache_len=2000)
        ),
        "needs a DynamicCache",
    ),
    "text, static cache": (
        lambda model, asked: generate(model, text_of(asked), cache_implementation="static"),
        "needs a DynamicCache",
    ),
    "chunks": (generating(prefill_chunk_size=4), "cut into pieces"),
    "attention": (lambda model, asked: eager(model, asked, output_attentions=True), "output_attentions"),
    "states": (generating(output_hidden_states=True), "output_hidden_states"),
    "states of a forward": (
        lambda model, asked: forward(model, asked, output_hidden_states=True),
        "output_hidden_states",
    ),
    "embeddings": (embedded, "inputs_embeds"),
    "embeddings and beams": (lambda model, asked: embedded(model, asked, num_beams=2), "inputs_embeds"),
    "embeddings of text": (lambda model, asked: embedded(model, text_of(asked)), "inputs_embeds"),
    "embeddings beside ids": (
        lambda model, asked: generate(
            model, {**asked, "inputs_embeds": model.get_input_embeddings()(asked["input_ids"])}
        ),
        "inputs_embeds",
    ),
    "square mask": (
        lambda model, asked: forward(model, asked, attention_mask=square_mask(asked)),
        "2-D attention_mask",
    ),
    "mask of numbers": (
        lambda model, asked: forward(model, asked, attention_mask=square_mask(asked).float().log().clamp(min=-1e30)),
        "2-D attention_mask",
    ),
    "packed": (packed, "packed prompts"),
    "base model": (lambda model, asked: model.model(**asked), "model.model"),
}


PADDED = ("greedy", "ends", "beams", "beams that end", "several samples", "no cache", "eager")


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert got[name].shape == value.shape, name
        if value.is_floating_point():
            torch.testing.assert_close(got[name], value, atol=2e-4, rtol=2e-4, msg=lambda said, n=name: f"{n}: {said}")
        else:
            assert torch.equal(got[name], value), name


@pytest.mark.share(3, each=("client", "names"))
@pytest.mark.parametrize("names", FULL)
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("where", MODELS)
def test_a_full_budget_is_the_untouched_model(where, client, names):
    run = CLIENTS[client]
    model, asked = HOSTS[where]()
    if where in IMPOSSIBLE.get(client, ()):
        with pytest.raises((RuntimeError, IndexError)):
            run(model, asked)
        pytest.skip("the untouched model cannot, either")
    wanted = run(model, asked)
    with accelerate(model, names, **FULL[names]):
        assert_same(run(model, asked), wanted)


@pytest.mark.share(3, each=("client",))
@pytest.mark.parametrize(
    "client", ["greedy", "ends", "beams", "beams that end", "several samples", "no cache", "eager"]
)
@pytest.mark.parametrize("where", BATCHES)
def test_padded_batches_at_a_full_budget(where, client):
    """Caches and last rows, too: where nothing is dropped, padding stays where the caller had it."""
    model, asked = BATCHES[where]()
    wanted = CLIENTS[client](model, asked)
    with accelerate(model, "random+fastv", **FULL["random+fastv"]):
        assert_same(without_caches(CLIENTS[client](model, asked)), without_caches(wanted))


@pytest.mark.share(3, each=("client",))
@pytest.mark.parametrize("client", REFUSED)
@pytest.mark.parametrize("where", MODELS)
def test_what_is_refused_is_one_error(where, client):
    run, says = REFUSED[client]
    model, asked = HOSTS[where]()
    before = generate(model, asked)
    with accelerate(model, "random+fastv", **FULL["random+fastv"]):
        with pytest.raises(MethodError, match=says) as refused:
            run(model, asked)
        assert "\n" not in str(refused.value)
        assert_same(generate(model, asked), before)
    detach(model)
