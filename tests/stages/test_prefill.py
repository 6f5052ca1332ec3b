"""What every method with a prefill stage must keep to: batches, padding, records, and what it leaves alone."""

import pytest
import torch
from hypothesis import given
from transformers import DynamicCache

from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.decode import DecodeMethod
from accelerate_methods.stages.prefill import PrefillMethod
from tests.support.configured import configured
from tests.support.items import each_variant, ratios
from tests.support.prompts import LAYERS, assert_decodes, decoder, in_llm, make_prompts, prompts, some

pytestmark = pytest.mark.usefixtures("one_thread")


@each_variant(PrefillMethod)
@some
@given(asked=prompts, ratio=ratios)
def test_prefill_stage(name, params, asked, ratio):
    pipeline = in_llm(name, ratio, params, "prefill")
    if pipeline is None:
        return
    (method,) = pipeline.prefills
    model, layout, inputs = decoder(), asked.layout, asked.inputs
    given_embeds, given_visual, given_spans = inputs["inputs_embeds"].clone(), layout.visual.clone(), layout.spans
    request, state, cache = asked.record(), torch.get_rng_state(), DynamicCache(config=model.config)
    with torch.no_grad():
        out = run_decoder(model.model, pipeline, **inputs, request=request, past_key_values=cache, use_cache=True)
        again = run_decoder(model.model, pipeline, **inputs)
        alone = [run_decoder(model.model, pipeline, **asked.sample(row).inputs) for row in range(len(asked.samples))]
    assert torch.equal(state, torch.get_rng_state()), "the global random state was used"
    assert torch.equal(inputs["inputs_embeds"], given_embeds) and inputs["layout"].spans == given_spans
    assert torch.equal(inputs["layout"].visual, given_visual), "the input was changed"
    assert torch.isfinite(out.last_hidden_state).all()
    assert torch.equal(again.last_hidden_state, out.last_hidden_state)
    longest = max(asked.lengths)
    kept = torch.arange(longest).expand(len(asked.samples), -1) if out.kept is None else out.kept
    real = torch.arange(longest) >= longest - torch.tensor(asked.lengths)[:, None]
    valid = real if out.kept is None else torch.ones_like(kept).bool() if out.kept_valid is None else out.kept_valid
    own = layout.only(method.modalities)
    for row, single in enumerate(alone):
        rows = kept[row][valid[row]]
        assert len(set(rows.tolist())) == len(rows) and real[row][rows].all(), "each once, and no padding"
        left = torch.zeros(longest, dtype=torch.bool).index_fill(0, rows, True)
        block = own.blocks()[row]
        assert left[real[row] & ~block].all(), "text and other modalities stay"
        visual = int((left & block).sum())
        once = acts_once(method)
        text = rows[~block[rows]]
        assert (text.diff() > 0).all() and (not once or (rows.diff() > 0).all()), "in order"
        whole = method.class_stages() == ("prefill",)  # or else the ratio is that of what goes into the LLM
        if once and whole and getattr(method, "retention_ratio", None) is not None and int(block.sum()):
            assert visual <= max(1, int(block.sum() * ratio + 0.5)) + int((block & ~layout.visual[row]).sum())
        # the same as alone
        own_rows = torch.arange(asked.lengths[row]) if single.kept is None else single.kept[0]
        assert torch.equal(rows - (longest - asked.lengths[row]), own_rows)
        torch.testing.assert_close(
            out.last_hidden_state[row][valid[row]], single.last_hidden_state[0], atol=2e-5, rtol=2e-5
        )
        # the record
        lengths = request.layer_lengths(row)
        assert lengths == sorted(lengths, reverse=True) and lengths[-1] >= len(rows)
        if once:
            (layer,) = method.prefill_layers(LAYERS)
            assert lengths == [asked.lengths[row]] * layer + [len(rows)] * (LAYERS - layer)
        for item, span in zip(request.samples[row].items, layout.spans[row], strict=True):
            stood = torch.arange(span.start, span.start + span.num_content)
            held = stood if item.held_by is None else item.held_by[0]
            assert (item.left_at[0][held >= 0] == LAYERS).all() and left[held[held >= 0]].all()
            assert lengths[-1] > len(rows) or (held[item.left_at[0] == LAYERS] >= 0).all(), "or after the last layer"
            assert torch.equal(held == stood, left[stood]), "what stands holds itself"
            elsewhere, merged = (held >= 0) & (held != stood), (item.merged_at[0] < LAYERS) & (held >= 0)
            at_the_end = lengths[-1] > len(rows)  # merges inside the last layer are not told from none
            assert torch.equal(elsewhere, merged | elsewhere if at_the_end else merged)
            if once:
                assert torch.equal(item.left_at[0], torch.where(held >= 0, LAYERS, layer))
    with torch.no_grad():
        assert_decodes(model, pipeline, inputs, cache, len(asked.samples))


def acts_once(method):
    """Whether it drops tokens before one layer, and does nothing else."""
    return len(method.prefill_layers(LAYERS)) == 1 and not method.inner_layers(LAYERS)


@each_variant(PrefillMethod)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill_stage_in_half_precision(name, params, dtype):
    pipeline = in_llm(name, 0.3, params, "prefill")
    if pipeline is None:
        return
    asked = make_prompts([[("video", 12, True)], [], [("image", 3, False), ("video", 5, True)]], 2, "random", 0)
    asked.embeds = [e.to(dtype) for e in asked.embeds]
    with torch.no_grad():
        out = run_decoder(decoder(dtype).model, pipeline, **asked.inputs)
    assert out.last_hidden_state.dtype == dtype and torch.isfinite(out.last_hidden_state).all()
    assert out.kept.shape[1] < max(asked.lengths)


@each_variant(PrefillMethod, DecodeMethod)
@some
@given(asked=prompts)
def test_stages_in_the_llm_leave_the_rest_alone(name, params, asked):
    """Text, and modalities that are not the method's own, run as without it: the prompt and the decode steps."""
    method = configured(name, 0.3, **params)
    pipeline, model, inputs = Pipeline((method,)), decoder(), asked.inputs
    if pipeline.acts_on_text:  # nothing is left alone
        return
    inputs["layout"] = inputs["layout"].only(frozenset({"image", "video"}) - method.modalities)
    with torch.no_grad():
        mine, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
        out = run_decoder(model.model, pipeline, **inputs, past_key_values=mine)
        dense = run_decoder(model.model, Pipeline(), **inputs, past_key_values=plain)
        assert out.kept is None and torch.equal(out.last_hidden_state, dense.last_hidden_state)
        mask = inputs["attention_mask"]
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        new = torch.randn(len(asked.samples), 1, 32, generator=torch.Generator().manual_seed(1))
        steps = [
            run_decoder(model.model, p, inputs_embeds=new, attention_mask=mask, past_key_values=c).last_hidden_state
            for p, c in ((pipeline, mine), (Pipeline(), plain))
        ]
    assert torch.equal(*steps)
