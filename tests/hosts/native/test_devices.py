"""Native models under accelerate's ``device_map`` (several devices, acted on CPU; weights on disk), and quantised.

A model that accelerate has dispatched must give the very answers of the same model in one piece.
"""

import contextlib
import copy
import importlib.util

import pytest
import torch
from accelerate import dispatch_model

from accelerate_methods import accelerate, detach, record
from accelerate_methods.engine.recording import RequestRecord
from tests.hosts.native.test_llava import built
from tests.methods.test_every_method import OV, V15, V16
from tests.support import native_questions as asking
from tests.support.native_questions import GREEDY, MAIN, QUESTIONS, answer, native
from tests.support.several_devices import SeveralDevices, place_of

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad", "siglip_tower")
METHODS = [(None, OV), ("fastv", OV), ("visionzip", OV), ("fastvid", OV), ("dycoke", OV), ("prunevid", OV),
           ("visionzip+fastv", V16), ("fastervlm", V15), ("random_prefill", V15), ("pool", V15)]  # fmt: skip
QUICK = [("fastv", OV), ("visionzip", OV), ("fastvid", OV), ("visionzip", V16)]


def plain(tensor):
    return tensor.as_subclass(torch.Tensor)


def same(got, expected):
    assert torch.equal(plain(got[0]), expected[0])
    torch.testing.assert_close(plain(got[1]), expected[1], atol=2e-5, rtol=2e-5)


def parts(model):
    """Every part that a device map names."""
    layers = [f"model.language_model.layers.{i}" for i in range(len(model.model.language_model.layers))]
    names = ["model.vision_tower", "model.multi_modal_projector", "lm_head", *layers]
    names += [f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb")]
    return names + ["model.image_newline"] * hasattr(model.model, "image_newline")


def spread(name, where, **kwargs):
    """A copy of a model, each part where ``where`` (beginning of its name -> device, "" for all others) says."""
    model = copy.deepcopy(native(name))
    places = {part: next(d for begin, d in where.items() if part.startswith(begin)) for part in parts(model)}
    return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement, **kwargs)


def question(name):
    return asking.inputs(name, QUESTIONS[name][MAIN[name]])


def check(method, name, other, block=contextlib.nullcontext):
    whole, asked = native(name), question(name)
    with accelerate(whole, built(method)), record() as expected:
        answers, logits = answer(whole, asked), whole(**asked).logits
    with block(), accelerate(other, built(method)), record() as got:
        same(answer(other, asked), answers)
        torch.testing.assert_close(plain(other(**asked).logits), logits, atol=2e-5, rtol=2e-5)
        for request, wanted in zip(got, expected, strict=True):
            assert request.layer_lengths(0) == wanted.layer_lengths(0)
            for item, same_item in zip(request.samples[0].items, wanted.samples[0].items, strict=True):
                assert torch.equal(plain(item.left_at), same_item.left_at)
                assert item.tokens_after == same_item.tokens_after


# -- several devices ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several():
    """several(name): the model over three GPUs, whatever a method touches on another one than what goes with it."""
    models = {}

    def get(name):
        if name not in models:
            layers = {f"model.language_model.layers.{i}": f"cuda:{(i + 1) % 2}" for i in range(8)}
            where = {**layers, "model.language_model.rotary_emb": "cuda:2", "model.vision_tower": "cuda:2"}
            where |= {"model.multi_modal_projector": "cuda:1", "lm_head": "cuda:1", "": "cuda:0"}
            native(name)  # loading is not part of the act
            with SeveralDevices():
                models[name] = model = spread(name, where, main_device="cuda:0")
                if hasattr(model.model, "image_newline"):  # accelerate leaves to the loader what is no module
                    model.model._parameters["image_newline"] = model.model.image_newline.to("cuda:0")
        detach(models[name])
        return models[name]

    return get


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_layers_on_several_devices(method, name, several, monkeypatch):
    monkeypatch.setattr(RequestRecord, "span", lambda *_: contextlib.nullcontext())  # there are no CUDA events here
    check(method, name, several(name), SeveralDevices)


def test_hooks_of_the_dispatched_model_come_back(several):
    model = several(OV)
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    assert before[""] is not None
    with SeveralDevices():
        with accelerate(model, built("visionzip")):
            assert model.__dict__["forward"] is not before[""]
        assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before
        assert place_of(model(**question(OV)).logits) == torch.device("cpu"), "where the inputs came from"


@pytest.mark.parametrize(("method", "name"), [("fastv", OV), ("visionzip+fastv", V16)])
def test_beams_on_several_devices(method, name, several):
    asked, more = question(name), {**GREEDY, "num_beams": 2}
    with accelerate(native(name), built(method)):
        expected = native(name).generate(**asked, **more)
    model = several(name)
    with SeveralDevices(), accelerate(model, built(method)):
        assert torch.equal(plain(model.generate(**asked, **more)), expected)


# -- weights elsewhere -------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "layers": "model.language_model.layers",
    "tower": "model.vision_tower",
    "projector": "model.multi_modal_projector",
    "embedding": "model.language_model.embed_tokens",
}


