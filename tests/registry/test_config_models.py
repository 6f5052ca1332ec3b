"""A config is for the model that it names: other models refuse it, in Python as in the plugin."""

from __future__ import annotations

import pytest

from accelerate_methods import MethodError, Pipeline, UnknownNameError, accelerate, resolve
from accelerate_methods.registry.configs import config_names
from accelerate_methods.registry.families import FAMILIES
from accelerate_methods.registry.models import families_of
from tests.support.native_models import native_model
from tests.support.paths import ROOT
from tests.support.qwen_inputs import QWEN3, QWEN25, qwen

V15, V16, OV, VIDEO = "tiny-llava-1.5", "tiny-llava-1.6", "tiny-llava-onevision", "tiny-llava-video"
EMBEDDED = ROOT / "assets" / "tiny-llava-onevision"


@pytest.mark.parametrize("name", config_names())
def test_every_config_knows_its_model(name):
    (written_for,) = resolve(name).models
    wanted = families_of(name.partition("/")[2])
    assert set(written_for.families) >= {family.name for family in wanted} and written_for.title
    others = {family.name for family in FAMILIES} - set(written_for.families)
    assert len(others) >= len(FAMILIES) - 2  # the family, and the same models in transformers


@pytest.mark.parametrize(
    ("model", "own", "others"),
    [
        (OV, "fastv/llava_onevision", ["fastv/llava_video", "fastv/llava_1_5", "fastv/llava_next", "fastv/qwen2_5_vl"]),
        (VIDEO, "fastv/llava_video", ["fastv/llava_onevision", "fastvid/qwen2_5_vl"]),
        (V15, "fastv/llava_1_5", ["fastv/llava_next", "fastv/llava_onevision"]),
        (V16, "visionzip/llava_next", ["visionzip/llava_1_5", "visionzip/llava_video"]),
    ],
)
def test_models_of_the_tree_take_their_own_configs_only(model, own, others, tiny):
    model = tiny(model)
    for config in others:
        with pytest.raises(MethodError, match=f"config {config} is for .*, this model is LLaVA-") as error:
            accelerate(model, config)
        assert "\n" not in str(error.value) and "acceleration" not in model.__dict__
    with pytest.raises(MethodError, match="is for"):
        accelerate(model, [others[0]], **({"k": 1} if others[0].startswith("fastv/") else {}))
    params = {} if own.startswith("visionzip") else {"k": 1, "retention_ratio": 0.5}
    with accelerate(model, own, **params):
        assert model.acceleration.pipeline.models[0].config == own


def test_models_of_transformers_take_configs_of_the_same_weights():
    """A paper's values are those of the weights, whichever library runs them."""
    model = native_model(OV)
    with accelerate(model, "fastv/llava_onevision", k=1):
        pass
    for config in ("fastvid/llava_video", "fastvid/qwen2_5_vl"):  # as the plugin does
        with pytest.raises(MethodError, match=f"config {config} is for .*, this model is LLaVA-OneVision-HF"):
            accelerate(model, config)
    for name in (QWEN25, QWEN3):  # a family
        with (
            accelerate(qwen(name), "uniform", retention_ratio=0.5),
            pytest.raises(MethodError, match=r"Qwen2/2\.5/3-VL"),
        ):
            accelerate(qwen(name), "fastvid/llava_onevision")
        accelerate(qwen(name), "fastvid/qwen2_5_vl").detach()


def test_the_embedded_model_is_what_it_is_loaded_as():
    from llava.model.builder import load_pretrained_model

    def load(**more):
        return load_pretrained_model(str(EMBEDDED), device_map="cpu", torch_dtype="float32", **more)[1]

    with pytest.raises(MethodError, match=r"is for LLaVA-Video, this model is LLaVA-OneVision\."):
        load(method="fastvid/llava_video")
    load(method="fastvid/llava_onevision")
    load(method="fastvid/llava_video", overwrite_config={"mm_newline_position": "grid"})
    with pytest.raises(MethodError, match=r"method_params \(retention_ratio\) given, but no method"):
        load(method_params={"retention_ratio": 0.1})


def test_a_config_of_your_own_goes_with_every_model_unless_it_names_one(tmp_path, tiny):
    file = tmp_path / "mine.yaml"
    file.write_text("method: uniform\nparams: {retention_ratio: 0.5}\n", encoding="utf-8")
    assert resolve(file).models == ()
    for name in (OV, V15):
        with accelerate(tiny(name), file):
            pass
    text = "method: uniform\nparams: {retention_ratio: 0.5}\nmodel: {family: llava_video, pretrained: x}\n"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MethodError, match=r"mine\.yaml is for LLaVA-Video, this model is LLaVA-OneVision"):
        accelerate(tiny(OV), file)
    file.write_text(text.replace("llava_video", "llava"), encoding="utf-8")
    for name in (V15, V16):  # both families go by this key
        with accelerate(tiny(name), file):
            pass
    file.write_text(text.replace("llava_video", "llava_vdeo"), encoding="utf-8")
    with pytest.raises(UnknownNameError, match="Did you mean 'llava_video'"):
        resolve(file)


def test_what_a_pipeline_is_for_stays_with_it():
    plain, made = resolve("fastvid", retention_ratio=0.1), resolve("fastvid/llava_video", retention_ratio=0.1)
    assert plain.models == () and [m.title for m in made.models] == ["LLaVA-Video"]
    assert resolve(made).models == made.models and resolve([made]).models == made.models
    assert resolve(made.methods[0]).models == ()  # a method object has been taken out of its config
    assert resolve({"method": "fastvid", "model": "llava_video"}).models[0].families[0] == "LLaVA-Video"
    assert made == Pipeline(made.methods) and "models" not in repr(made)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"method": "dense", "retention_ratio": 0.1}, "no method to apply them to"),
        ({"method": None, "params": {"retention_ratio": 0.1}}, "no method to apply them to"),
        ({"methods": ["fastvid", "fastv"], "params": {"k": 3}}, "'params' beside 'methods' means nothing"),
        ({"methods": ["fastvid"], "method": "fastv"}, "'method' beside 'methods' means nothing"),
        ({"method": "fastvid", "params": 3}, "'params' must be a mapping"),
        ({"method": "fastvid", "params": {}, "retention_ratio": 0.1}, "unknown key"),
    ],
)
def test_parts_of_a_config_that_would_be_ignored_are_errors(content, says):
    with pytest.raises(MethodError, match=says):
        resolve(content)


@pytest.mark.parametrize("name", ["method", "spec", "name", "cls", "self"])
def test_parameters_with_the_names_of_our_arguments_are_unknown_parameters(name):
    with pytest.raises(UnknownNameError, match=f"'{name}'"):
        resolve("fastvid", **{name: 1})
