"""The YAML files below ``configs/``: names, paths, contents.

``configs/models/<model>.yaml`` describes a model once; ``configs/<method>/<model>.yaml`` says what a method runs with
on it and names it, with or without changes::

    model: llava_video                                # as in configs/models/llava_video.yaml
    model: {name: llava_video, max_frames_num: 32}    # with other values for some of that file's keys
    model: {family: llava_video, pretrained: ...}     # a description of its own
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate_methods.stages.errors import MethodError, UnknownNameError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
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

    Raises:
        UnknownNameError: no such file or model, or a key that the model's file does not have.
        MethodError: the file is no mapping.
    """
    path = config_path(spec)
    content = _mapping(path)
    if content.get("model") is not None:
        content["model"] = _model_section(content["model"], str(path))
    return content


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
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise MethodError(f"{path}: expected a mapping with a 'method' key, found {type(content).__name__}.")
    return content
