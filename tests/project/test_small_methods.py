"""The small methods of docs/adding_a_method.md, on models of the tree and of transformers."""

import dataclasses
import re
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from accelerate_methods import accelerate, get, record
from accelerate_methods.hosts import frame_sampler as sampling
from accelerate_methods.hosts.scorers import Scorer
from accelerate_methods.ops.select import top_indices
from accelerate_methods.registry import names as registry
from accelerate_methods.registry import register
from accelerate_methods.stages.budget import BudgetedMethod
from accelerate_methods.stages.compress import Compressed, CompressMethod, VisualItem, selection
from accelerate_methods.stages.fields import choice, integer, real, text
from accelerate_methods.stages.prefill import PrefillMethod, PrefillStep, Selection
from accelerate_methods.stages.sample import SampleMethod
from llava.video_utils import load_video
from tests.support.native_models import expanded, native_model, tree_model
from tests.support.paths import ROOT

CLIP = ROOT / "assets" / "shapes_video" / "clips" / "0004.mp4"
#: what the examples may use without importing it
KNOWN = {
    "dataclasses": dataclasses, "ClassVar": ClassVar, "Tensor": Tensor, "functional": functional, "register": register,
    "SampleMethod": SampleMethod, "BudgetedMethod": BudgetedMethod, "CompressMethod": CompressMethod, "text": text,
    "VisualItem": VisualItem, "Compressed": Compressed, "selection": selection, "top_indices": top_indices,
    "choice": choice, "integer": integer, "real": real, "torch": torch, "PrefillMethod": PrefillMethod,
    "PrefillStep": PrefillStep, "Selection": Selection,
}  # fmt: skip


@pytest.fixture(autouse=True)
def shown():
    """The methods that the docs show, known for the length of a test."""
    known = dict(registry._registered)
    page = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8").partition("## Small examples")[2]
    for code in re.findall(r"```python\n(.*?)```", page.partition("\n## ")[0], re.DOTALL):
        if names := set(re.findall(r'@register\("(\w+)"\)', code)) & {"best_frames", "asked_for", "fades"}:
            exec(compile(code, f"example {names}", "exec"), {**KNOWN, "__name__": "examples"})
    yield
    registry._registered.clear()
    registry._registered.update(known)


class Place(Scorer):
    """The later a frame, the better."""

    default = "place"

    def load(self):
        self.seen = 0

    def read(self, question):
        return question

    def score(self, frames, question):
        self.seen += len(frames)
        return torch.arange(self.seen - len(frames), self.seen).double()


def test_best_frames(monkeypatch):
    monkeypatch.setattr(sampling, "scorer_class", lambda name: Place)
    every = load_video(CLIP, fps=1).sample.indices
    for model in (tree_model("tiny-llava-onevision"), native_model("tiny-llava-onevision")):
        with accelerate(model, "best_frames") as acceleration:
            clip = load_video(CLIP, num_frames=2, sampler=acceleration.frame_sampler, question="what?")
        assert clip.sample.indices == every[-2:]


@pytest.mark.parametrize("where", ["tree", "native"])
def test_asked_for(where):
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    if where == "tree":
        model, ids, asked = tree_model("tiny-llava-1.5"), torch.tensor([[5, -200, 9, 8]]), {"images": pixels}
        table = model.get_model().embed_tokens.weight
    else:
        model, ids = native_model("tiny-llava-1.5"), expanded([5, 7, 9, 8], 7, 576)
        asked, table = {"pixel_values": pixels}, model.model.language_model.embed_tokens.weight
    with accelerate(model, "asked_for", tokens_per_image=30), record() as requests, torch.no_grad():
        model.generate(ids, **asked, max_new_tokens=1)
    (item,) = requests[0].samples[0].items
    features = tree_model("tiny-llava-1.5").encode_images(pixels)
    mean = torch.stack([table[token] for token in (5, 9, 8)]).mean(0)
    alike = functional.normalize(features[0], dim=-1) @ functional.normalize(mean, dim=-1)
    assert set(item.kept[0].nonzero()[:, 0].tolist()) == set(alike.topk(30).indices.tolist())
    assert get("asked_for", retention_ratio=0.5).signals == {"prompt_mean"}


@pytest.mark.parametrize("where", ["tree", "native"])
def test_fades(where):
    still = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    if where == "tree":
        model, ids = tree_model("tiny-llava-onevision"), torch.tensor([[5, -200, 9, 8]])
        asked = {"images": [still], "modalities": ["video"]}
    else:
        model, ids = native_model("tiny-llava-onevision"), expanded([5, 8, 9, 6], 8, 4 * 196 + 1)
        asked = {"pixel_values_videos": still[None]}
    with accelerate(model, "fades", threshold=-1.0), record() as requests, torch.no_grad():
        model.generate(ids, **asked, max_new_tokens=2)
    (item,) = requests[0].samples[0].items
    places = torch.arange(4 * 196).view(4, 196)
    held = item.held_by - item.held_by.min()
    assert torch.equal(held[[0, 1]], places[[0, 0]]) and torch.equal(held[[2, 3]], places[[2, 2]])
    lengths = requests[0].layer_lengths(0)
    assert lengths[2] == lengths[0] - 2 * 196 and lengths[1] == lengths[0]
