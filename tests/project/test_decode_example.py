"""The example of docs/adding_a_method.md that frees entries of the cache, on models of the tree and of transformers."""

import dataclasses
import re
from typing import ClassVar

import pytest
import torch

from accelerate_methods import accelerate, record
from accelerate_methods.registry import names as registry
from accelerate_methods.registry import register
from accelerate_methods.stages.decode import EvictMethod, EvictStep, Kept
from accelerate_methods.stages.fields import integer
from tests.support.native_models import expanded, native_model, tree_model
from tests.support.paths import ROOT

KNOWN = {
    "dataclasses": dataclasses, "ClassVar": ClassVar, "register": register, "EvictMethod": EvictMethod,
    "EvictStep": EvictStep, "Kept": Kept, "integer": integer, "__name__": "examples",
}  # fmt: skip
TEXT = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def shown():
    """The method that the docs show, known for the length of a test."""
    known = dict(registry._registered)
    page = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "lately" in part)
    exec(compile(code, "example lately", "exec"), dict(KNOWN))
    yield
    registry._registered.clear()
    registry._registered.update(known)


@pytest.mark.parametrize("where", ["tree", "native"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_lately(kind, where):
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    asked = {}
    if where == "tree":
        model, ids = tree_model("tiny-llava-1.5"), TEXT if kind == "text" else torch.tensor([[5, -200, 9, 8]])
        asked = {} if kind == "text" else {"images": pixels}
    else:
        model, ids = native_model("tiny-llava-1.5", image_token=7), expanded([5, 7, 9, 8], 7, 576)
        ids, asked = (TEXT + 3, {}) if kind == "text" else (ids, {"pixel_values": pixels})
    greedy = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        dense = model.generate(ids, **asked, **greedy)
        with accelerate(model, "lately", size=700), record():
            assert torch.equal(model.generate(ids, **asked, **greedy), dense)
        with accelerate(model, "lately", size=6), record() as requests:
            short = model.generate(ids, **asked, **greedy)
    assert requests[0].cached == [[6] * 6] * 12
    assert torch.equal(short[:, :-11], dense[:, :-11]), "the first token saw everything"
    assert not torch.equal(short, dense)
