"""What every method with a decode stage must keep to, whichever it is."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from transformers import DynamicCache

from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.stages.decode import DecodeMethod, EvictMethod
from tests.support.items import each_variant
from tests.support.prompts import LAYERS, decoder, in_llm, prompts, some

pytestmark = pytest.mark.usefixtures("one_thread")


@each_variant(DecodeMethod)
@some
@given(asked=prompts)
def test_decode_stage(name, params, asked):
    pipeline = in_llm(name, 0.3, params, "decode")
    if pipeline is None:
        return
    if isinstance(pipeline.decode, EvictMethod):
        return
    method, model, batch = pipeline.decode, decoder(), len(asked.samples)
    cls, original, seen = type(method), type(method).decode, []

    def look(self, step):
        visual = step.visual.clone()
        keep = original(self, step)
        assert torch.equal(step.visual, visual), "the input was changed"
        seen.append((visual, step.valid, keep))
        return keep

    def run(asked, steps=3):
        seen.clear()
        inputs, out = asked.inputs, []
        cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
        run_decoder(model.model, pipeline, **inputs, past_key_values=cache)
        for step in range(steps):
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            new = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(step)).expand(
                len(asked.samples), -1, -1
            )
            out.append(
                run_decoder(model.model, pipeline, inputs_embeds=new, attention_mask=mask, past_key_values=cache)
            )
        assert [cache.get_seq_length(i) for i in range(LAYERS)] == [max(asked.lengths) + steps] * LAYERS
        return torch.cat([o.last_hidden_state for o in out], 1), [*seen]

    state = torch.get_rng_state()
    with torch.no_grad(), mock.patch.object(cls, "decode", look):
        together, steps = run(asked)
        again, same = run(asked)
        alone = [run(asked.sample(row)) for row in range(batch)]
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    assert torch.isfinite(together).all() and torch.equal(together, again)
    own = asked.layout.only(method.modalities).visual
    acts = method.decode_layer(LAYERS) < LAYERS and own.any()
    assert len(steps) == len(same) == (3 if acts else 0)
    for number, (visual, _, keep) in enumerate(steps):
        assert visual.shape == (batch, max(asked.lengths) + number + 1)
        assert torch.equal(visual[:, : own.shape[1]], own) and not visual[:, own.shape[1] :].any()
        if keep is None:
            continue
        assert keep.shape == visual.shape and keep.dtype == torch.bool
        assert not (~keep & ~visual).any(), "only visual keys can be hidden"
        if same[number][2] is not None:
            assert torch.equal(keep, same[number][2])
        for row, (_, looks) in enumerate(alone):
            hidden = int((~keep[row]).sum())
            assert hidden == (0 if not looks or looks[number][2] is None else int((~looks[number][2]).sum()))
    for row, (one, _) in enumerate(alone):
        torch.testing.assert_close(together[row], one[0], atol=2e-5, rtol=2e-5)


@each_variant(EvictMethod)
@settings(some, max_examples=10)
@given(asked=prompts)
def test_evictions(name, params, asked):
    """The cache gets no longer than in a run of each prompt alone, and every prompt goes on as it does alone."""
    pipeline = in_llm(name, 0.3, params, "decode")
    method, model, batch = pipeline.decode, decoder(), len(asked.samples)
    cls, original = type(method), type(method).evict

    def look(self, step):
        before = step.visual.clone(), None if step.valid is None else step.valid.clone()
        kept = original(self, step)
        assert torch.equal(step.visual, before[0]) and (before[1] is None or torch.equal(step.valid, before[1]))
        assert kept is None or kept.indices.shape[-1] <= step.entries
        return kept

    def run(asked):
        inputs, out, rows = asked.inputs, [], len(asked.samples)
        cache, mask, record = DynamicCache(config=model.config), inputs["attention_mask"], RequestRecord()
        out.append(run_decoder(model.model, pipeline, **inputs, past_key_values=cache, request=record))
        for number, new in enumerate((1, 1, 1, 3, 1, 1)):  # steps, a later turn, steps
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), new)], 1)
            tokens = torch.randn(1, new, 32, generator=torch.Generator().manual_seed(number)).expand(rows, -1, -1)
            more = {"attention_mask": mask, "past_key_values": cache, "request": record}
            out.append(run_decoder(model.model, pipeline, inputs_embeds=tokens, **more))
        assert cache.get_seq_length() == max(asked.lengths) + 8
        return torch.cat([o.last_hidden_state for o in out], 1), record.cached

    state = torch.get_rng_state()
    with torch.no_grad(), mock.patch.object(cls, "evict", look):
        together, lengths = run(asked)
        again, same = run(asked)
        alone = [run(asked.sample(row)) for row in range(batch)]
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    assert torch.isfinite(together).all() and torch.equal(together, again) and lengths == same
    # nobody waits for the device to learn that none of a turn's three tokens is padding
    spare = [max(here) - max(own) for here, own in zip(lengths, max(own for _, own in alone), strict=True)]
    assert set(spare) <= ({0, 1} if getattr(method, "policy", "") == "for_space" and batch > 1 else {0})
    for row, (one, _) in enumerate(alone):
        torch.testing.assert_close(together[row, -one.shape[1] :], one[0], atol=2e-5, rtol=2e-5)
