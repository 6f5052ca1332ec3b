"""The Python of docs/architectures/, run page by page on the tiny checkpoint of each architecture."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from accelerate_methods.registry.architectures import ARCHITECTURES
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from tests.support.architectures import TINY, tiny_checkpoint
from tests.support.paths import ROOT

PAGES = ROOT / "docs" / "architectures"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")


def test_every_architecture_has_a_page_and_a_checkpoint_to_run_it_on():
    files = {about.file for about in ARCHITECTURES}
    assert {page.stem for page in PAGES.glob("*.md")} == files == set(TINY)


@pytest.mark.parametrize("about", ARCHITECTURES, ids=lambda about: about.file)
def test_python_of_the_page_runs(about, tmp_path):
    blocks = BLOCK.findall((PAGES / f"{about.file}.md").read_text("utf-8"))
    assert blocks, "a page shows how its model is called"
    asked = []

    def load(name, **how):
        asked.append(name)
        loaded = load_pretrained_model(str(tiny_checkpoint(about.file, tmp_path)), None, None, device="cpu", **how)
        loaded[1].generation_config.max_new_tokens = 4  # random weights do not come to an end
        return loaded

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    video = np.random.default_rng(1).integers(0, 256, (4, 40, 60, 3), dtype=np.uint8)
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 8, 9]])
    names = {
        **{"load_pretrained_model": load, "process_images": process_images, "torch": torch},
        **{"picture": picture, "pictures": [picture], "video": video, "ids": ids, "question": "What is it?"},
        **{"prompt": "USER: <image>\nWhat is it? ASSISTANT:", "subtitles": ["a", "b", "c", "d"]},
    }
    model = load(about.file)[1]
    names["other_ids"] = torch.tensor([[5, 9, 8]])
    names["ids_of_questions"], names["mask"] = ids.repeat(2, 1), torch.ones(2, ids.shape[1], dtype=torch.long)
    processor = model.get_vision_tower().image_processor
    names["pixels"] = model.to_model(model.image_inputs([picture], processor))
    names["frames"] = model.to_model(model.video_inputs(video, processor)) if "video" in about.modalities else None
    for block in blocks:
        exec(compile(block, f"{about.file}.md", "exec"), names)
    assert len(asked) > 1 and (not about.checkpoints or set(asked[1:]) <= set(about.checkpoints))