@pytest.mark.parametrize(("method", "name"), QUICK)
@pytest.mark.parametrize("which", ELSEWHERE)
def test_weights_on_disk(which, method, name, tmp_path):
    other = spread(name, {ELSEWHERE[which]: "disk", "": "cpu"}, offload_dir=str(tmp_path))
    away = {n for n, parameter in other.named_parameters() if parameter.is_meta}
    assert away == {n for n, _ in other.named_parameters() if n.startswith(ELSEWHERE[which])}
    check(method, name, other)
    assert away == {n for n, parameter in other.named_parameters() if parameter.is_meta}, "weights were left"


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_the_whole_model_on_disk(method, name, tmp_path):
    other = spread(name, {"model.image_newline": "cpu", "": "disk"}, offload_dir=str(tmp_path))
    assert all(parameter.is_meta for n, parameter in other.named_parameters() if "newline" not in n)
    check(method, name, other)


def test_loading_with_a_device_map(tmp_path):
    """``from_pretrained(device_map=...)`` as users write it."""
    whole = native(OV)
    whole.save_pretrained(tmp_path / "checkpoint")
    places = dict.fromkeys(parts(whole), "cpu")
    places |= {"model.language_model.layers.1": "disk", "model.vision_tower": "disk"}
    other = type(whole).from_pretrained(
        tmp_path / "checkpoint", device_map=places, offload_folder=str(tmp_path / "disk"), dtype=torch.float32
    ).eval()
    assert {"disk", "cpu"} == set(map(str, other.hf_device_map.values()))
    for method in (None, "fastv", "visionzip", "fastvid"):
        check(method, OV, other)


# -- quantised weights -------------------------------------------------------------------------------------------------


def quantised_torchao(name):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(native(name))
    quantize_(model.model.language_model, Int8WeightOnlyConfig())
    quantize_(model.model.vision_tower, Int8WeightOnlyConfig())
    return model


def quantised_by_hand(name):
    """int8 weights that are no parameters of a ``Linear``: what any quantising library makes of a model."""

    class Int8Linear(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            self.register_buffer("packed", (linear.weight / scale).round().to(torch.int8))
            self.register_buffer("scale", scale)
            self.bias = linear.bias

        def forward(self, states):
            return torch.nn.functional.linear(states, self.packed.to(states.dtype) * self.scale, self.bias)

    model = copy.deepcopy(native(name))
    for part in (model.model.language_model, model.model.vision_tower, model.model.multi_modal_projector):
        for parent in list(part.modules()):
            for child, module in list(parent.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(parent, child, Int8Linear(module))
    return model


KINDS = {"by hand": quantised_by_hand, "torchao": quantised_torchao}


def whole_again(model):
    """The same numbers in plain float32 weights."""
    plain_model = copy.deepcopy(model)
    for parent in list(plain_model.modules()):
        for child, module in list(parent.named_children()):
            weight = getattr(module, "weight", None)
            if hasattr(module, "packed"):
                linear = torch.nn.Linear(module.packed.shape[1], module.packed.shape[0], bias=module.bias is not None)
                linear.weight = torch.nn.Parameter(module.packed.float() * module.scale)
                linear.bias = module.bias
                setattr(parent, child, linear)
            elif weight is not None and hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao"):
                module.weight = torch.nn.Parameter(weight.dequantize())
    return plain_model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [V15, V16, OV])
def test_quantised_weights(name, kind):
    """Every method gives what it gives with the same numbers in float weights."""
    if kind == "torchao" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed (pip install torchao)")
    model = KINDS[kind](name)
    same_numbers = whole_again(model)
    asked = question(name)
    before = model(**asked).logits
    torch.testing.assert_close(before, same_numbers(**asked).logits, atol=1e-3, rtol=1e-3)
    assert not torch.equal(before, native(name)(**asked).logits), "nothing was quantised"
    for method in (None, *(m for m, n in METHODS if n == name and m), "random"):
        with accelerate(model, built(method)), record() as got:
            logits, ids = model(**asked).logits, model.generate(**asked, **GREEDY)
        with accelerate(same_numbers, built(method)), record() as wanted:
            torch.testing.assert_close(logits, same_numbers(**asked).logits, atol=1e-3, rtol=1e-3)
            assert torch.equal(ids, same_numbers.generate(**asked, **GREEDY))
        for item, other in zip(got[0].samples[0].items, wanted[0].samples[0].items, strict=True):
            assert torch.equal(item.left_at, other.left_at)
    assert torch.equal(model(**asked).logits, before)


def test_weights_of_bitsandbytes(tmp_path):
    """8-bit weights as ``from_pretrained`` makes them; activations are rounded too, so there is no float twin."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (pip install bitsandbytes)")
    from transformers import BitsAndBytesConfig

    whole, asked = native(V15), question(V15)
    whole.save_pretrained(tmp_path)
    how = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu", "dtype": torch.float32}
    model = type(whole).from_pretrained(tmp_path, **how).eval()
    assert {"Linear8bitLt"} <= {type(module).__name__ for module in model.model.language_model.modules()}
    plain_logits, ids = model(**asked).logits, model.generate(**asked, **GREEDY)
    for method in ("random", "fastv", "visionzip", "fastervlm"):
        with accelerate(whole, built(method)), record() as wanted:
            whole(**asked)
        with accelerate(model, built(method)), record() as got:
            assert torch.isfinite(model(**asked).logits).all()
            model.generate(**asked, **GREEDY)
        assert got[0].layer_lengths(0) == got[1].layer_lengths(0) == wanted[0].layer_lengths(0)
    with accelerate(model, "random", retention_ratio=1.0):
        assert torch.equal(model(**asked).logits, plain_logits)
        assert torch.equal(model.generate(**asked, **GREEDY), ids)
