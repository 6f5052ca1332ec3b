"""What holds tensors is printed by its shapes."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import accelerate_methods.stages
from accelerate_methods.engine.sequences import VisualSequence
from accelerate_methods.stages.compress import VisualItem, selection
from accelerate_methods.stages.prefill import Selection
from accelerate_methods.stages.printing import ShapesShown
from accelerate_methods.stages.views import Views
from llava.model.splice import Spliced
from llava.video_utils import FrameSample, Video


def test_shapes_stand_in_the_place_of_numbers():
    item = VisualItem(
        "video", torch.zeros(3, 7, 5), torch.arange(21).view(3, 7), 21, signals={"key_states": torch.zeros(3, 7, 2)}
    )
    assert repr(item) == (
        "VisualItem(modality='video', features=float32[3, 7, 5], positions=int64[3, 7], length=21, "
        "signals={key_states: float32[3, 7, 2]})"
    )
    kept = selection(item, torch.tensor([1, 4]))
    assert repr(kept) == "Compressed(tokens=float32[2, 5], positions=int64[2], owner=int64[3, 7])"
    assert repr(Selection(torch.tensor([[0, 2]]))) == "Selection(indices=int64[1, 2])"
    views = Views(torch.zeros(2, 4, 3), (2, 2), uncompressed=lambda: item)
    assert repr(views) == "Views(features=float32[2, 4, 3], grid=(2, 2), uncompressed=<lambda>)"


def test_arrays_and_long_lists_are_short():
    clip = Video(np.zeros((16, 4, 4, 3), np.uint8), FrameSample(list(range(16)), [0.5] * 16, 8.0), 100, 12.5)
    assert repr(clip).startswith("Video(frames=uint8[16, 4, 4, 3], ") and len(repr(clip)) < 400


@pytest.mark.parametrize("owner", [VisualSequence, Spliced, Video])
def test_what_users_meet_elsewhere_is_printed_so_too(owner):
    assert owner.__repr__ is ShapesShown.__repr__


def test_no_dataclass_of_the_contract_prints_a_tensor():
    for found in pkgutil.iter_modules(accelerate_methods.stages.__path__):
        module = importlib.import_module(f"accelerate_methods.stages.{found.name}")
        for kind in vars(module).values():
            if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                holds = [field.name for field in dataclasses.fields(kind) if "Tensor" in str(field.type)]
                assert not holds or kind.__repr__ is ShapesShown.__repr__, kind
