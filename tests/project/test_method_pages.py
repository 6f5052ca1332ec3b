"""docs/methods/: a page per method, whose steps the code cites and whose examples are usable."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from accelerate_methods.registry import method_class
from accelerate_methods.registry.names import built_in
from accelerate_methods.registry.pipeline import resolve
from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
#: what every page of a method says, in this order
HEADINGS = [
    "What it does",
    "Parameters",
    "Published settings",
    "Where it runs",
    "Use",
    "Differences to the official code",
    "Faults of the official release",
]
METHODS = [name for name in built_in() if not method_class(name).baseline]


@pytest.mark.parametrize("name", METHODS)
def test_a_page_says_the_same_things_in_the_same_order(name):
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {method_class(name).title}\n")
    assert [h for h in re.findall(r"^## (.*)$", text, re.MULTILINE) if h in HEADINGS] == HEADINGS
    numbers = [int(n) for n in re.findall(r"^### (\d+)\. ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_comes_from(name):
    method = method_class(name)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,40}", method.code), "code: owner/name@commit"
    assert method.paper and method.licence


def test_cited_steps_are_on_the_page():
    steps = {p.stem: {int(n) for n in re.findall(r"^### (\d+)\. ", p.read_text("utf-8"), re.MULTILINE)} for p in PAGES}
    folder = ROOT / "accelerate_methods"
    for path in [*folder.glob("*.py"), *(folder / "ops").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        pages = set(re.findall(r"docs/methods/(\w+)\.md", text))
        assert pages <= set(steps), f"{path.name} cites pages that are not there: {pages - set(steps)}"
        cited = [(page, int(n)) for page, n in re.findall(r"docs/methods/(\w+)\.md, step (\d+)", text)]
        if len(pages) == 1:
            cited += [(*pages, int(n)) for n in re.findall(r"\bstep (\d+)\b", text)]
        missing = [(page, n) for page, n in cited if n not in steps[page]]
        assert not missing, f"{path.name} cites steps that are not on the page: {missing}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "methods.md"], ids=lambda p: p.stem)
def test_examples_name_methods_and_parameters_that_are_there(page):
    asked = []

    def accelerate(_, name, tokenizer=None, **params):
        asked.append(resolve(name, **params))

    known = {"model": object(), "tokenizer": object(), "accelerate_methods": SimpleNamespace(accelerate=accelerate)}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, known)
    assert len(asked) >= len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
