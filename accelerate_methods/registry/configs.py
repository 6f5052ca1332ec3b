"""The YAML files below ``configs/``: names, paths, contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate_methods.stages.errors import MethodError, UnknownNameError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def config_path(spec: str | Path) -> Path:
    """The YAML file behind ``spec``: a path, or a name below ``configs/`` with or without its suffix."""
    spec = Path(spec)
    tried = [spec, spec.with_name(spec.name + ".yaml"), CONFIG_DIR / spec, CONFIG_DIR / f"{spec}.yaml"]
    for path in tried:
        if path.is_file():
            return path
    raise UnknownNameError("config", str(spec), config_names())


def config_names() -> list[str]:
    """The methods' configs below ``configs/``, as "fastvid/llava_onevision"; the tables in ``reproduce/`` are none."""
    paths = (path.relative_to(CONFIG_DIR).with_suffix("") for path in CONFIG_DIR.rglob("*.yaml"))
    return sorted(str(path) for path in paths if path.parts[0] != "reproduce")


def read_config(spec: str | Path) -> dict[str, Any]:
    """The whole config file as a mapping (also its ``model:`` section, which the harness and scripts use)."""
    import yaml

    path = config_path(spec)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise MethodError(f"{path}: expected a mapping with a 'method' key, found {type(content).__name__}.")
    return content
