"""The rules of the house (docs/architecture.md), read off the source. A failure says what to do."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accelerate_methods.registry.architectures import ARCHITECTURES
from accelerate_methods.registry.names import built_in
from tests.support.paths import ROOT
from tests.support.source_tree import PACKAGES, Source, circles, imports, sources, words

#: every method of this project -> the module of its file
METHODS = built_in()
ARCHITECTURE_IDS = {entry.key for entry in ARCHITECTURES}
#: architectures without a table of published numbers -> why
WITHOUT_TABLE = {"tg_llava": "its paper's numbers were not at hand"}
METHOD_FILES = {module.rpartition(".")[2] for module in METHODS.values()}
#: methods with a file of their own; baselines.py holds several and needs no page, golden folder or scripts
NAMED = sorted(name for name, module in METHODS.items() if not module.endswith(".baselines"))

#: signatures that are not ours: function -> why it may have more parameters than the rest
OFFICIAL_SIGNATURES = {
    "load_pretrained_model": "LLaVA-NeXT's loader, which other projects call by position",
    "prepare_inputs_labels_for_multimodal": "LLaVA-NeXT's method, which other projects override",
    "forward": "a transformers model's forward",
    "prepare_inputs_for_generation": "transformers' generate calls it",
}
MOST_PARAMETERS = 9
MOST_LINES = 400


def room(name: str) -> list[Source]:
    """The files of a folder of the packages, e.g. ``accelerate_methods.ops``."""
    found = [s for module, s in sources().items() if module == name or module.startswith(f"{name}.")]
    assert found, f"there is no room {name}"
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def listed(problems: list[str], advice: str) -> str:
    return "\n".join([advice, *(f"  {p}" for p in problems)])


# -- the method room ---------------------------------------------------------------------------------------------------


def test_methods_are_one_file_each():
    here = {p.stem for p in (ROOT / "accelerate_methods").glob("*.py")}
    more = sorted(here - METHOD_FILES - {"__init__", "__main__", "baselines"})
    assert not more, f"accelerate_methods/*.py is one file per method; machinery belongs into a room: {more}"
    for name, module in METHODS.items():
        file = module.rpartition(".")[2]
        assert file in (name, "baselines"), f'@register("{name}") stands in {file}.py: call the file {name}.py'


@pytest.mark.parametrize("name", sorted(METHOD_FILES))
def test_a_method_imports_stages_ops_registry_and_torch(name):
    rooms = ("stages", "ops", "registry")
    bad = [
        f"line {i.line}: {i.imported}"
        for i in imports(sources()[f"accelerate_methods.{name}"])
        if top(i.imported) not in {"torch", *sys.stdlib_module_names}
        and not i.imported.startswith(tuple(f"accelerate_methods.{r}" for r in rooms))
    ]
    assert not bad, listed(bad, f"{name}.py: a method imports {', '.join(rooms)}, torch and the standard library only")


def outside_of(name: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of a room's files that are neither torch, nor the standard library, nor ``allowed`` rooms."""
    return [
        f"{source.shown}:{i.line}: {i.imported}"
        for source in room(f"accelerate_methods.{name}")
        for i in imports(source)
        if top(i.imported) not in {"torch", *sys.stdlib_module_names}
        and not i.imported.startswith(tuple(f"accelerate_methods.{r}" for r in (name, *allowed)))
    ]


def test_ops_are_tensors_only():
    bad = outside_of("ops", ())
    assert not bad, listed(bad, "ops/ holds pure tensor kernels: torch and other ops only")


def test_stages_know_no_machinery():
    bad = outside_of("stages", ("ops",))
    assert not bad, listed(bad, "stages/ is what a method sees: it imports torch and ops, no engine, hosts or registry")


def test_engine_knows_no_host():
    bad = [
        f"{s.shown}:{i.line}: {i.imported}"
        for s in room("accelerate_methods.engine")
        for i in imports(s)
        if i.imported.startswith(("accelerate_methods.hosts", "accelerate_methods.bench"))
    ]
    assert not bad, listed(bad, "hosts build on engine/, not the other way round: move what both need into engine/")


# -- arrows ------------------------------------------------------------------------------------------------------------


