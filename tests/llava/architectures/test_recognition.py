"""Which architecture a checkpoint is of: each of the tiny checkpoints, and configs with odd values."""

import importlib

import pytest

from accelerate_methods.registry.architectures import ARCHITECTURES
from llava.model.architectures import architecture_of
from llava.model.checkpoint import read_config
from tests.support.paths import GOLDEN, ROOT

#: beginning of a tiny checkpoint's folder -> file of its architecture; others are plain LLaVA or of transformers
_FOLDERS = {
    **{"tiny-mqt": "mqt", "tiny-llava-mini": "llava_mini", "tiny-llama-vid": "llama_vid"},
    **{"tiny-voco": "voco_llama", "tiny_fastvlm": "fastvlm", "tiny_videoxl": "video_xl"},
    **{"tiny_flashsloth": "flashsloth", "tiny_hicom": "hicom", "tiny_tgllava": "tg_llava"},
}
CHECKPOINTS = [
    path.parent
    for path in sorted([*GOLDEN.rglob("config.json"), ROOT / "assets/tiny-llava-onevision/config.json"])
    if path.parent.name.startswith("tiny")
]
MODULES = {e.file: importlib.import_module(f"llava.model.architectures.{e.file}") for e in ARCHITECTURES}


def of(folder):
    return next((file for start, file in _FOLDERS.items() if folder.name.startswith(start)), None)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_is_of_one_architecture(folder):
    config, wanted = read_config(folder), of(folder)
    by_config = [file for file, module in MODULES.items() if module.recognises(config)]
    assert by_config in ([], [wanted])
    found = architecture_of(config, folder)
    assert (None if found is None else found.about.file) == wanted


def test_every_architecture_has_a_tiny_checkpoint():
    assert {of(folder) for folder in CHECKPOINTS} - {None} == {entry.file for entry in ARCHITECTURES}


@pytest.mark.parametrize("value", [None, ""])
def test_empty_values_are_of_none(value):
    keys = ("architectures", "model_type", "mm_projector_type", "mm_vision_tower", "mm_text_tower", "enable_beacon")
    assert architecture_of(dict.fromkeys(keys, value)) is None
    assert architecture_of({"architectures": [], "model_type": "llava"}) is None
