"""Models by the names that people use: those of ``configs/models/``, their titles, and the titles of model families."""

from __future__ import annotations

from accelerate_methods.registry.configs import model_names, read_model
from accelerate_methods.registry.families import ModelFamily, families
from accelerate_methods.stages.errors import UnknownNameError


def families_of(name: str) -> list[ModelFamily]:
    """The families that a model may belong to; more than one only where a checkpoint decides.

    Args:
        name: of ``configs/models/`` ("llava_onevision"), or a title ("LLaVA-OneVision", "Qwen2.5-VL", "InternVL"), in
            any case.

    Raises:
        UnknownNameError: with all names, and the nearest.
    """
    models = {model: read_model(model) for model in model_names()}
    for model, content in models.items():
        if name.lower() in (model, str(content["title"]).lower()):
            wanted = content.get("model_class")
            fit = [f for f in families() if f.key == content["family"] and (wanted is None or wanted in f.classes)]
            return [f for f in fit if f.name == content["title"]] or fit
    fit = [f for f in families() if name.lower() in (f.name.lower(), getattr(f, "file", None))]
    if not fit:
        raise UnknownNameError("model", name, {*models, *(f.name for f in families())})
    return fit