def test_imports_run_one_way():
    order = list(PACKAGES)  # each may import those before it
    bad = []
    for source in sources().values():
        for i in imports(source):
            if top(i.imported) not in order or order.index(top(i.imported)) <= order.index(source.package):
                continue
            from_bench = source.module.startswith("accelerate_methods.bench.") and top(i.imported) == "llava"
            if not (from_bench and i.lazy):
                bad.append(f"{source.shown}:{i.line}: {i.imported}")
    advice = "imports run lmms_eval_accelerate -> llava -> accelerate_methods (bench may load llava inside a function)"
    assert not bad, listed(bad, f"{advice}; move what both need down:")


def test_no_circles_of_files():
    found = [" <-> ".join(group) for group in circles()]
    advice = "these files need each other (imports within functions count): move what both need to a third file"
    assert not found, listed(found, advice)


# -- names -------------------------------------------------------------------------------------------------------------


def test_hosts_know_no_method_by_name():
    method = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(NAMED)})(?![A-Za-z0-9])", re.IGNORECASE)
    bad = [
        f"{source.shown}:{line}: {found[0]!r} in {text[:60]!r}"
        for name in ("accelerate_methods.engine", "accelerate_methods.hosts", "llava")
        for source in room(name)
        if source.shown != "llava/left_out.py"  # names of other trees' modules, some of which are called after a method
        for line, text in words(source)
        if (found := method.search(text))
    ]
    assert not bad, listed(bad, "engine, hosts and llava know no method: let the method declare what is needed")


@pytest.mark.parametrize("name", NAMED)
def test_one_name_everywhere(name):
    for path in (
        f"accelerate_methods/{name}.py",
        f"configs/{name}",
        f"docs/methods/{name}.md",
        f"tests/methods/test_{name}.py",
        f"tests/golden/{name}",
    ):
        assert (ROOT / path).exists(), f"{name}: {path} is missing; a method has one name in all these places"
    assert list((ROOT / "scripts" / "eval").glob(f"{name}_*.sh")), f"{name}: no scripts/eval/{name}_<model>.sh"


def test_nothing_is_called_after_a_method_that_is_not_there():
    """The other way round: pages, tests, configs and scripts belong to a method."""
    pages = {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")} - {"README", "baselines"}
    assert pages <= set(METHODS), f"docs/methods has pages of no method: {sorted(pages - set(METHODS))}"
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests" / "methods").glob("test_*.py")}
    tests -= {"every_method", "baselines"}
    assert tests <= set(METHODS), f"tests/methods has tests of no method: {sorted(tests - set(METHODS))}"
    configs = {p.name for p in (ROOT / "configs").iterdir() if p.is_dir()} - {"models", "reproduce"}
    assert configs <= set(METHODS), f"configs has folders of no method: {sorted(configs - set(METHODS))}"
    for script in (ROOT / "scripts" / "eval").glob("*.sh"):
        known = script.stem.startswith(tuple(f"{m}_" for m in METHODS)) or script.stem in ARCHITECTURE_IDS
        assert known, f"{script.name}: call it <method>_<model>.sh, or as the model id of an architecture"


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.file)
def test_an_architecture_has_one_name_everywhere(entry):
    code = ROOT / "llava" / "model" / "architectures" / entry.file
    assert code.is_dir() or code.with_suffix(".py").is_file(), f"{entry.file}: no file llava/model/architectures/..."
    wanted = [
        f"docs/architectures/{entry.file}.md",
        f"tests/llava/architectures/test_{entry.file}.py",
        f"tests/conformance/adapters/{entry.file}.py",
        f"tests/golden/{entry.file}",
        f"scripts/eval/{entry.key}.sh",
        f"configs/models/{entry.key}.yaml",
    ]
    if entry.file not in WITHOUT_TABLE:
        wanted.append(f"configs/reproduce/{entry.file}.yaml")
    missing = [path for path in wanted if not (ROOT / path).exists()]
    assert not missing, f"{entry.file}: {missing} missing; docs/adding_an_architecture.md says what belongs to one"


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.file)
def test_a_page_says_what_an_architecture_is(entry):
    """Every section that a new page begins with has been written."""
    page = f"docs/architectures/{entry.file}.md"
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.startswith(f"# {entry.name}\n")
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.sub(r"<!-- .*? -->", "", text), re.M | re.S))
    for name in ("What it does", "Use", "Methods on it", "Differences to the official code", "What was verified"):
        assert len(sections.get(name, "").split()) > 10, f"{page}: section {name!r} is empty"


