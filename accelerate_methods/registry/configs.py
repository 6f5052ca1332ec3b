"""The YAML files below ``configs/``: names, paths, contents.

``configs/models/<model>.yaml`` describes a model once; ``configs/<method>/<model>.yaml`` says what a method runs with
on it and names it, with or without changes::

    model: llava_video                                # as in configs/models/llava_video.yaml
    model: {name: llava_video, max_frames_num: 32}    # with other values for some of that file's keys
    model: {family: llava_video, pretrained: ...}     # a description of its own
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate_methods.registry.families import ModelFamily, families
from accelerate_methods.stages.errors import MethodError, UnknownNameError


def _config_dir() -> Path:
    """``configs/``: inside the package where a wheel was installed (setup.py puts it there), else of the checkout."""
    installed = Path(__file__).resolve().parents[1] / "configs"
    return installed if installed.is_dir() else installed.parents[1] / "configs"


CONFIG_DIR = _config_dir()
#: folders below ``configs/`` that hold no methods' configs: models, and the papers' tables
_OTHER = ("models", "reproduce")
#: keys of a model's file that describe it to a reader and to the registry; the rest is how it is run
_ABOUT = ("title", "model_class")


def config_path(spec: str | Path) -> Path:
    """The YAML file behind ``spec``: a path, or a name below ``configs/`` with or without its suffix."""
    spec = Path(spec)
    tried = [spec, spec.with_name(spec.name + ".yaml"), CONFIG_DIR / spec, CONFIG_DIR / f"{spec}.yaml"]
    for path in tried:
        if path.is_file():
            return path
    if spec.is_absolute():
        raise MethodError(f"config {spec}: no such file.")
    raise UnknownNameError("config", str(spec), config_names())


def config_names() -> list[str]:
    """The methods' configs below ``configs/``, as "fastvid/llava_onevision"."""
    paths = (path.relative_to(CONFIG_DIR).with_suffix("") for path in CONFIG_DIR.rglob("*.yaml"))
    return sorted(str(path) for path in paths if path.parts[0] not in _OTHER)


def model_names() -> list[str]:
    """The models of ``configs/models/``, as "llava_onevision"."""
    return sorted(path.stem for path in (CONFIG_DIR / "models").glob("*.yaml"))


def read_model(name: str) -> dict[str, Any]:
    """What ``configs/models/<name>.yaml`` holds: its ``title``, its ``family``, and how it is run.

    Raises:
        UnknownNameError: there is no such model.
    """
    if name not in model_names():
        raise UnknownNameError("model", name, model_names())
    return _mapping(CONFIG_DIR / "models" / f"{name}.yaml")


def read_config(spec: str | Path) -> dict[str, Any]:
    """The whole config file as a mapping, its ``model:`` section complete (whether it names a model or describes one).

    "models/llava_onevision" is a config without a method.

    Raises:
        UnknownNameError: no such file or model, or a key that the model's file does not have.
        MethodError: the file is no mapping.
    """
    content = written_config(spec)
    if config_path(spec).parent == CONFIG_DIR / "models":
        content = {"model": config_path(spec).stem}
    if content.get("model") is not None:
        content["model"] = _model_section(content["model"], str(config_path(spec)))
    return content


def written_config(spec: str | Path) -> dict[str, Any]:
    """The config file as it is written: its ``model:`` may be a name.

    Raises:
        UnknownNameError, MethodError: no such file, or no mapping.
    """
    return _mapping(config_path(spec))


@dataclasses.dataclass(frozen=True)
class ConfigModel:
    """The model that a config is written for.

    Attributes:
        config: file or name of the config.
        title: the model's name for a reader.
        families: names of the families that it may belong to.
    """

    config: str
    title: str
    families: tuple[str, ...]

    def check(self, family: str) -> None:
        """
        Args:
            family: name of the family of the model at hand ("LLaVA-OneVision").

        Raises:
            MethodError: the config is written for another one.
        """
        if family not in self.families:
            raise MethodError(
                f"config {self.config} is for {self.title}, this model is {family}. Name a config of this model, or "
                "the method and its values without a config."
            )


def config_model(content: Mapping[str, Any], where: str) -> ConfigModel | None:
    """The model that the content of a config is written for; None if it names none, and goes with every model.

    Raises:
        UnknownNameError: no such model or family.
        MethodError: the section is neither a name nor a mapping.
    """
    given = content.get("model")
    if given is None:
        return None
    section = _model_section(given, where)
    about = read_model(_named(given)) if _named(given) is not None else section
    key, model_class = section.get("family"), about.get("model_class")
    if key is None:
        return None
    of_key = [family for family in families() if family.key == key]
    if not of_key:
        raise UnknownNameError(f"family in the model section of {where}:", key, {f.key for f in families()})
    fit = [f for f in of_key if model_class is None or model_class in f.classes]
    fit = [f for f in fit if f.name == about.get("title")] or fit
    names = [name for family in fit for name in (family.name, *_elsewhere(family))]
    title = str(about.get("title") or " or ".join(f.name for f in fit))
    return ConfigModel(where, title, tuple(names))


def _elsewhere(family: ModelFamily) -> list[str]:
    """The families of the same models in the other library: a paper's values are those of the weights."""
    return [f"{family.name}-HF"] if not family.classes else []


def _named(given: Any) -> str | None:
    """The name out of ``configs/models`` in a model section, None where it describes a model of its own."""
    return given if isinstance(given, str) else given.get("name")


def _model_section(given: Any, where: str) -> dict[str, Any]:
    """Family, checkpoint and settings; keys with null are left out, so that the model's class decides."""
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, dict):
        raise MethodError(f"{where}: 'model' must be a name of configs/models or a mapping, got {given!r}.")
    if "name" not in given:
        return given
    changes = {key: value for key, value in given.items() if key != "name"}
    model = {key: value for key, value in read_model(given["name"]).items() if key not in _ABOUT}
    for key in changes:
        if key not in model:
            raise UnknownNameError(f"key of model {given['name']!r} in {where}:", key, model)
    return {key: value for key, value in {**model, **changes}.items() if value is not None}


def _mapping(path: Path) -> dict[str, Any]:
    from accelerate_methods.registry.yaml_files import read_yaml

    content = read_yaml(path)
    if not isinstance(content, dict):
        raise MethodError(f"{path}: expected a mapping with a 'method' key, found {type(content).__name__}.")
    for key, kind, what in (("params", dict, "a mapping"), ("levels", list, "a list"), ("method", str, "a name")):
        if content.get(key) is not None and not isinstance(content[key], kind):
            raise MethodError(f"{path}: {key!r} must be {what}, not {type(content[key]).__name__}.")
    if not all(isinstance(level, dict) for level in content.get("levels") or ()):
        raise MethodError(f"{path}: every entry of 'levels' must be a mapping.")
    return content
