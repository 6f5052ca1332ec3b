"""Prompts with images and videos in them, a tiny decoder to run them, and what every stage in it must keep to."""

import dataclasses
import functools

import torch
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.recording import ItemRecord, RequestRecord, SampleRecord
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.prefill import VisualSpan
from tests.support.configured import configured
from tests.support.items import features_of
from tests.support.shares import examples_of

LAYERS = 4


@functools.cache
def decoder(dtype=torch.float32):
    """A tiny random decoder, GQA 4 heads on 2."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        return Qwen2ForCausalLM(config).eval().to(dtype)


@dataclasses.dataclass
class Prompts:
    """Prompts of different length and content, padded on the left."""

    samples: list[list[tuple[str, int, bool]]]  # items: modality, visual tokens, whether a newline follows
    lengths: list[int]
    embeds: list[torch.Tensor]

    @property
    def layout(self):
        longest = max(self.lengths)
        visual = torch.zeros(len(self.samples), longest, dtype=torch.bool)
        spans = []
        for row, (items, length) in enumerate(zip(self.samples, self.lengths, strict=True)):
            start, here = longest - length + 1, []
            for modality, tokens, newline in items:
                here.append(VisualSpan(start, tokens + newline, modality, tokens))
                visual[row, start : start + tokens] = True
                start += tokens + newline + 1
            spans.append(here)
        return PromptLayout(visual, [*self.lengths], spans)

    @property
    def inputs(self):
        longest = max(self.lengths)
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in self.lengths])
        return {
            "inputs_embeds": torch.stack(
                [torch.nn.functional.pad(e, (0, 0, longest - len(e), 0)) for e in self.embeds]
            ),
            "attention_mask": mask if longest > min(self.lengths) else None,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "layout": self.layout,
        }

    def sample(self, row):
        return Prompts(self.samples[row : row + 1], self.lengths[row : row + 1], self.embeds[row : row + 1])

    def record(self):
        """A request whose items are uncompressed."""
        request = RequestRecord()
        for spans in self.layout.spans:
            request.samples.append(SampleRecord(items=[
                ItemRecord(
                    modality=s.modality, tokens_before=s.num_content, tokens_after=s.num_content, start=s.start,
                    owner=torch.arange(s.num_content)[None], positions=torch.arange(s.length),
                    kept=torch.ones(1, s.num_content, dtype=torch.bool),
                )
                for s in spans
            ]))  # fmt: skip
        request.started(LAYERS)
        return request


def make_prompts(samples, tail, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + sum(n + newline + 1 for _, n, newline in items) + tail for items in samples]
    return Prompts(samples, lengths, [features_of(kind, (n, 32), generator) for n in lengths])


prompts = st.builds(
    make_prompts,
    samples=st.lists(
        st.lists(st.tuples(st.sampled_from(["image", "video"]), st.integers(1, 12), st.booleans()), max_size=3),
        min_size=1,
        max_size=3,
    ),
    tail=st.integers(1, 3),
    kind=st.sampled_from(["random", "ties"]),
    seed=st.integers(0, 5),
)
some = examples_of(50)


def in_llm(name, ratio, params, stage):
    """A pipeline of one method, where its stage is on."""
    method = configured(name, ratio, **params)
    return Pipeline((method,)) if stage in method.stages else None


def run(method, asked, *more):
    """Prompts through the decoder under the methods, with a cache: the loop's output, the record, the cache."""
    model = decoder()
    cache, request = DynamicCache(config=model.config), asked.record()
    pipeline = Pipeline((method, *more))
    pipeline.check_layers(LAYERS)
    out = run_decoder(model.model, pipeline, **asked.inputs, request=request, past_key_values=cache, use_cache=True)
    return out, request, cache


def assert_decodes(model, pipeline, inputs, cache, batch, steps=2):
    """Decode steps on top of a prompt, whose layers each cache one key more in every step."""
    lengths = [cache.get_seq_length(i) for i in range(LAYERS)]
    mask = inputs["attention_mask"]
    for step in range(1, steps + 1):
        mask = None if mask is None else torch.cat([mask, mask.new_ones(batch, 1)], 1)
        new = torch.randn(batch, 1, 32, generator=torch.Generator().manual_seed(step))
        out = run_decoder(model.model, pipeline, inputs_embeds=new, attention_mask=mask, past_key_values=cache)
        assert torch.isfinite(out.last_hidden_state).all()
        assert [cache.get_seq_length(i) for i in range(LAYERS)] == [n + step for n in lengths], "the cache stays whole"


def by_layers(model, embeds, choose, compact=False):
    """A prompt [1, L, D] layer after layer, without a cache, and with rows leaving before layers.

    Args:
        choose: called as choose(layer, hidden, before, positions), ``before`` being what entered the layer before;
            gives the rows that go on, or None for all.
        compact: whether rows that go on are numbered anew.

    Returns:
        rows of the prompt that are left, and their states behind the last norm, [1, K, D].
    """
    hidden, before, kept = embeds, None, torch.arange(embeds.shape[1])
    positions = kept
    for index, layer in enumerate(model.model.layers):
        rows = choose(index, hidden, before, positions)
        if rows is not None:
            hidden, kept = hidden[:, rows], kept[rows]
            positions = torch.arange(len(rows)) if compact else positions[rows]
        before, rope = hidden, model.model.rotary_emb(hidden, positions[None])
        mask = torch.full((len(kept),) * 2, -torch.inf).triu(1)[None, None]
        out = layer(hidden, attention_mask=mask, position_embeddings=rope, past_key_values=None)
        hidden = out[0] if isinstance(out, tuple) else out
    return kept, model.model.norm(hidden)
