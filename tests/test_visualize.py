"""Pictures of kept tokens come from provenance alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accelerate_methods.errors import MethodError
from accelerate_methods.recording import ItemRecord
from accelerate_methods.visualize import draw_kept_tokens, token_states

pytest.importorskip("matplotlib")


def make_item() -> ItemRecord:
    owner = torch.tensor([[0, -1, 0, 1], [-1, -1, 2, 1]])
    kept = torch.tensor([[True, False, False, True], [False, False, True, False]])
    return ItemRecord("video", 8, 3, grid=(2, 2), owner=owner, kept=kept)


def test_states_tell_dropped_merged_and_kept_apart():
    expected = [[[2, 0], [1, 2]], [[0, 0], [2, 1]]]
    assert token_states(make_item()).tolist() == expected


def test_what_the_language_model_drops_is_dropped():
    item = make_item()
    item.left_at, item.num_layers = torch.tensor([[4, 0, 4, 2], [0, 0, 4, 2]]), 4
    assert token_states(item).tolist() == [[[2, 0], [1, 0]], [[0, 0], [2, 0]]]


def test_picture_shows_kept_cells_as_they_are_and_darkens_the_rest(tmp_path):
    frames = np.full((2, 20, 20, 3), 200, dtype=np.uint8)
    path = draw_kept_tokens(frames, make_item(), tmp_path / "kept.png")
    from PIL import Image

    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    levels, counts = np.unique(pixels[(pixels == pixels[:, :1]).all(1)][:, 0], return_counts=True)
    shown = {int(level): int(count) for level, count in zip(levels, counts, strict=True)}
    for grey in (36, 90, 200):  # dropped, merged, kept shades of the frame
        assert shown.get(grey, 0) > 500


def test_wrong_number_of_frames_and_missing_provenance_are_errors(tmp_path):
    with pytest.raises(MethodError, match="3 frames given for the 2"):
        draw_kept_tokens(np.zeros((3, 8, 8, 3), np.uint8), make_item(), tmp_path / "x.png")
    with pytest.raises(MethodError, match="no provenance"):
        token_states(ItemRecord("image", 4, 4))
