"""The state of a request follows whatever is done to its cache: crops, copies, reset, beams, changes of the batch."""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.stages.errors import MethodError
from tests.engine.test_loop import (
    LAYERS,
    VISUAL,
    Hide,
    Thin,
    assert_close,
    layout_of,
    make,
    pipe,
    prompt,
)

PIPELINES = {
    "nothing cut": (Thin(layers=()),),
    "cut": (Thin(),),
    "cut twice": (Thin(layers=(1, 3)),),
    "cut before the first layer": (Thin(layers=(0,)),),
    "caches cut, too": (Thin(trim=True),),
    "renumbered": (Thin(positions_rule="compact"),),
    "hidden keys": (Hide(),),
    "cut and hidden": (Thin(layers=(1,)), Hide(layer=3)),
}
CUT = [name for name, methods in PIPELINES.items() if isinstance(methods[0], Thin) and methods[0].layers]
each_pipeline = pytest.mark.parametrize("name", PIPELINES)
each_cut = pytest.mark.parametrize("name", CUT)
PADDED = torch.tensor([[1] * 18, [0] * 5 + [1] * 13, [0] * 2 + [1] * 16])
SPANS = [VISUAL, range(7, 12), range(4, 10)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Request:
    """A prompt on a cache, and calls on top of it."""

    def __init__(self, name, kind="llama", cache=None, batch=1, embeds=None, layout=None):
        self.model, self.pipeline = make(kind), pipe(*PIPELINES[name])
        self.cache = DynamicCache(config=self.model.config) if cache is None else cache
        mask = PADDED[:batch] if batch > 1 else None
        embeds = prompt(batch) if embeds is None else embeds
        layout = layout or layout_of(batch, 18, SPANS[:batch], PADDED[:batch].sum(1).tolist())
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        self.out = self._run(embeds, mask, layout=layout, position_ids=positions)

    def _run(self, embeds, mask=None, **more):
        return run_decoder(
            self.model.model, self.pipeline, inputs_embeds=embeds, attention_mask=mask, past_key_values=self.cache,
            use_cache=True, **more,
        ).last_hidden_state  # fmt: skip

    def add(self, *embeds, mask=None, **more):
        """States of the last of several calls."""
        for part in embeds:
            out = self._run(part, mask, **more)
        return out

    def on(self, cache):
        """The same request, going on on another cache."""
        other = copy.copy(self)
        other.cache = cache
        return other

    @property
    def lengths(self):
        return [self.cache.get_seq_length(index) for index in range(LAYERS)]


def steps(count, seed=10, batch=1):
    return prompt(batch, count, seed=seed).split(1, dim=1)


QUESTION = prompt(1, 3, seed=5)
#: calls that are taken back, and how much of them stays
DETOURS = {
    "one call": ((prompt(1, 4, seed=7),), 0),
    "steps": (steps(4), 0),
    "a part of a call": ((prompt(1, 5, seed=7),), 2),
    "steps and a call": ((*steps(2), prompt(1, 3, seed=7), *steps(1, seed=8)), 1),
}


# -- crops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["crop", "crop to a length", "layer by layer"])
@pytest.mark.parametrize("detour", DETOURS)
@each_pipeline
def test_what_was_cropped_leaves_no_trace(name, detour, way):
    calls, left = DETOURS[detour]
    added = torch.cat(calls, dim=1)
    straight, around = Request(name), Request(name)
    if left:
        straight.add(added[:, :left])
    around.add(*calls)
    before = around.cache.get_seq_length()
    back = added.shape[1] - left
    if way == "layer by layer":  # nobody tells the cache
        for layer in around.cache.layers:
            layer.crop(-back)
    else:
        around.cache.crop(-back if way == "crop" else before - back)
    assert around.cache.get_seq_length() == before - back
    for new in (QUESTION, *steps(3, seed=20)):
        assert_close(around.add(new), straight.add(new))
    assert around.lengths == straight.lengths
    assert torch.equal(around.cache.accelerate_state.next_position, straight.cache.accelerate_state.next_position)


@each_pipeline
def test_positions_that_the_caller_gives_are_followed(name):
    """As ``generate`` gives them, also to decode steps."""
    straight, around = Request(name), Request(name)
    for at, step in enumerate(steps(3)):
        around.add(step, position_ids=torch.tensor([[40 + at]]))
        if not at:
            straight.add(step, position_ids=torch.tensor([[40]]))
    around.add(prompt(1, 2, seed=7), position_ids=torch.tensor([[50, 51]]))
    around.cache.crop(-4)
    for request in (straight, around):
        assert request.cache.accelerate_state.next_position.item() == 41
    assert_close(around.add(QUESTION), straight.add(QUESTION))


def test_a_crop_in_the_middle_of_a_call_knows_its_positions():
    request = Request("cut")
    request.add(prompt(1, 3, seed=7), position_ids=torch.tensor([[30, 40, 50]]))
    request.cache.crop(-1)
    assert request.cache.accelerate_state.next_position.item() == 41


def test_padding_of_a_turn_that_was_cropped_is_forgotten():
    mask = torch.ones(1, 22, dtype=torch.long)
    mask[:, 18:20] = 0
    straight, around = Request("cut"), Request("cut")
    around.add(prompt(1, 4, seed=7), mask=mask)
    around.cache.crop(-4)
    for new in (*steps(5, seed=20), QUESTION):
        assert_close(around.add(new), straight.add(new))


@pytest.mark.parametrize("name", ["nothing cut", "hidden keys"])
@pytest.mark.parametrize("back", [2, 8])
def test_an_uncut_prompt_may_lose_its_end(name, back):
    """Text, or a part of its image; only where each row was computed with what stood before it."""
    cropped = Request(name)
    cropped.cache.crop(-back)
    span = range(3, min(13, 18 - back))
    shorter = Request(name, embeds=prompt()[:, :-back], layout=layout_of(1, 18 - back, [span]))
    for new in (QUESTION, *steps(3, seed=20)):
        assert_close(cropped.add(new), shorter.add(new))


@each_cut
def test_a_cut_prompt_cannot_lose_its_end(name):
    request = Request(name)
    request.add(*steps(2))
    lengths = request.lengths
    with pytest.raises(MethodError, match="the last 1 tokens of the prompt itself"):
        request.cache.crop(-3)
    assert request.lengths == lengths, "nothing has happened"
    request.cache.crop(-2)
    for layer in request.cache.layers:
        layer.crop(-1)
    with pytest.raises(MethodError, match="cannot be cropped"):
        request.add(QUESTION)


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "reset") for name in PIPELINES), ("nothing cut", "crop"), ("hidden keys", "crop")]
)
def test_an_emptied_cache_takes_another_prompt(name, how):
    request = Request(name)
    request.add(*steps(2))
    request.cache.reset() if how == "reset" else request.cache.crop(-request.cache.get_seq_length())
    if how == "reset" and request.cache.get_seq_length():
        pytest.skip("this release of transformers writes zeros and keeps the length")
    assert request.cache.get_seq_length() == 0
    other = {"embeds": prompt(1, 12, seed=9), "layout": layout_of(1, 12, [range(2, 7)])}
    again, fresh = Request(name, cache=request.cache, **other), Request(name, **other)
    assert_close(again.add(QUESTION), fresh.add(QUESTION))


