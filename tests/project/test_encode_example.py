"""The example of docs/adding_a_method.md inside the vision encoder: on the tree and on transformers' models."""

import re
import sys

import pytest
import torch

from accelerate_methods import accelerate, record
from accelerate_methods.registry import names, plugins
from tests.support import qwen_inputs as qwen
from tests.support.native_models import expanded, native_model, tree_model
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "encode_method.py"


@pytest.fixture
def loudest(monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, str(EXAMPLE))
    modules = set(sys.modules)
    assert "loudest" in names.available()
    yield
    names._registered.pop("loudest", None)
    plugins._imported.discard(str(EXAMPLE))
    for module in set(sys.modules) - modules:
        if module.startswith(EXAMPLE.stem):
            del sys.modules[module]


def test_the_docs_show_it():
    text = (ROOT / "docs" / "adding_a_method.md").read_text("utf-8")
    shown = re.search(r"encode_method\.py\)\):\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    assert EXAMPLE.read_text("utf-8").split('"""', 2)[2].strip() == shown.strip()


def test_tree_and_transformers_give_the_same(loudest):
    tree, native = tree_model("tiny-llava-1.5"), native_model("tiny-llava-1.5")
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), accelerate(tree, "loudest", retention_ratio=0.25), record() as one:
        expected = tree(input_ids=torch.tensor([[5, -200, 8]]), images=pixels).logits[:, -1]
    with torch.no_grad(), accelerate(native, "loudest", retention_ratio=0.25), record() as two:
        got = native(input_ids=expanded([5, 7, 8], 7, 576), pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for requests in (one, two):
        assert requests[0].samples[0].visual_tokens_after == 144
    assert torch.equal(one[0].samples[0].items[0].kept, two[0].samples[0].items[0].kept)


@pytest.mark.parametrize("name", qwen.MODELS)
def test_it_runs_on_qwen(name, loudest):
    model = qwen.qwen(name)
    asked = qwen.inputs(model, qwen.QUESTIONS["image and video"])
    with torch.no_grad(), accelerate(model, "loudest", retention_ratio=0.5), record() as requests:
        model(**asked)
    video, image = requests[0].samples[0].items
    assert (video.tokens_after, image.tokens_after) == (4 * 7, 7) and image.kept.sum() == 7
