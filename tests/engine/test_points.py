"""Where prefill methods act: before and inside layers, several of them, and what they can ask about a layer."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache, Qwen2ForCausalLM

from accelerate_methods import MethodError
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.masks import prefill_mask
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.prefill import PrefillMethod, Selection, VisualSpan
from tests.support.prompts import LAYERS, decoder, make_prompts


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acts(PrefillMethod):
    """Calls ``does(step)`` at its points."""

    name = "acts"

    before: tuple[int, ...] = ()
    inside: tuple[int, ...] = ()
    unmasked: tuple[int, ...] = ()
    does: object = None

    def prefill_layers(self, num_layers):
        return self.before

    def inner_layers(self, num_layers):
        return self.inside

    def unmasked_layers(self, num_layers):
        return self.unmasked

    def prefill(self, step):
        return self.does(step)


def halves(step):
    """Every second visual row goes."""
    keep = ~step.block | (step.block.long().cumsum(1) % 2 == 1)
    return Selection.from_mask(keep if step.valid is None else keep & step.valid)


def one(count=14):
    return make_prompts([[("image", count, False)]], 3, "random", 0)


def run(method, asked, **more):
    return run_decoder(decoder().model, Pipeline((method,)), **asked.inputs, **more)


def attentions(asked):
    """[H, L, L] of every layer, by transformers' eager attention."""
    model = decoder()
    eager = Qwen2ForCausalLM(model.config.__class__(**model.config.to_dict()))
    eager.config._attn_implementation = "eager"
    eager.load_state_dict(model.state_dict())
    out = eager.eval().model(inputs_embeds=asked.inputs["inputs_embeds"], output_attentions=True)
    return [weights[0] for weights in out.attentions]


def test_rows_dropped_inside_a_layer_by_hand():
    asked, layer = one(), 1
    cache = DynamicCache(config=decoder().config)
    request = asked.record()
    out = run(Acts(inside=(layer,), does=halves), asked, request=request, past_key_values=cache, use_cache=True)
    model = decoder().model
    hidden, length = asked.inputs["inputs_embeds"], asked.lengths[0]
    rows = torch.arange(length)
    for index, block in enumerate(model.layers):
        rope = model.rotary_emb(hidden, rows[None])
        mask = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()[None, None]
        attended = block.self_attn(block.input_layernorm(hidden), position_embeddings=rope, attention_mask=mask)[0]
        hidden = hidden + attended
        if index == layer:
            visual = (rows >= 1) & (rows < 15)
            keep = ~visual | (visual.long().cumsum(0) % 2 == 1)
            hidden, rows = hidden[:, keep], rows[keep]
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    torch.testing.assert_close(out.last_hidden_state, model.norm(hidden), atol=2e-5, rtol=2e-5)
    assert out.kept[0].tolist() == rows.tolist()
    lengths = [length, length, length - 7, length - 7]
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == lengths == request.layer_lengths(0)
    assert set(request.samples[0].items[0].left_at[0].tolist()) == {layer + 1, LAYERS}
    again = run_decoder(model, Pipeline((Acts(inside=(layer,), does=halves),)), inputs_embeds=torch.zeros(1, 1, 32),
                        past_key_values=cache)  # fmt: skip
    assert torch.isfinite(again.last_hidden_state).all()


@pytest.mark.parametrize("trim", [False, True])
def test_attention_asked_for_inside_and_behind_a_cut(trim):
    asked, seen = one(), {}

    def does(step):
        rows = torch.arange(step.hidden_states.shape[1] - 3, step.hidden_states.shape[1])
        seen[step.layer, step.inside] = step.attention(rows), step.keys(), step.rows
        return dataclasses.replace(halves(step), trim_cache=trim) if step.inside else None

    run(Acts(inside=(1,), before=(2,), does=does), asked)
    expected = attentions(asked)[1]
    torch.testing.assert_close(seen[1, True][0][0], expected[:, -3:], atol=1e-5, rtol=1e-5)
    left = seen[2, False][2][0]
    torch.testing.assert_close(seen[2, False][0][0], expected[:, -3:][:, :, left], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[2, False][1][0], seen[1, True][1][0][:, left])


