"""FrameFusion: the budget, runs of similar tokens, and whole prompts against a plain restatement."""

import pytest
import torch
from transformers import DynamicCache

from accelerate_methods import MethodError
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.engine.recording import ItemRecord, RequestRecord, SampleRecord
from accelerate_methods.framefusion import FrameFusion, merge_into, neighbour_similarity, pruning_ratio, run_owners
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.prefill import VisualSpan
from tests.support.prompts import LAYERS, decoder


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_what_has_to_go():
    assert pruning_ratio([], 0.3, 28) == pytest.approx(0.7)
    assert pruning_ratio([0.5], 0.3, 28) == pytest.approx(1 - (8.4 - 0.5) / (27 * 0.5))
    assert pruning_ratio([0.8], 0.3, 28) == 0.0, "already cheaper than asked"
    assert pruning_ratio([0.0] * 9, 0.3, 28) == 1.0, "the budget is used up"
    assert pruning_ratio([0.1], 1.0, 1) == 1.0


def frames(hidden, batch=1):
    """Kinds of F frames of P tokens behind one row of text, two rows of text behind."""
    count, places = hidden
    row = torch.cat([torch.tensor([-1]), torch.arange(places).repeat(count), torch.tensor([-1, -1])])
    return row.expand(batch, -1)


def test_neighbours_are_the_same_place_of_the_frame_before():
    kinds = frames((3, 4))
    hidden = torch.randn(1, 15, 8, generator=torch.Generator().manual_seed(0))
    similarity, _ = neighbour_similarity(hidden, kinds)
    video = hidden[0, 1:13].view(3, 4, 8)
    expected = torch.cosine_similarity(video[1:], video[:-1], dim=-1)
    torch.testing.assert_close(similarity[0, 5:13].view(2, 4), expected)
    assert (similarity[0, :5] == -2).all() and (similarity[0, 13:] == -2).all()


def test_runs_become_the_mean_at_their_earliest_frame():
    kinds = frames((4, 1))
    hidden = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0))
    _, order = neighbour_similarity(hidden, kinds)
    merged = torch.tensor([[False, False, True, True, False, False, False]])
    owner = run_owners(merged, order)
    assert owner.tolist() == [[0, 1, 1, 1, 4, 5, 6]]
    states = merge_into(hidden, owner, merged, 2)
    torch.testing.assert_close(states[0, 1], hidden[0, 1:4].mean(0))
    assert torch.equal(states[0, [0, 4, 5, 6]], hidden[0, [0, 4, 5, 6]]), "what holds nobody else is left alone"


def prompt(samples, seed=0, alike=0.9):
    """Samples of (frames, tokens per frame); neighbours in time are more or less alike."""
    generator = torch.Generator().manual_seed(seed)
    rows, spans = [], []
    for count, places in samples:
        video = torch.randn(places, 32, generator=generator).repeat(count, 1)
        noise = torch.randn(count * places, 32, generator=generator)
        noise *= torch.rand(count * places, 1, generator=generator) * 2 * (1 - alike)
        text = torch.randn(4, 32, generator=generator)
        rows.append(torch.cat([text[:1], video + noise, text[1:]]))
    longest = max(map(len, rows))
    embeds = torch.stack([torch.cat([torch.zeros(longest - len(r), 32), r]) for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    visual = torch.zeros(mask.shape, dtype=torch.bool)
    for row, ((count, places), own) in enumerate(zip(samples, rows, strict=True)):
        start, length = longest - len(own) + 1, count * places
        visual[row, start : start + length] = True
        span = VisualSpan(start, length, "video", length, frames=count, frame_rows=places)
        spans.append([span] if length else [])
    layout = PromptLayout(visual, [len(r) for r in rows], spans)
    padded = mask if mask.min() == 0 else None
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"inputs_embeds": embeds, "attention_mask": padded, "position_ids": positions, "layout": layout}


def record_of(inputs):
    request = RequestRecord()
    for spans in inputs["layout"].spans:
        items = [
            ItemRecord(
                modality="video", tokens_before=s.length, tokens_after=s.length, start=s.start,
                owner=torch.arange(s.length)[None], positions=torch.arange(s.length),
                kept=torch.ones(1, s.length, dtype=torch.bool),
            )
            for s in spans
        ]  # fmt: skip
        request.samples.append(SampleRecord(items=items))
    request.started(LAYERS)
    return request


@pytest.mark.parametrize("params", [{}, {"similarity_lower_bound": 0.97}, {"cost": 0.7, "ratio_lower_bound": 0.4}])
def test_a_batch_is_its_samples(params):
    samples = [(5, 6), (3, 4), (1, 7), (0, 0)]
    inputs, method = prompt(samples), Pipeline((FrameFusion(**params),))
    request, model = record_of(inputs), decoder()
    cache = DynamicCache(config=model.config)
    out = run_decoder(model.model, method, **inputs, request=request, past_key_values=cache, use_cache=True)
    for row in range(len(samples)):
        real = slice(None) if inputs["attention_mask"] is None else inputs["attention_mask"][row].bool()
        missing = inputs["inputs_embeds"].shape[1] - inputs["layout"].lengths[row]
        spans = [
            VisualSpan(s.start - missing, s.length, "video", s.length, frames=s.frames, frame_rows=s.frame_rows)
            for s in inputs["layout"].spans[row]
        ]
        layout = PromptLayout(inputs["layout"].visual[row, real][None], [inputs["layout"].lengths[row]], [spans])
        embeds, positions = inputs["inputs_embeds"][row, real][None], inputs["position_ids"][row, real][None]
        alone = run_decoder(model.model, method, inputs_embeds=embeds, position_ids=positions, layout=layout)
        valid = slice(None) if out.kept_valid is None else out.kept_valid[row]
        rows = torch.arange(layout.lengths[0]) if alone.kept is None else alone.kept[0]
        assert torch.equal(out.kept[row][valid] - missing, rows)
        torch.testing.assert_close(out.last_hidden_state[row][valid], alone.last_hidden_state[0], atol=2e-5, rtol=2e-5)
        if not spans:
            assert len(rows) == layout.lengths[0], "text is left alone"


def test_a_record_says_where_every_token_went():
    inputs = prompt([(6, 8)], alike=0.98)
    request = record_of(inputs)
    out = run_decoder(decoder().model, Pipeline((FrameFusion(ratio_lower_bound=0.9),)), **inputs, request=request)
    (item,) = request.samples[0].items
    held, left = item.held_by[0], set(out.kept[0].tolist())
    assert set(held[held >= 0].tolist()) <= left and (held >= 0).any()
    moved = (held >= 0) & (held != torch.arange(1, 49))
    assert moved.any() and ((held[moved] - 1) % 8 == torch.arange(48)[moved] % 8).all(), "into the same place"
    assert (item.merged_at[0][moved] < LAYERS).all() and (item.left_at[0][held >= 0] == LAYERS).all()


def test_pictures_are_left_alone():
    inputs = prompt([(4, 6)])
    layout = inputs["layout"]
    layout.spans = [[VisualSpan(s.start, s.length, "image", s.length) for s in spans] for spans in layout.spans]
    out = run_decoder(decoder().model, Pipeline((FrameFusion(),)), **inputs)
    assert out.kept is None


def test_layers_without_two_halves_are_refused():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    model = PhiForCausalLM(config).eval()
    with pytest.raises(MethodError, match="PhiDecoderLayer has no point between attention and MLP"):
        run_decoder(model.model, Pipeline((FrameFusion(),)), **prompt([(4, 6)]))
