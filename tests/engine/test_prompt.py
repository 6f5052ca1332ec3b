"""What the loop is told of prompts: rows that the model itself changes between two layers."""

import dataclasses

import torch

from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.registry.pipeline import Pipeline
from tests.engine.test_loop import Thin, layout_of, make, prompt


@dataclasses.dataclass(frozen=True)
class Shift:
    """Adds a number to the first channel of some rows of the prompt, each of its samples its own."""

    rows: tuple
    by: tuple = (1.0,)
    layer: int = 2

    def __call__(self, hidden, kept):
        places = torch.arange(hidden.shape[1]).expand(hidden.shape[:2]) if kept is None else kept
        chosen = torch.isin(places, torch.tensor(self.rows))
        change = torch.zeros_like(hidden)
        change[..., 0] = chosen * torch.tensor(self.by)[:, None]
        return hidden + change

    def expanded(self, times):
        return dataclasses.replace(self, by=tuple(number for number in self.by for _ in range(times)))


def shifted_reference(decoder, embeds, rows, by, layer=2):
    """The model's own forward with the same done by a hook."""

    def before(module, args, kwargs):
        hidden = args[0].clone()
        hidden[:, rows, 0] += by
        return (hidden, *args[1:]), kwargs

    hook = decoder.layers[layer].register_forward_pre_hook(before, with_kwargs=True)
    try:
        return decoder(inputs_embeds=embeds).last_hidden_state
    finally:
        hook.remove()


@torch.no_grad()
def test_rows_are_changed_in_front_of_their_layer_without_any_method():
    decoder, embeds = make("phi").model, prompt()
    layout = dataclasses.replace(layout_of(1, 18), update=Shift((14, 15)))
    out = run_decoder(decoder, Pipeline(), inputs_embeds=embeds, layout=layout).last_hidden_state
    torch.testing.assert_close(out, shifted_reference(decoder, embeds, [14, 15], 1.0))
    plain = run_decoder(decoder, Pipeline(), inputs_embeds=embeds, layout=layout_of(1, 18)).last_hidden_state
    assert not torch.allclose(out, plain)


@torch.no_grad()
def test_an_update_is_told_which_rows_a_method_left():
    decoder, embeds = make("phi").model, prompt()
    dropping = Pipeline((Thin(layers=(1,)),))
    layout = dataclasses.replace(layout_of(1, 18), update=Shift((14, 15)))
    out = run_decoder(decoder, dropping, inputs_embeds=embeds, layout=layout)
    first_of_cut = out.kept[0].tolist().index(14)
    untouched = run_decoder(decoder, dropping, inputs_embeds=embeds, layout=layout_of(1, 18)).last_hidden_state
    changed = (out.last_hidden_state - untouched).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero()[0].item() == first_of_cut


@torch.no_grad()
def test_beams_have_the_update_of_their_prompt():
    decoder, embeds = make("phi").model, prompt(batch=2)
    layout = dataclasses.replace(layout_of(2, 18), update=Shift((14,), by=(1.0, -2.0)))
    beams = run_decoder(decoder, Pipeline(), inputs_embeds=embeds.repeat_interleave(3, 0), layout=layout)
    for row, by in ((1, 1.0), (4, -2.0)):
        reference = shifted_reference(decoder, embeds[row // 3 : row // 3 + 1], [14], by)
        torch.testing.assert_close(beams.last_hidden_state[row : row + 1], reference)