def test_attention_of_the_layer_to_come():
    asked, seen = one(), {}

    def does(step):
        length = step.hidden_states.shape[1]
        seen[step.layer] = step.attention(torch.tensor([length - 1]), upcoming=True), step.keys(upcoming=True)
        return halves(step) if step.layer == 0 else None

    cache = DynamicCache(config=decoder().config)
    run(Acts(before=(0, 2), does=does), asked, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(seen[0][0][0], attentions(asked)[0][:, -1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[2][1], cache.layers[2].keys)


def test_rows_of_each_sample():
    asked, seen = make_prompts([[("image", 9, False)], [("image", 4, False)]], 2, "random", 0), []

    def does(step):
        rows = torch.tensor([[8, 11], [10, 9]])
        every = step.attention(torch.arange(step.hidden_states.shape[1]))
        seen.append((step.attention(rows), torch.stack([every[b][:, rows[b]] for b in range(2)])))

    run(Acts(before=(2,), does=does), asked)
    torch.testing.assert_close(*seen[0])


@pytest.mark.parametrize(
    ("points", "asks", "says"),
    [
        ({"before": (0,)}, {}, "no attention before layer 0"),
        ({"inside": (1,)}, {"upcoming": True}, "no upcoming attention"),
        ({"before": (LAYERS,)}, {"upcoming": True}, f"there is no layer {LAYERS}"),
    ],
)
def test_what_cannot_be_asked(points, asks, says):
    with pytest.raises(MethodError, match=says):
        run(Acts(**points, does=lambda step: step.attention(torch.tensor([0]), **asks)), one())


def test_rows_that_merge_and_move():
    """A row made of two takes the place of one of them and stands behind the picture; records follow it."""
    asked, request = one(6), one(6).record()

    def does(step):
        hidden = step.hidden_states.clone()
        hidden[:, 2] = (hidden[:, 2] + hidden[:, 5]) / 2
        owner = torch.tensor([[0, 1, 4, 2, 3, 4, -1, *range(5, 5 + step.hidden_states.shape[1] - 7)]])
        rows = torch.tensor([[0, 1, 3, 4, 2, *range(7, step.hidden_states.shape[1])]])
        return Selection(rows, hidden_states=hidden, owner=owner, order="given", positions="compact")

    out = run(Acts(before=(2,), does=does), asked, request=request)
    assert out.kept[0].tolist()[:6] == [0, 1, 3, 4, 2, 7]
    (item,) = request.samples[0].items
    assert item.held_by.tolist() == [[1, 2, 3, 4, 2, -1]]
    assert item.merged_at.tolist() == [[4, 4, 4, 4, 2, 4]] and item.left_at.tolist() == [[4, 4, 4, 4, 4, 2]]


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ({"indices": [[0, 2, 1]], "order": "layout"}, "must rise"),
        ({"indices": [[0, 1, 1]], "order": "given"}, "name a row twice"),
        ({"indices": [[0, 1]], "order": "any"}, "neither 'layout' nor 'given'"),
        ({"indices": [[0, 1]], "owner": [[0, 1, 2]]}, "owner must be integers"),
    ],
)
def test_what_a_selection_may_not_be(selection, says):
    def does(step):
        return Selection(**{k: torch.tensor(v) if isinstance(v, list) else v for k, v in selection.items()})

    with pytest.raises(MethodError, match=says):
        run(Acts(before=(1,), does=does), one())


def test_samples_of_different_length():
    rows = [torch.tensor([0, 2]), torch.tensor([1, 2, 3])]
    owners = [torch.tensor([0, 0, 1, -1]), torch.tensor([-1, 0, 1, 2])]
    selection = Selection.of_rows(rows, owners)
    assert selection.indices.tolist() == [[0, 0, 2], [1, 2, 3]]
    assert selection.valid.tolist() == [[False, True, True], [True, True, True]]
    assert selection.owner.tolist() == [[1, 1, 2, -1], [-1, 0, 1, 2]]