def test_nothing_is_called_after_an_architecture_that_is_not_there():
    files = {entry.file for entry in ARCHITECTURES}
    assert {path.stem for path in (ROOT / "docs" / "architectures").glob("*.md")} <= files
    assert len(files) == len(ARCHITECTURE_IDS) == len({e.name for e in ARCHITECTURES}) == len(ARCHITECTURES)
    assert not set(WITHOUT_TABLE) - files


@pytest.mark.parametrize("name", ["Encoded", "Plan", "Row", "Selection"])
def test_a_class_name_means_one_thing(name):
    found = [f"{s.shown}:{c.lineno}" for s in sources().values() for c in s.classes() if c.name == name]
    assert len(found) <= 1, listed(found, f"{name} is defined more than once; give each its own name")


def test_names_say_what_they_are():
    vague = {"one", "many", "placed", "given_for", "outside"}
    bad = [s.shown for module, s in sources().items() if module.rpartition(".")[2] in vague]
    for source in sources().values():
        defined = [*source.functions(), *source.classes()]
        bad += [f"{source.shown}:{node.lineno}: {node.name}" for node in defined if node.name in vague]
    assert not bad, listed(bad, "names that nobody would search for; say what it is:")


# -- sizes and numbers -------------------------------------------------------------------------------------------------


def test_files_can_be_read_in_one_sitting():
    long = {s.shown: len(s.text.splitlines()) for s in sources().values()}
    bad = [f"{name}: {lines} lines" for name, lines in long.items() if lines > MOST_LINES]
    assert not bad, listed(bad, f"more than {MOST_LINES} lines; split by what the parts do:")


def test_functions_have_few_parameters():
    bad = []
    for source in sources().values():
        for function in source.functions():
            a = function.args
            names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")]
            if len(names) > MOST_PARAMETERS and function.name not in OFFICIAL_SIGNATURES:
                bad.append(f"{source.shown}:{function.lineno}: {function.name} has {len(names)}")
    assert not bad, listed(bad, f"more than {MOST_PARAMETERS} parameters; group what belongs together in a dataclass:")


def test_sizes_of_models_come_from_their_configs():
    """Tokens per view and image sides of the usual checkpoints have no place where any model passes."""
    sizes = {144, 169, 196, 210, 336, 384, 448, 576, 729, 2880}
    bad = [
        f"{source.shown}:{node.lineno}: {node.value}"
        for name in ("accelerate_methods.engine", "accelerate_methods.hosts")
        for source in room(name)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in sizes
    ]
    assert not bad, listed(bad, "a number of one checkpoint; read it from the model's config")


# -- what a reader can open --------------------------------------------------------------------------------------------


def readable_files() -> Iterator[Path]:
    """Code, documents and settings of the project; no golden vectors and nothing that a build left behind."""
    places = ["accelerate_methods", "llava", "lmms-eval", "docs", "scripts", "configs", "examples", "tests"]
    kinds = {".py", ".md", ".yaml", ".yml", ".sh", ".sbatch", ".toml"}
    for path in [ROOT / "README.md", *(p for place in places for p in sorted((ROOT / place).rglob("*")))]:
        if path.suffix in kinds and not {"golden", "build"} & set(path.relative_to(ROOT).parts):
            yield path


def test_nothing_cites_what_is_not_in_the_project():
    folder = r"(?:^|[\s`(\"'.]|\.\./)(?:specs|shared)/(?=[\w<])"
    private = re.compile(rf"{folder}|\bspecs? base\b|\bsections? [\d.]+ of specs\b")
    bad = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in readable_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if private.search(line)
    ]
    advice = "no reader can open this; cite the paper's section, the official repository and commit, or a docs page:"
    assert not bad, listed(bad, advice)


# -- what the terminal shows -------------------------------------------------------------------------------------------


def test_terminal_output_reads_no_markup():
    """Answers, names and folders may look like markup: no console reads any, styles are given by rich.text.Text."""
    files = [source.path for source in sources().values()] + sorted((ROOT / "scripts").rglob("*.py"))
    wanted = {"Console": {"markup", "emoji"}, "TextColumn": {"markup"}}
    bad = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.markup":
                bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: rich.markup")
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in wanted:
                off = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is False}
                if not wanted[node.func.id] <= off:
                    bad.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.func.id}")
    assert not bad, listed(bad, "write Console(markup=False, emoji=False) and TextColumn(..., markup=False)")
