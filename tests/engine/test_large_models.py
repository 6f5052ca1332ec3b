"""Models larger than a GPU: layers on several devices (acted on CPU), and weights in CPU memory or on disk.

A model that accelerate has dispatched must give the very answers of the same model in one piece, dense and with every
method: nothing may use a weight other than by calling its module, and everything must be where the layer is.
"""

import contextlib
import copy
import itertools
import shutil

import pytest
import torch
from accelerate import dispatch_model

from accelerate_methods import MethodError, accelerate, detach, record
from accelerate_methods.engine import loop as decoder
from accelerate_methods.engine.devices import computes_on, hooked_device, moved
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.registry import method_class
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from tests.conftest import CHECKPOINTS
from tests.engine.test_loop import LAYERS, VISUAL, Hide, Thin, greedy, layout_of, make, pipe, prompt
from tests.methods.test_every_method import BATCH, FAMILY, MAIN, OV, PAIRS, QUESTIONS, V15, answer, inputs
from tests.support.configured import configured
from tests.support.several_devices import Placed, SeveralDevices, place_of

pytestmark = pytest.mark.usefixtures("one_thread")
OFFICIAL = ("fastv", "fastervlm", "visionzip", "fastvid", "dycoke", "prunevid")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def load(name, **kwargs):
    kwargs = {"device_map": "cpu", "torch_dtype": "float32", "attn_implementation": "sdpa", **kwargs}
    return load_pretrained_model(str(CHECKPOINTS / name), **kwargs)[1]


def plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def same(got, expected):
    """Equal ids; logits equal up to what another kernel rounds otherwise."""
    assert torch.equal(plain(got[0]), expected[0])
    torch.testing.assert_close(plain(got[1]), expected[1], atol=2e-5, rtol=2e-5)


# -- several devices ---------------------------------------------------------------------------------------------------