def test_memory_lasts_for_one_prompt():
    seen = []

    def does(step):
        seen.append(step.memory.get("layer"))
        step.memory["layer"] = step.layer

    for _ in range(2):
        run(Acts(before=(0, 1, 3), does=does), one())
    assert seen == [None, 0, 1, None, 0, 1]


def test_several_methods_each_with_its_modalities_and_memory():
    class Images(Acts):
        modalities = frozenset({"image"})
        name = "images"

    class Videos(Acts):
        modalities = frozenset({"video"})
        name = "videos"

    def does(step):
        step.memory["calls"] = step.memory.get("calls", 0) + 1
        assert step.memory["calls"] == 1
        return halves(step)

    asked = make_prompts([[("image", 8, False), ("video", 6, False)]], 2, "random", 0)
    request = asked.record()
    methods = (Images(before=(1,), does=does), Videos(before=(3,), does=does))
    run_decoder(decoder().model, Pipeline(methods), **asked.inputs, request=request)
    length = asked.lengths[0]
    assert request.layer_lengths(0) == [length, length - 4, length - 4, length - 7]
    with pytest.raises(MethodError, match="images and videos both act before decoder layer 1"):
        Pipeline((methods[0], Videos(before=(1, 2), does=does))).check_layers(LAYERS)


def test_where_rows_stand():
    spans = [[VisualSpan(1, 6, "video", 6, item=3, frames=2, frame_rows=3), VisualSpan(8, 2, "image", 2, item=4)]]
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0]]).bool()
    item, frame, place = PromptLayout(visual, [11], spans).places()
    assert item.tolist() == [[-1, 3, 3, 3, 3, 3, 3, -1, 4, 4, -1]]
    assert frame.tolist() == [[-1, 0, 0, 0, 1, 1, 1, -1, 0, 0, -1]]
    assert place.tolist() == [[-1, 0, 1, 2, 0, 1, 2, -1, 0, 1, -1]]
    stands = torch.tensor([[0, 0, 2, 3, 5, 6, 7, 0, 1, 5, 0]])  # compressed: rows 1, 4 and more are gone
    _, frame, place = PromptLayout(visual, [11], spans, stands=stands).places()
    assert frame[0, 1:7].tolist() == [0, 0, 1, 1, -1, -1], "what is behind the last frame belongs to none"
    assert place[0].tolist() == [-1, 0, 2, 0, 2, -1, -1, -1, 1, 5, -1]


def test_rows_of_an_unmasked_layer_see_those_behind_them():
    asked = one()
    every = tuple(range(LAYERS))
    got = run(Acts(unmasked=every), asked).last_hidden_state
    embeds = asked.inputs["inputs_embeds"]
    open_mask = torch.zeros(1, 1, embeds.shape[1], embeds.shape[1])
    expected = decoder().model(inputs_embeds=embeds, attention_mask=open_mask).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    causal = run(Acts(), asked).last_hidden_state
    assert not torch.allclose(got[:, 0], causal[:, 0], atol=1e-3)
    text = make_prompts([[]], 3, "random", 0)
    assert torch.equal(run(Acts(unmasked=every), text).last_hidden_state, run(Acts(), text).last_hidden_state)


def test_unmasked_layers_of_a_padded_batch_are_those_of_each_sample():
    method = Acts(before=(2,), unmasked=(1,), does=halves)
    asked = make_prompts([[("image", 14, False)], [("image", 5, False)], []], 3, "random", 0)
    got = run(method, asked)
    for row in range(3):  # what holds no image is none of its business
        alone = run(method, asked.sample(row)).last_hidden_state[0]
        torch.testing.assert_close(got.last_hidden_state[row, -len(alone) :], alone, atol=1e-5, rtol=1e-5)


def test_an_unmasked_layer_needs_a_backend_that_takes_a_mask():
    config = decoder().config.__class__(**decoder().config.to_dict())
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(MethodError, match="flash-attention"):
        prefill_mask(config, (True,), torch.zeros(1, 3, 8), None)
