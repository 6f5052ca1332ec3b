"""Methods that drop tokens inside the decoder, on models of transformers: what they leave runs as if cut by hand."""

import pytest
import torch

from accelerate_methods import accelerate, detach, record
from tests.hosts.native import test_internvl as tiles
from tests.hosts.native import test_qwen_vl as grids
from tests.support.configured import configured
from tests.support.hand_cut import layer_by_layer
from tests.support.qwen_inputs import BATCH, MODELS, QUESTIONS, inputs, qwen

pytestmark = pytest.mark.usefixtures("one_thread")
#: positions of Qwen-VL are coordinates, which PyramidDrop leaves as they are
ORIGINAL = ["dart", "v2drop"]


@pytest.fixture(params=MODELS)
def model(request):
    model = qwen(request.param)
    yield model
    detach(model)


def drops(sample, padding):
    """Layer -> rows of the sample's prompt that it is the first not to see."""
    rows = torch.cat([item.rows for item in sample.items]) if sample.items else torch.empty(0, dtype=torch.long)
    gone = [item.left_at.flatten() for item in sample.items]
    left = torch.cat(gone) if gone else rows
    return {layer: (rows[left == layer] - padding).tolist() for layer in left.unique().tolist()}


def check(model, asked, whole, method, new, greedy, **told):
    """Every sample of a batch against its own prompt without the rows that the record says are gone.

    Args:
        told: what ``forward`` must be given that ``generate`` makes itself.
    """
    with torch.no_grad(), accelerate(model, method), record() as requests:
        logits, generated = model(**asked, **told).logits[:, -1], greedy(model, asked)
    width, layers, counts = asked["input_ids"].shape[1], model.config.get_text_config().num_hidden_layers, []
    for number, (sample, prompt) in enumerate(zip(requests[0].samples, whole, strict=True)):
        gone = drops(sample, width - len(prompt.source))
        gone.pop(layers, None)  # those that see all layers
        counts.append(sum(map(len, gone.values())))
        assert bool(counts[-1]) == bool(sample.items)
        expected, ids, _ = layer_by_layer(model, prompt, new, gone)
        torch.testing.assert_close(logits[number], expected[0], atol=2e-5, rtol=1e-4)
        assert generated[number].tolist() == ids
    return requests[0], counts


@pytest.mark.parametrize("method", ["pdrop", *ORIGINAL])
@pytest.mark.parametrize("question", ["two images", "long video", "image and video"])
def test_qwen(model, method, question):
    asked, method = inputs(model, QUESTIONS[question]), configured(method)
    whole = grids.by_hand(model, [QUESTIONS[question]], None)
    request, (gone,) = check(model, asked, whole, method, grids.NEW, grids.greedy)
    assert request.layer_lengths(0)[-1] == asked["input_ids"].shape[1] - gone


@pytest.mark.parametrize("method", ["pdrop", *ORIGINAL])
def test_a_padded_batch_of_qwen(model, method):
    check(model, inputs(model, *BATCH), grids.by_hand(model, BATCH, None), configured(method), grids.NEW, grids.greedy)


@pytest.mark.parametrize("method", ORIGINAL)
def test_a_padded_batch_of_internvl(method):
    model, asked = tiles.internvl(), tiles.inputs(*tiles.BATCH)
    whole, positions = tiles.by_hand(model, tiles.BATCH, None), positions_of(asked)
    check(model, asked, whole, configured(method), tiles.NEW, tiles.greedy, position_ids=positions)


def positions_of(asked):
    """[B, L] without the padding; DART's pivots depend on where a row stands."""
    return (asked["attention_mask"].cumsum(1) - 1).clamp(min=0)


def test_internvl_with_positions_counted_anew():
    """Behind every cut each prompt of a batch counts its own rows."""
    model, method, asked = tiles.internvl(), configured("pdrop"), tiles.inputs(*tiles.BATCH)
    with torch.no_grad(), accelerate(model, method), record() as requests:
        out = model(**asked, position_ids=positions_of(asked), use_cache=True)
    assert torch.isfinite(out.logits).all()
    state, count = out.past_key_values.accelerate_state, len(tiles.BATCH)
    lengths = [requests[0].layer_lengths(row) for row in range(count)]
    for layer, known in enumerate(state.layers):
        behind = state.next_position.flatten() - (0 if known.shift is None else known.shift.flatten())
        assert behind.tolist() == [of[layer] for of in lengths]