def spread(model, layers=None):
    """The model over three GPUs: whatever a method touches lies on another one than what it is combined with."""
    count = model.config.num_hidden_layers
    where = layers or [f"cuda:{(i + 1) % 2}" for i in range(count)]  # 1, 0, 1, ...: every layer begins elsewhere
    places = {f"model.layers.{i}": device for i, device in enumerate(where)}
    places |= {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:2", "model.norm": "cuda:0"}
    places |= {"model.vision_tower": "cuda:2", "model.mm_projector": "cuda:1", "lm_head": "cuda:1"}
    if hasattr(model.model, "image_newline"):
        places["model.image_newline"] = "cuda:0"
    with SeveralDevices():
        dispatch_model(model, places, main_device="cuda:0", skip_keys=model._skip_keys_device_placement)
        if "model.image_newline" in places:  # accelerate leaves to the loader what is no module
            model.model._parameters["image_newline"] = model.model.image_newline.to("cuda:0")
    return model


@pytest.fixture(scope="module")
def pair():
    """pair(name): a model in one piece and the same one over three devices."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = load(name), spread(load(name))
        for model in models[name]:
            detach(model)
        return models[name]

    return get


@pytest.mark.share(4, each=("method",))
@pytest.mark.parametrize(("method", "name"), [*((None, name) for name in FAMILY), *PAIRS])
def test_model_over_several_devices(method, name, pair, monkeypatch):
    monkeypatch.setattr(RequestRecord, "span", lambda *_: contextlib.nullcontext())  # there are no CUDA events here
    whole, several = pair(name)
    for questions in ([QUESTIONS[name][MAIN[name]]], BATCH[name]):
        with accelerate(whole, None if method is None else configured(method)), record() as expected:
            answers = answer(whole, *questions)
        with SeveralDevices(), accelerate(several, None if method is None else configured(method)), record() as got:
            ids, logits = answer(several, *questions)
            same((ids, logits), answers)
            for index, (sample, wanted) in enumerate(zip(got[0].samples, expected[0].samples, strict=True)):
                assert got[0].layer_lengths(index) == expected[0].layer_lengths(index)
                for item, other in zip(sample.items, wanted.items, strict=True):
                    assert torch.equal(plain(item.left_at), other.left_at) and item.tokens_after == other.tokens_after


@pytest.mark.parametrize("method", ["fastv", "dycoke", "fastv+visionzip"])
def test_beams_and_caches_stay_on_their_devices(method, pair):
    whole, several = pair(OV)
    arguments = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    arguments |= {"return_dict_in_generate": True}
    asked = inputs(whole, QUESTIONS[OV]["image and video"])
    with accelerate(whole, method):
        expected = whole.generate(**asked, **arguments)
    with SeveralDevices(), accelerate(several, method):
        got = several.generate(**asked, **arguments)
    assert torch.equal(plain(got.sequences), expected.sequences)
    for index, layer in enumerate(got.past_key_values.layers):
        device = hooked_device(several.model.layers[index])
        assert place_of(layer.keys) == place_of(layer.values) == device == torch.device("cuda", (index + 1) % 2)


def test_labels_and_several_turns(pair):
    whole, several = pair(OV)
    asked = inputs(whole, QUESTIONS[OV]["image"])
    labels = asked["input_ids"].masked_fill(asked["input_ids"] < 0, -100)
    losses = []
    for model, block in ((whole, torch.no_grad()), (several, SeveralDevices())):
        with block, accelerate(model, "fastv", retention_ratio=0.3):
            out = model(**asked, labels=labels, use_cache=True)
            later = model(input_ids=torch.tensor([[5, 6, 9]]), past_key_values=out.past_key_values)
            losses.append((plain(out.loss), plain(out.logits), plain(later.logits)))
    for one_piece, spread_out in zip(*losses, strict=True):
        torch.testing.assert_close(spread_out, one_piece, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral_window"])
@pytest.mark.parametrize(
    "methods",
    [
        (Thin(layers=(1, 2)),),
        (Thin(positions_rule="compact"), Hide(layer=3)),
        (Thin(trim=True, merge=True, layers=(3,)), Hide(layer=1)),
        (Thin(trim=True, positions_rule="compact", layers=(4,)), Hide()),
    ],
    ids=["twice", "compact", "trim", "last"],
)
def test_decoder_loop_over_several_devices(kind, attention, methods):
    model = make(kind, attention)
    if kind == "mistral_window" and any(isinstance(m, Hide) or m.trim for m in methods):
        methods = (Thin(layers=(2,)),)  # what looks back needs the whole cache
    several = copy.deepcopy(model)
    batch = prompt(2)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[0, :3] = 0
    layout = layout_of(2, 18, [range(4, 12), VISUAL], [15, 18])
    expected = greedy(model, pipe(*methods), batch, layout, 5, mask)
    places = {f"model.layers.{i}": f"cuda:{(i + 1) % 2}" for i in range(LAYERS)}
    places |= {"model.rotary_emb": "cuda:2", **dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cuda:0")}
    with SeveralDevices():
        dispatch_model(several, places, main_device="cuda:0", skip_keys="past_key_values")
        there = moved((batch, layout, mask), torch.device("cuda:0"))
        got = greedy(several, pipe(*methods), there[0], there[1], 5, there[2])
    same(got, expected)
    assert [place_of(layer.keys).index for layer in got[2].layers] == [1, 0, 1, 0]


def test_dropped_tokens_do_not_cross_the_border(pair):
    whole = pair(OV)[0]
    several = spread(load(OV), ["cuda:0"] * 3 + ["cuda:1"] * 3)
    gpus, width = (torch.device("cuda:0"), torch.device("cuda:1")), whole.config.hidden_size
    crossed = []
    for layer in (3, 4):  # before the border, and after it
        with accelerate(whole, "fastv", k=layer, retention_ratio=0.1), record() as made:
            whole(**inputs(whole, QUESTIONS[OV]["video of 2"]))
        with SeveralDevices() as devices, accelerate(several, "fastv", k=layer, retention_ratio=0.1):
            several(**inputs(whole, QUESTIONS[OV]["video of 2"]))
        hidden = [s[1] for *way, s in devices.transfers if tuple(way) == gpus and len(s) == 3 and s[-1] == width]
        crossed.append(max(hidden))
        assert max(hidden) == made[0].layer_lengths(0)[3]
    assert crossed[0] < crossed[1] / 5


def test_the_act_notices_what_is_left_behind(pair, monkeypatch):
    several = pair(OV)[1]
    question = QUESTIONS[OV]["image"]
    monkeypatch.setattr(decoder._Loop, "_enter", lambda loop, index: False)
    with (
        SeveralDevices(),
        accelerate(several, "fastv", k=3, retention_ratio=0.3),
        pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"),
    ):
        answer(several, question)
    with SeveralDevices(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")
    with SeveralDevices():
        assert isinstance(torch.arange(3, device="cuda:1"), Placed)
        assert (torch.arange(3, device="cuda:1") * 2).to("cpu").tolist() == [0, 2, 4]


# -- weights elsewhere -------------------------------------------------------------------------------------------------

PARTS = ("model.embed_tokens", "model.layers.{}", "model.norm", "model.rotary_emb", "model.vision_tower",
         "model.mm_projector", "model.image_newline", "lm_head")  # fmt: skip


def offloading(config, *offloaded, to="disk"):
    """A device map that keeps everything on the CPU except for the parts named."""
    numbers = range(config.num_hidden_layers)
    names = [n for part in PARTS for n in ([part.format(i) for i in numbers] if "{}" in part else [part])]
    names = [n for n in names if n != "model.image_newline" or hasattr(config, "image_grid_pinpoints")]
    return {name: to if name.startswith(offloaded) else "cpu" for name in names}


def same_answers(whole, other, name, methods=OFFICIAL):
    question = QUESTIONS[name][MAIN[name]]
    for method in (None, *methods):
        chosen = None if method is None else configured(method)
        with accelerate(whole, chosen):
            expected = answer(whole, question)
        with accelerate(other, chosen):
            got = answer(other, question)
        same(got, expected)


@pytest.mark.parametrize(
    "offloaded",
    [
        ("model.layers.1", "model.layers.2", "model.norm"),
        ("model.layers",),
        ("model.vision_tower",),
        ("model.mm_projector", "model.embed_tokens"),
        ("lm_head",),
    ],
    ids=lambda parts: "+".join(part.removeprefix("model.") for part in parts),
)
def test_weights_on_disk(offloaded, pair, tmp_path):
    whole = pair(OV)[0]
    other = load(OV, device_map=offloading(whole.config, *offloaded), offload_folder=str(tmp_path))
    away = {name for name, parameter in other.named_parameters() if parameter.is_meta}
    assert away == {name for name, _ in whole.named_parameters() if name.startswith(offloaded)}
    methods = (*OFFICIAL, "random_prefill")
    if "model.vision_tower" in offloaded:
        methods += ("downsample",)  # interpolates the tower's position table
    same_answers(whole, other, OV, methods)
    assert away == {name for name, parameter in other.named_parameters() if parameter.is_meta}, "weights were left"


def test_whole_model_on_disk(pair, tmp_path):
    whole = pair(OV)[0]
    other = load(OV, device_map={"": "disk"}, offload_folder=str(tmp_path))
    assert all(parameter.is_meta for parameter in other.parameters())
    assert computes_on(other.model) == computes_on(other.get_vision_tower()) == torch.device("cpu")
    same_answers(whole, other, OV)


def test_tower_outside_the_checkpoint(pair, tmp_path):
    whole = pair(V15)[0]
    places = offloading(whole.config, "model.layers.1", "model.mm_projector")
    other = load(V15, device_map=places, offload_folder=str(tmp_path))
    same_answers(whole, other, V15, [m for m, name in PAIRS if name == V15])


def test_vocabulary_is_resized_where_it_is_offloaded(tmp_path):
    folder = shutil.copytree(CHECKPOINTS / OV, tmp_path / "checkpoint")
    whole = load(OV)
    rows = whole.get_input_embeddings().weight.shape[0]
    whole.resize_token_embeddings(rows + 24, mean_resizing=False)  # as official checkpoints: more rows than tokens
    whole.save_pretrained(folder)
    whole = load_pretrained_model(str(folder), device_map="cpu", torch_dtype="float32")[1]
    places = offloading(whole.config, "model.embed_tokens", "lm_head")
    other = load_pretrained_model(
        str(folder), device_map=places, torch_dtype="float32", offload_folder=str(tmp_path / "disk")
    )[1]
    assert whole.lm_head.weight.shape[0] == other.lm_head.weight.shape[0] == rows
    assert other.lm_head.weight.is_meta and other.model.embed_tokens.weight.is_meta
    same_answers(whole, other, OV, ("fastv",))


def test_auto_device_map_within_a_memory_limit(pair, tmp_path):
    whole = pair(OV)[0]
    total = sum(parameter.nbytes for parameter in whole.parameters())
    other = load(OV, device_map="auto", max_memory={"cpu": int(total * 0.6)}, offload_folder=str(tmp_path))
    devices = set(other.hf_device_map.values())
    assert devices == {"cpu", "disk"}
    with pytest.raises(MethodError, match=r"does not fit: \d+ of its parts \(first: model\..*gpus_per_model"):
        load(OV, device_map="auto", max_memory={"cpu": int(total * 0.6)})
    same_answers(whole, other, OV, ("fastv", "fastvid", "dycoke"))


def test_auto_device_map_over_gpus_keeps_layers_and_tower_whole(pair):
    from transformers.integrations import accelerate as loading

    whole = pair(OV)[0]
    total = sum(parameter.nbytes for parameter in whole.parameters())
    for count in (2, 3, 4):
        memory = {4 + gpu: int(total / count * 1.6) for gpu in range(count)}  # any GPUs, not only the first
        places = loading._get_device_map(whole, "auto", memory, None)
        assert set(places.values()) == set(memory), places
        assert "model.vision_tower" in places
        assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]
    # what does not fit is not put into CPU memory, which nobody offered; load_pretrained_model then refuses
    assert set(loading._get_device_map(whole, "auto", {0: total // 3, 1: total // 3}, None).values()) == {0, 1, "disk"}


def test_what_cannot_be_placed_is_refused(pair, tmp_path, monkeypatch):
    whole = pair(OV)[0]
    with pytest.raises(CheckpointError, match=r"model\.image_newline is on disk .* give it a device"):
        load(OV, device_map=offloading(whole.config, "model.image_newline"), offload_folder=str(tmp_path))
    for name, value in (("tp_plan", "auto"), ("tp_size", 2)):
        with pytest.raises(MethodError, match=rf"{name}: tensor parallelism is not offered.*gpus_per_model"):
            load(OV, **{name: value})
    monkeypatch.setattr(whole, "_tp_size", 2, raising=False)  # as transformers leaves it
    with pytest.raises(MethodError, match="fastv cannot act on a tensor-parallel model"):
        accelerate(whole, "fastv")
    with accelerate(whole, None):
        pass


# -- gpus_per_model ----------------------------------------------------------------------------------------------------


def test_every_process_gets_gpus_of_its_own():
    placement = pytest.importorskip("lmms_eval_accelerate.models.placement")
    gigabyte = 10**9
    for gpus, each in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if gpus % each:
            continue
        for processes in range(1, gpus // each + 1):
            free = [(gpu + 1) * gigabyte for gpu in range(gpus)]
            spread = [placement.place(rank, processes, gpus, each, free) for rank in range(processes)]
            owned = [gpu for p in spread for gpu in p.gpus]
            assert owned == list(range(processes * each)), "no GPU twice, none out of order"
            assert all(p.device == f"cuda:{p.gpus[0]}" and len(p.gpus) == each for p in spread)
            for p in spread:
                assert p.device_map == (None if each == 1 else "auto")
                limits = {gpu: int(free[gpu] * placement.WEIGHTS_SHARE) for gpu in p.gpus}
                assert p.max_memory == (None if each == 1 else limits)
    assert placement.place(1, 2, 0) == placement.Placement("cpu")
    assert placement.place_process(0, 1).device in ("cpu", "cuda:0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 1, 8, 3), "gpus_per_model=3 does not divide the 8 visible GPUs; possible: 1, 2, 4, 8"),
        ((0, 8, 8, 2), "8 processes with gpus_per_model=2 need 16 GPUs, but 8 are visible; start at most 4"),
        ((0, 2, 1, 1), "2 processes with gpus_per_model=1 need 2 GPUs, but 1 are visible"),
        ((0, 1, 0, 2), "gpus_per_model=2 needs GPUs; this machine shows none"),
        ((0, 1, 2, 4), "gpus_per_model=4 does not divide the 2 visible GPUs"),
        ((0, 1, 8, 0), "gpus_per_model must be at least 1, not 0"),
        ((2, 2, 8, 1), "local rank 2 is not one of 2 processes"),
        ((0, 1, 8, 8), "the free memory of all 8 GPUs is needed"),
    ],
)
def test_impossible_placements_are_refused(arguments, says):
    placement = pytest.importorskip("lmms_eval_accelerate.models.placement")
    with pytest.raises(MethodError, match=says):
        placement.place(*arguments)


def test_official_methods_are_all_here():
    assert all(method_class(name) for name in OFFICIAL)
