"""Configs: a model is described once, a method's config names it and may change single values."""

from __future__ import annotations

import pytest
import yaml

from accelerate_methods.registry import configs
from accelerate_methods.registry.configs import config_names, model_names, read_config, read_model
from accelerate_methods.registry.families import FAMILIES
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from tests.support.paths import ROOT

MODELS = ["embedded", "llava_1_5", "llava_next", "llava_onevision", "llava_video", "qwen2_5_vl"]


@pytest.fixture
def written(tmp_path):
    """Write a config and return its path."""

    def write(model) -> str:
        path = tmp_path / "mine.yaml"
        content = {"method": "fastvid", "params": {"retention_ratio": 0.2}, "model": model}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def test_models_and_tables_are_no_configs_of_methods():
    assert set(MODELS) <= set(model_names())
    assert not {name.partition("/")[0] for name in config_names()} & {"models", "reproduce"}
    assert {"fastvid/llava_onevision", "prunevid/embedded"} <= set(config_names())


@pytest.mark.parametrize("name", model_names())
def test_a_model_is_of_a_family_that_exists(name):
    model = read_model(name)
    assert model["family"] in {family.key for family in FAMILIES} and model["pretrained"] and model["title"]
    # a family of transformers is found by its class
    known = {name for family in FAMILIES for name in family.classes}
    assert (model["family"] == "hf") == ("model_class" in model) and model.get("model_class") in {None, *known}


def test_a_name_stands_for_the_whole_section(written):
    section = read_config(written("llava_video"))["model"]
    assert section == {
        "family": "llava_video",
        "pretrained": "lmms-lab/LLaVA-Video-7B-Qwen2",
        "conv_template": "qwen_1_5",
        "max_frames_num": 64,
        "force_sample": True,
        "add_time_instruction": False,
        "mm_spatial_pool_mode": "average",
    }


def test_single_values_can_be_changed_and_null_leaves_them_to_the_class(written):
    section = read_config(written({"name": "llava_video", "max_frames_num": 32, "force_sample": None}))["model"]
    assert section["max_frames_num"] == 32 and section["mm_spatial_pool_mode"] == "average"
    assert "force_sample" not in section and "name" not in section and "title" not in section
    assert read_config(written("llava_video"))["model"]["max_frames_num"] == 64  # nothing sticks


def test_the_one_published_setting_of_another_kind_is_kept():
    section = read_config("fastvid/qwen2_5_vl")["model"]
    assert section["fps"] == 2 and section["dtype"] == "bfloat16" and section["total_pixels"] == 90316800
    assert "max_num_frames" not in section and read_config("dycoke/qwen2_5_vl")["model"]["max_num_frames"] == 32


def test_a_full_section_is_taken_as_it_is(written):
    own = {"family": "llava_onevision", "pretrained": "org/model", "conv_template": "qwen_1_5", "anything": 3}
    path = written(own)
    assert read_config(path)["model"] == own
    assert resolve(path).methods[0].retention_ratio == 0.2


def test_a_config_without_a_model_has_none(written, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("method: fastvid\n", encoding="utf-8")
    assert "model" not in read_config(path)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("llava_onevison", UnknownNameError, "unknown model 'llava_onevison'.*Did you mean 'llava_onevision'"),
        ({"name": "llava_vid"}, UnknownNameError, "Did you mean 'llava_video'"),
        ({"name": "llava_video", "max_frame_num": 8}, UnknownNameError, "mine.yaml.*Did you mean 'max_frames_num'"),
        ({"name": "llava_video", "title": "x"}, UnknownNameError, "unknown key"),
        (["llava_video"], MethodError, "a name of configs/models or a mapping"),
    ],
)
def test_what_does_not_exist_is_one_clear_error(model, error, message, written):
    path = written(model)
    with pytest.raises(error, match=message):
        read_config(path)
    with pytest.raises(error, match=message):
        resolve(path)


def test_unknown_config_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'fastvid/llava_onevision'"):
        read_config("fastvid/llava_onevison")


def test_every_method_shares_the_setting_of_the_model_unless_it_says_so():
    """What a method's config changes stands in the config itself; nothing else differs between methods."""
    changed = {}
    for name in config_names():
        given = yaml.safe_load((configs.CONFIG_DIR / f"{name}.yaml").read_text(encoding="utf-8"))["model"]
        assert (given if isinstance(given, str) else given["name"]) == name.partition("/")[2]
        if isinstance(given, dict):
            changed[name] = given
    assert list(changed) == ["fastvid/qwen2_5_vl", "flashvid/llava_video"]


def test_configs_cite_what_a_reader_can_open():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "specs/" not in path.read_text(encoding="utf-8"), path