def test_crops_in_a_sliding_window():
    """Beyond the window a cache has to record what it drops, as assisted decoding asks it to."""
    results = []
    for detour in (False, True):
        cache = DynamicCache(config=make("mistral_window").config)
        cache.activate_past_recording()
        short = {"embeds": prompt(1, 6), "layout": layout_of(1, 6, [range(1, 4)])}
        request = Request("cut", "mistral_window", cache, **short)
        cache.crop(0)
        if detour:
            request.add(prompt(1, 5, seed=7))
            cache.crop(-5)
        for new in (prompt(1, 4, seed=5), *steps(4)):
            out = request.add(new)
            cache.crop(0)
        results.append(out)
    assert_close(*results)


# -- what a decode method remembers ------------------------------------------------------------------------------------


def test_memory_goes_back_with_the_cache():
    straight, around = Request("hidden keys"), Request("hidden keys")
    all_steps = steps(6)
    straight.add(*all_steps[:2])
    around.add(*all_steps)
    around.cache.crop(-4)
    assert around.cache.accelerate_state.memory == straight.cache.accelerate_state.memory == {"step": 1}
    assert_close(around.add(all_steps[3]), straight.add(all_steps[3]))


def test_memory_goes_back_so_far_only():
    request = Request("hidden keys")
    request.add(*steps(80))
    forgotten = copy.deepcopy(request.cache)
    forgotten.crop(-70)
    with pytest.raises(MethodError, match="cropped further back than this is kept"):
        request.on(forgotten).add(steps(1)[0])
    request.cache.crop(-80)  # to the end of the prompt
    assert_close(request.add(*steps(3)), Request("hidden keys").add(*steps(3)))


# -- the length --------------------------------------------------------------------------------------------------------


@each_pipeline
def test_length_is_that_of_the_sequence_and_of_each_layer(name):
    request = Request(name)
    request.add(*steps(2))
    assert request.cache.get_seq_length() == 20
    assert request.lengths == [layer.get_seq_length() for layer in request.cache.layers]


def test_length_counts_what_the_host_has_dropped():
    layout = layout_of(1, 18)
    layout.full = 100
    request = Request("cut", layout=layout)
    request.add(*steps(2))
    assert request.cache.get_seq_length() == 102 and request.cache.get_seq_length(0) == 20
    request.cache.crop(101)
    assert request.cache.get_seq_length() == 101 and request.cache.get_seq_length(0) == 19


# -- copies ------------------------------------------------------------------------------------------------------------


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved,
}


