"""Evictions against transformers' own forward with caches that are cut by hand."""

import copy
import dataclasses
import itertools
import pickle
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from accelerate_methods.engine import eviction
from accelerate_methods.engine.layers import DecoderLayers, rotated
from accelerate_methods.engine.loop import run_decoder
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.stages.decode import EvictMethod, EvictStep, Kept
from accelerate_methods.stages.errors import MethodError
from tests.engine.test_loop import LAYERS, ROPE, Thin, layout_of, make, pipe, prompt

A, R = 3, 6
POSITIONS = ("original", "cache", "entered")
ROPES = {
    "linear": {**ROPE, "rope_type": "linear", "factor": 2.0},
    "yarn": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {**ROPE, "rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
KINDS = ("llama", "qwen2", "qwen3", "mistral", "phi", "phi_norms", "phi3", "stablelm", "linear", "yarn", "llama3")
_scaled = {}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends(EvictMethod):
    """The first and the last entries stay, all of them as long as there is room."""

    name = "ends"
    first: int = A
    last: int = R
    when: str = "after"
    stands: str = "cache"
    acts_on_text: bool = True

    @property
    def cache_positions(self):
        return self.stands

    def evict(self, step):
        return step.ends(self.first, self.last) if step.when == self.when else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinned(Ends):
    """Of twelve entries every second one stays."""

    name = "thinned"

    def evict(self, step):
        if step.when == "before" or step.entries < 12:
            return None
        places = torch.arange(step.entries)
        return Kept(places[::2]) if step.valid is None else Kept.from_mask(
            step.valid & (step.valid.cumsum(1) % 2 == 1), (step.entries + 1) // 2
        )  # fmt: skip


def model_of(kind):
    if kind not in ROPES:
        return make(kind)
    if kind not in _scaled:
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, rope_parameters=ROPES[kind],
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        _scaled[kind] = LlamaForCausalLM(config).eval()
    return _scaled[kind]


class Request:
    """Calls on one cache under an evicting method."""

    def __init__(self, method, kind="llama", *more, model=None):
        self.model, self.pipeline = model or model_of(kind), pipe(*more, method)
        self.cache, self.record = DynamicCache(config=self.model.config), RequestRecord()

    def add(self, embeds, mask=None, **more):
        return run_decoder(
            self.model.model, self.pipeline, inputs_embeds=embeds, attention_mask=mask, past_key_values=self.cache,
            use_cache=True, request=self.record, **more,
        ).last_hidden_state  # fmt: skip

    @property
    def lengths(self):
        return [self.cache.get_seq_length(index) for index in range(LAYERS)]

    def on(self, cache):
        other = copy.copy(self)
        other.cache = cache
        return other


#: a prompt, decode steps, a later turn, decode steps
CALLS = (11, *[1] * 7, 4, *[1] * 5)


def calls(batch=1, sizes=CALLS):
    return [prompt(batch, size, seed=number) for number, size in enumerate(sizes)]


def assert_close(got, wanted, tolerance=2e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


# -- references --------------------------------------------------------------------------------------------------------


class Unrotated(DynamicCache):
    """As in the official code: keys are kept without rotary embedding, and get that of their place in every call."""

    def __init__(self, model):
        super().__init__(config=model.config)
        self.tables = DecoderLayers(model.model).rotary

    def turned(self, keys, start, by=1):
        cos, sin = self.tables(keys[:, 0], torch.arange(start, start + keys.shape[2])[None])
        scale = (cos**2 + sin**2).sqrt() if by < 0 else 1
        return rotated(keys, cos / scale, by * sin / scale) / (scale[:, None, :, :1] if by < 0 else 1)

    def update(self, keys, values, layer_idx, *args, **kwargs):
        plain = self.turned(keys, self.get_seq_length(layer_idx), by=-1)
        keys, values = super().update(plain, values, layer_idx)
        return self.turned(keys, 0), values


def cut(cache, places):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, places], layer.values[:, :, places]


def ends(count, first=A, last=R):
    return [n for n in range(count) if n < first or n >= count - last]


def by_hand(model, parts, stands, stay=ends):
    """States of each call, and the caches' lengths after it."""
    cache = Unrotated(model) if stands == "cache" else DynamicCache(config=model.config)
    seen, left, states, lengths = 0, [], [], []
    for part in parts:
        new = part.shape[1]
        if stands == "original":  # nothing is cut: what would be gone is hidden
            allowed = torch.zeros(new, seen + new, dtype=torch.bool)
            allowed[:, left] = True
            allowed[:, seen:] = torch.ones(new, new).tril().bool()
            more = {"attention_mask": allowed[None, None], "position_ids": torch.arange(seen, seen + new)[None]}
        else:
            more = {"position_ids": torch.arange(len(left), len(left) + new)[None]}
        states.append(model.model(inputs_embeds=part, past_key_values=cache, **more).last_hidden_state)
        left = [*left, *range(seen, seen + new)]
        seen += new
        places = stay(len(left))
        left = [left[place] for place in places]
        if stands != "original":
            cut(cache, places)
        lengths.append(len(left))
    return states, lengths


@pytest.mark.parametrize("stands", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_evicted_is_gone(kind, stands):
    request = Request(Ends(stands=stands), kind)
    wanted, lengths = by_hand(request.model, calls(), stands)
    for number, (part, states) in enumerate(zip(calls(), wanted, strict=True)):
        assert_close(request.add(part), states, 1e-4)
        assert request.lengths == [lengths[number]] * LAYERS and lengths[number] <= A + R
    assert request.record.cached == [[n] * LAYERS for n in lengths]
    assert request.cache.get_seq_length() == sum(CALLS), "as the caller counts"


@pytest.mark.parametrize("stands", POSITIONS)
def test_entries_of_any_place(stands):
    request = Request(Thinned(stands=stands))
    wanted, _ = by_hand(request.model, calls(), stands, lambda n: [*range(0, n, 2)] if n >= 12 else [*range(n)])
    for part, states in zip(calls(), wanted, strict=True):
        assert_close(request.add(part), states)


@pytest.mark.parametrize("method", [Ends, Thinned])
@pytest.mark.parametrize("ahead", [0, 4])
def test_positions_start_again_now_and_then(ahead, method):
    request = Request(method())
    stay = ends if method is Ends else lambda n: [*range(0, n, 2)] if n >= 12 else [*range(n)]
    wanted, _ = by_hand(request.model, calls(), "cache", stay)
    with mock.patch.object(eviction, "_AHEAD", ahead):
        for part, states in zip(calls(), wanted, strict=True):
            assert_close(request.add(part), states)
    # what came since the last time is left of the way
    assert request.cache.accelerate_state.next_position.item() <= max(request.lengths) + ahead


@pytest.mark.parametrize("stands", POSITIONS)
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_with_room_for_everything_it_is_the_model(kind, stands):
    request = Request(Ends(first=0, last=sum(CALLS), stands=stands), kind)
    whole = request.model.model(inputs_embeds=torch.cat(calls(), 1)).last_hidden_state
    assert_close(torch.cat([request.add(part) for part in calls()], 1), whole)
    assert request.lengths == [sum(CALLS)] * LAYERS and request.cache.get_seq_length() == sum(CALLS)


@pytest.mark.parametrize("ends_of", [(A, R), (0, R), (A, 0)])
@pytest.mark.parametrize("stands", POSITIONS)
def test_memory_is_freed(stands, ends_of):
    first, last = ends_of
    request = Request(Ends(first=first, last=last, stands=stands))
    for part in calls():
        request.add(part)
        for layer in request.cache.layers:
            for states in (layer.keys, layer.values):
                # where one entry in eight or fewer goes, it is freed with the next token
                spare = states.shape[2] // 7
                assert states.untyped_storage().nbytes() <= 2 * (states.shape[2] + spare) * 8 * 4
                assert states.shape[2] <= first + last


@pytest.mark.parametrize("stands", POSITIONS)
def test_everything_may_go_before_a_call(stands):
    """Tokens then begin again, where they do not stand at their places in the prompt."""
    request = Request(Ends(first=0, last=0, when="before", stands=stands))
    request.add(prompt(1, 9))
    new = prompt(1, 3, seed=4)
    at = 9 if stands == "original" else 0
    wanted = request.model.model(inputs_embeds=new, position_ids=torch.arange(at, at + 3)[None]).last_hidden_state
    assert_close(request.add(new), wanted)
    assert request.lengths == [3] * LAYERS and request.cache.get_seq_length() == 12


def test_first_entries_do_not_drift_in_half_precision():
    """They move in every step; what they were is turned anew each time."""
    model = copy.deepcopy(make("llama")).bfloat16()
    request = Request(Ends(), model=model)
    request.add(prompt(1, A + R).bfloat16())
    before = [layer.keys[:, :, :A].float() for layer in request.cache.layers]
    for number in range(200):
        request.add(prompt(1, 1, seed=number).bfloat16())
    start = request.cache.accelerate_state.next_position - A - R
    tables = DecoderLayers(model.model).rotary(torch.zeros(1), start.expand(1, A))
    for layer, were in zip(request.cache.layers, before, strict=True):
        wanted, got = rotated(were, *tables), layer.keys[:, :, :A].float()
        assert start.item() == 200 and ((got - wanted).abs() <= wanted.abs().amax() * 2**-8).all()


# -- batches -----------------------------------------------------------------------------------------------------------

PADDED = [[0] * 6 + [1] * 5, [1] * 11, [0] * 2 + [1] * 9]
TURN = [[1] * 4, [0, 0, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [Ends, Thinned], ids=["ends", "thinned"])
@pytest.mark.parametrize("stands", POSITIONS)
def test_a_batch_is_each_prompt_alone(stands, method, side):
    """Prompts and turns of different length; the first and last *real* entries of each stay."""
    rule = Ends(stands=stands) if method is Ends else Ends(first=2, last=R - 1, stands=stands)
    together, turns = Request(rule), [PADDED, *[[[1]] * 3] * 7, TURN, *[[[1]] * 3] * 5]
    turns = [torch.tensor(turn if side == "left" else [row[::-1] for row in turn]) for turn in turns]
    mask, got = torch.zeros(3, 0, dtype=torch.long), []
    for part, turn in zip(calls(3), turns, strict=True):
        at = mask.sum(1, keepdim=True) + (turn.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([mask, turn], 1)
        got.append(together.add(part, mask, position_ids=at))
    assert together.lengths == [rule.first + rule.last] * LAYERS
    for row in range(3):
        alone = Request(rule)
        for part, turn, states in zip(calls(3), turns, got, strict=True):
            real = turn[row].bool()
            assert_close(states[row, real], alone.add(part[row : row + 1, real])[0])


CHANGES = {
    "repeated": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    "selected": ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
    "reordered": ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("stands", POSITIONS)
def test_rows_of_the_batch_change(stands, change):
    rows, act = CHANGES[change]
    changed, plain = Request(Ends(stands=stands)), Request(Ends(stands=stands))
    mask = torch.tensor(PADDED)
    for request in (changed, plain):
        request.add(prompt(3, 11), mask)
        for part in calls(3, [1] * 4):
            request.add(part)
    act(changed.cache)
    for part in calls(3, (3, 1, 1)):
        assert_close(changed.add(part[rows]), plain.add(part)[rows])


# -- crops and copies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["crop", "layer by layer"])
@pytest.mark.parametrize("stands", POSITIONS)
def test_what_came_since_the_last_eviction_can_be_cropped(stands, way):
    method = Ends(when="before", stands=stands)
    straight, around = Request(method), Request(method)
    for request in (straight, around):
        request.add(prompt(1, 20))
        request.add(prompt(1, 3, seed=1))
    assert around.lengths == [A + R + 3] * LAYERS
    for layer in around.cache.layers if way != "crop" else ():
        layer.crop(-2)
    if way == "crop":
        around.cache.crop(-2)
    assert around.cache.get_seq_length() == 21
    short = Request(method)
    short.add(prompt(1, 20))
    short.add(prompt(1, 3, seed=1)[:, :1])
    for part in calls(sizes=(2, 1)):
        assert_close(around.add(part), short.add(part))


@pytest.mark.parametrize("stands", POSITIONS)
def test_a_crop_behind_an_eviction_is_refused(stands):
    request = Request(Ends(when="before", stands=stands))
    request.add(prompt(1, 20))
    request.add(prompt(1, 3, seed=1))
    twin, before = request.on(copy.deepcopy(request.cache)), request.lengths
    with pytest.raises(MethodError, match="of the 12 that are left, only the 3 that came since can be cropped"):
        request.cache.crop(-4)
    assert request.lengths == before, "nothing was cropped"
    for layer in twin.cache.layers:
        layer.crop(-4)
    with pytest.raises(MethodError, match="that came since can be cropped"):
        twin.add(prompt(1, 1))
    request.cache.crop(-3)
    assert request.lengths == [A + R] * LAYERS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("stands", POSITIONS)
def test_a_copy_goes_on_by_itself(stands, copied):
    request, alone = Request(Ends(stands=stands)), Request(Ends(stands=stands))
    for part in calls(sizes=(11, 1, 1)):
        request.add(part)
        alone.add(part)
    twin = request.on(copied(request.cache))
    for part in calls(sizes=(4, 1, 1)):
        twin.add(part * 2)
    for part in calls(sizes=(4, 1, 1)):
        assert_close(request.add(part), alone.add(part))


# -- layers of different length ----------------------------------------------------------------------------------------


def test_layers_of_different_length_each_keep_their_own_ends():
    """18 rows go into layers 0 and 1, 13 into the others."""
    method, thin = Ends(last=8, stands="original"), Thin()
    whole, cut_too = Request(Ends(first=0, last=99, stands="original"), "llama", thin), Request(method, "llama", thin)
    for request in (whole, cut_too):
        request.add(prompt(), layout=layout_of(1, 18))
    for full, short in zip(whole.cache.layers, cut_too.cache.layers, strict=True):
        count = full.keys.shape[2]
        assert torch.equal(short.keys, full.keys[:, :, ends(count, A, 8)])
    assert whole.lengths == [18, 18, 13, 13] and cut_too.lengths == [A + 8] * LAYERS
    for part in calls(sizes=[1] * 20):
        assert torch.isfinite(cut_too.add(part)).all() and cut_too.lengths == [A + 8] * LAYERS


def test_a_layer_with_room_keeps_everything():
    request = Request(Ends(last=12, stands="original"), "llama", Thin())
    request.add(prompt(), layout=layout_of(1, 18))
    assert request.lengths == [15, 15, 13, 13]
    for number, part in enumerate(calls(sizes=[1] * 4)):
        request.add(part)
        assert request.lengths == [15, 15, min(15, 14 + number), min(15, 14 + number)]


# -- what a step is told -----------------------------------------------------------------------------------------------


def test_what_a_step_is_told():
    seen = []

    class Look(Ends):
        def evict(self, step):
            seen.append(step)
            return None

    request = Request(Look())
    request.add(prompt(), layout=layout_of(1, 18))
    request.add(prompt(1, 1))
    request.add(prompt(1, 4))
    eviction.expect_answer(request.cache, 30, 99)
    request.add(prompt(1, 1))
    eviction.expect_answer(request.cache, None, 40)
    request.add(prompt(1, 2))
    eviction.expect_drafts_on(request.cache)
    request.add(prompt(1, 3))
    told = [(s.when, s.call, s.entries, s.coming, s.reserved) for s in seen]
    assert told == [
        ("after", "prompt", 18, 0, 0),
        *(("before", "step", 18, 1, 0), ("after", "step", 19, 0, 0)),
        *(("before", "turn", 19, 4, 0), ("after", "turn", 23, 0, 0)),
        *(("before", "turn", 23, 1, 30), ("after", "turn", 24, 0, 0)),
        *(("before", "turn", 24, 2, 14), ("after", "turn", 26, 0, 0)),
        *(("before", "step", 26, 3, 0), ("after", "step", 29, 0, 0)),
    ]
    assert all(s.layers == [0, 1, 2, 3] and s.valid is None and s.visual.sum() == 10 for s in seen)
    assert repr(seen[1]) == (
        "EvictStep(when='before', call='step', layers=[0, 1, 2, 3], entries=18, visual=bool[1, 18], coming=1)"
    )


def test_methods_that_do_not_act_on_text_wait_for_visual_tokens():
    method = Ends(acts_on_text=False)
    text, image = Request(method), Request(method)
    text.add(prompt())
    assert text.lengths == [18] * LAYERS
    image.add(prompt(), layout=layout_of(1, 18))
    assert image.lengths == [A + R] * LAYERS


# -- ends --------------------------------------------------------------------------------------------------------------


def test_ends_of_every_sample():
    valid = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 0, 1, 1]]).bool()
    step = EvictStep("after", "step", [0], 7, torch.zeros(3, 7, dtype=torch.bool), valid)
    kept = step.ends(2, 3)
    shown = [row[ok].tolist() for row, ok in zip(kept.indices, kept.valid, strict=True)]
    assert shown == [[3, 4, 5, 6], [0, 1, 4, 5, 6], [1, 2, 3, 5, 6]] and kept.first == 2
    assert step.real.tolist() == [[4], [7], [5]]
    own = step.ends(torch.tensor([[1], [1], [0]]), torch.tensor([[1], [2], [4]]), most=4)
    shown = [row[ok].tolist() for row, ok in zip(own.indices, own.valid, strict=True)]
    assert shown == [[3, 6], [0, 5, 6], [2, 3, 5, 6]] and own.indices.shape == (3, 4)
    assert step.ends(3, 4) is None and step.ends(0, 9) is None


# -- refusals ----------------------------------------------------------------------------------------------------------

WRONG = {
    "a mask": (torch.ones(1, 11).bool(), "must return Kept .*None, which evicts nothing"),
    "floats": (Kept(torch.ones(3)), "indices must be integers"),
    "too far": (Kept(torch.tensor([3, 11])), "holds 11; entries of the cache are counted from 0 to 10"),
    "twice": (Kept(torch.tensor([3, 3])), "must rise"),
    "another batch": (Kept(torch.tensor([[1], [2]])), r"integers \[1, 1\]"),
    "valid": (Kept(torch.tensor([1, 2]), valid=torch.ones(1, 3).bool()), r"valid must be a bool tensor \[1, 2\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(wrong):
    given, text = WRONG[wrong]

    class Bad(Ends):
        def evict(self, step):
            return given

    with pytest.raises(MethodError, match=f"ends.evict.*{text}"):
        Request(Bad()).add(prompt(1, 11))


def test_caches_of_others_are_refused():
    request = Request(Ends())
    request.model.model(inputs_embeds=prompt(), past_key_values=request.cache)
    with pytest.raises(MethodError, match="filled before ends was attached"):
        request.add(prompt(1, 1))
    for one, other in itertools.permutations(POSITIONS, 2):
        begun = Request(Ends(stands=one))
        begun.add(prompt())
        with pytest.raises(MethodError, match="ends numbers tokens in another way"):
            Request(Ends(stands=other)).on(begun.cache).add(prompt(1, 1))
    text = Request(Ends(acts_on_text=False))
    text.model.model(inputs_embeds=prompt(), past_key_values=text.cache)
    text.add(prompt(1, 1))
    assert text.lengths == [19] * LAYERS
    cut_off = Request(Ends())
    cut_off.add(prompt())
    with pytest.raises(MethodError, match="only while ends is attached"):
        cut_off.model.model(inputs_embeds=prompt(1, 1), past_key_values=cut_off.cache)


def test_tables_that_change_with_the_length_are_refused():
    with pytest.raises(MethodError, match=r"rotary tables \(dynamic\) change with the length.*Keep original"):
        Request(Ends(), "dynamic").add(prompt())
    Request(Ends(stands="original"), "dynamic").add(prompt())


def test_a_sliding_window_that_has_dropped_keys_is_refused():
    """A window of eight, of which seven keys are cached."""
    with pytest.raises(MethodError, match="sliding window of this model has already dropped"):
        Request(Ends(), "mistral_window").add(prompt())


def test_a_prefill_method_beside_places_in_the_cache_is_refused():
    for stands in ("cache", "entered"):
        with pytest.raises(MethodError, match="thin leaves other tokens in each layer's cache, so ends cannot number"):
            pipe(Thin(), Ends(stands=stands)).check_layers(LAYERS)
    pipe(Thin(), Ends(stands="original")).check_layers(LAYERS)
