"""What the README and the docs say is what the code does."""

from __future__ import annotations

import importlib
import re
import subprocess

import pytest
import torch

import accelerate_methods
from accelerate_methods.registry import names as registry
from accelerate_methods.registry.configs import CONFIG_DIR, config_names, read_config
from accelerate_methods.registry.pipeline import resolve
from accelerate_methods.stages.compress import VisualItem
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_relative_link_leads_somewhere():
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("lmms-eval/*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_example_method_of_the_docs_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "example_of_the_docs.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("example_of_the_docs")
        item = VisualItem("video", torch.randn(3, 7, 5), torch.arange(21).view(3, 7), 21)
        kept = accelerate_methods.get("outliers", tokens_per_frame=2).compress(item)
        assert kept.tokens.shape == (6, 5) and (kept.owner >= 0).sum() == 6
    finally:
        registry._registered.pop("outliers", None)


@pytest.mark.parametrize("name", config_names())
def test_every_config_is_usable(name):
    path = CONFIG_DIR / f"{name}.yaml"
    config = read_config(path)
    pipeline = resolve(path)
    assert pipeline.name == config["method"] == path.parent.name
    assert {"family", "pretrained"} <= set(config["model"])
    # models of transformers bring their chat template along
    assert ("conv_template" in config["model"]) == (config["model"]["family"] != "hf")
    for level in config.get("levels", []):
        changed = resolve(path, **level).methods[0]
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in level.items()}
        assert all(getattr(changed, name) == value for name, value in own.items())


def test_scripts_name_existing_configs():
    scripts = sorted((ROOT / "scripts" / "eval").glob("*.sh"))
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        name = re.search(r"^exec .* --config (\S+) ", script.read_text(encoding="utf-8"), re.MULTILINE)[1]
        assert (CONFIG_DIR / f"{name}.yaml").is_file()


def test_constraints_hold_no_addresses():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert sum("==" in line for line in lines) > 50
    assert not [line for line in lines if "://" in line or " @ " in line or line.startswith("-")]