@pytest.mark.parametrize("copied", COPIES)
@each_pipeline
def test_a_copy_goes_on_by_itself(name, copied):
    request, alone = Request(name), Request(name)
    request.add(*steps(2))
    alone.add(*steps(2))
    twin = request.on(COPIES[copied](request.cache))
    twin.add(prompt(1, 4, seed=7), *steps(2, seed=30))
    for new in (QUESTION, *steps(2, seed=20)):
        assert_close(request.add(new), alone.add(new))
    twin.cache.crop(-6)
    fresh = Request(name)
    fresh.add(*steps(2))
    for new in (QUESTION, *steps(2, seed=20)):
        assert_close(twin.add(new), fresh.add(new))


@each_pipeline
def test_a_shallow_copy_is_the_same_request(name):
    request, alone = Request(name), Request(name)
    twin = request.on(copy.copy(request.cache))
    twin.add(*steps(2))
    alone.add(*steps(2))
    twin.cache.crop(-1)
    alone.cache.crop(-1)
    assert_close(request.add(QUESTION), alone.add(QUESTION))


class OwnCache(DynamicCache):
    """A user's class."""

    def crop(self, tokens_to_remove):
        self.cropped = tokens_to_remove
        super().crop(tokens_to_remove)


def test_a_class_of_the_user_stays_what_it_is():
    request, plain = Request("cut", cache=OwnCache(config=make("llama").config)), Request("cut")
    for cache in (request.cache, *(copied(request.cache) for copied in COPIES.values())):
        assert isinstance(cache, OwnCache)
        request.on(cache).add(prompt(1, 4, seed=7))
        cache.crop(-4)
        assert cache.cropped == -4
        assert_close(request.on(cache).add(QUESTION), Request("cut").add(QUESTION))
    assert type(plain.cache) is not DynamicCache and isinstance(plain.cache, DynamicCache)


# -- the batch ---------------------------------------------------------------------------------------------------------

CHANGES = {
    "repeated": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    "selected": ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
    "masked": ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True]))),
    "reordered": ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
}


@pytest.mark.parametrize("change", CHANGES)
@each_pipeline
def test_rows_of_the_batch_change(name, change):
    rows, act = CHANGES[change]
    changed, plain = Request(name, batch=3), Request(name, batch=3)
    turn = prompt(3, 2, seed=7)
    turn_mask = torch.cat([PADDED, torch.tensor([[1, 1], [0, 1], [1, 1]])], 1)
    changed.add(turn, mask=turn_mask)
    plain.add(turn, mask=turn_mask)
    act(changed.cache)
    for new in (*steps(3, batch=3), prompt(3, 3, seed=5), *steps(2, seed=20, batch=3)):
        assert_close(changed.add(new[rows]), plain.add(new)[rows])
    changed.cache.crop(-2)
    assert_close(
        changed.cache.accelerate_state.next_position, (plain.cache.accelerate_state.next_position - 2)[rows]
    )


def test_tensors_that_a_method_remembers_follow():
    request = Request("hidden keys", batch=3)
    request.add(*steps(1, batch=3))
    state = request.cache.accelerate_state
    state.memory["scores"] = torch.tensor([[1.0], [2.0], [3.0]])
    request.cache.batch_repeat_interleave(2)
    request.cache.reorder_cache(torch.tensor([0, 2, 2, 4, 4, 5]))
    assert state.memory["scores"].flatten().tolist() == [1, 2, 2, 3, 3, 3] and state.memory["step"] == 0


# -- refused -----------------------------------------------------------------------------------------------------------


@each_cut
def test_the_model_alone_cannot_go_on(name):
    request = Request(name)
    lengths = request.lengths
    with pytest.raises(MethodError, match="has cut"):
        request.model.model(inputs_embeds=QUESTION, past_key_values=request.cache)
    assert request.lengths == lengths
    request.add(QUESTION)


def test_the_model_alone_can_go_on_where_nothing_was_cut():
    request, plain = Request("nothing cut"), Request("nothing cut")
    out = request.model.model(inputs_embeds=QUESTION, past_key_values=request.cache).last_hidden_state
    assert_close(out, plain.add(QUESTION))


def test_tensors_without_their_state():
    request, bare = Request("cut"), DynamicCache()
    for source in request.cache.layers:
        layer = DynamicLayer()
        layer.update(source.keys, source.values)
        bare.layers.append(layer)
    with pytest.raises(MethodError, match="Copy caches as a whole"):
        request.on(bare).add(QUESTION)


class Offloaded(DynamicCache):
    """Says that it is, without the streams of a GPU."""

    def update(self, *args, **kwargs):
        self.offloading = False
        out = super().update(*args, **kwargs)
        self.offloading = True
        return out


@pytest.mark.parametrize("name", ["cut", "renumbered", "caches cut, too"])
def test_offloaded_cache_where_its_keys_are_read(name):
    """A method that only drops rows works on one; reading keys back is refused."""
    cache = Offloaded(config=make("llama").config)
    if name == "caches cut, too":
        with pytest.raises(MethodError, match="offloaded cache"):
            Request(name, cache=cache)
    else:
        assert_close(Request(name, cache=cache).add(QUESTION), Request(name).add(QUESTION))


def test_static_cache_is_refused():
    with pytest.raises(MethodError, match="DynamicCache"):
        Request("cut", cache=StaticCache(config=make("llama").config, max_cache_len=32))
