"""``python -m accelerate_methods``: list, show, check; and that asking for help loads nothing."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import ClassVar

import pytest

import accelerate_methods
from accelerate_methods import __main__ as command
from accelerate_methods.registry import available, names, register
from accelerate_methods.registry.architectures import ARCHITECTURES
from accelerate_methods.registry.compatibility import why_not
from accelerate_methods.registry.families import families
from accelerate_methods.registry.models import families_of
from accelerate_methods.registry.names import method_class
from accelerate_methods.stages.compress import CompressMethod
from accelerate_methods.stages.errors import UnknownNameError
from tests.support.paths import ROOT

HEAVY = ("torch", "transformers", "yaml", "rich", "numpy", "PIL", "llava")


@pytest.mark.parametrize(
    "run",
    [
        "runpy.run_module('accelerate_methods', run_name='__main__')",
        "runpy.run_module('accelerate_methods.bench', run_name='__main__')",
        *(f"runpy.run_path({name!r}, run_name='__main__')" for name in (
            "scripts/visualize.py", "scripts/bench/efficiency.py", "scripts/bench/selection.py"
        )),
    ],
)  # fmt: skip
@pytest.mark.parametrize("argument", ["-h", "--no-such-option"])
def test_arguments_are_read_before_anything_heavy_is_loaded(run, argument):
    code = (
        f"import runpy, sys; sys.argv = ['program', {argument!r}]\n"
        f"try: {run}\n"
        f"except SystemExit as end: print(); print(end.code, [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == f"{0 if argument == '-h' else 2} []", done.stdout + done.stderr
    assert "usage:" in (done.stdout if argument == "-h" else done.stderr)


def shown(capsys, *argv: str, code: int = 0) -> str:
    assert command.main(list(argv)) == code
    return capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        command.main(["--version"])
    assert capsys.readouterr().out == f"accelerate_methods {accelerate_methods.__version__}\n"


def test_list_has_every_method_with_its_models(capsys):
    methods, _, architectures = shown(capsys, "list").partition("\nTrained architectures")
    assert all(f"\n{entry.key} " in architectures and entry.name in architectures for entry in ARCHITECTURES)
    lines = methods.splitlines()
    rows = {line.split()[0]: re.split(r" {2,}", line) for line in lines[1:] if line}
    assert set(rows) == set(available())
    for name, (_, title, stages, modalities, *models) in rows.items():
        method = method_class(name)
        assert title == method.title + (" (baseline)" if method.baseline else "")
        assert stages.split(", ") == list(method.class_stages())
        assert modalities.split(", ") == sorted(f"{m}s" for m in method.modalities)
        assert models == [", ".join(f.name for f in families() if why_not(method, f) is None)]
    baselines = [method_class(line.split()[0]).baseline for line in lines[1:] if line]
    assert baselines == sorted(baselines)  # behind the methods


@pytest.mark.parametrize("name", available())
def test_show_has_everything_that_a_user_can_set(name, capsys):
    text, method = shown(capsys, "show", name), method_class(name)
    assert text.startswith(method.title)
    for field in method.parameters():
        assert re.search(rf"^{field} ", text, re.MULTILINE)
    for said in (method.paper, method.code, method.licence, *(f.name for f in families())):
        assert said in text
    for path in (ROOT / "configs" / name).glob("*.yaml"):
        assert f"{name}/{path.stem}" in text


def test_show_gives_ranges_defaults_meanings_levels_and_reasons(capsys):
    lines = [re.split(r" {2,}", line.strip()) for line in shown(capsys, "show", "fastvid").splitlines()]
    assert ["c", "8", "integer [1, inf)", "DySeg, minimum number of segments."] in lines
    assert ["variant", "auto", "auto, onevision, llava_video, qwen2_5_vl"] in [line[:3] for line in lines]
    assert ["retention_ratio", "0.1", "number (0, 1] (budget)"] in [line[:3] for line in lines]
    assert ["retention_ratio=0.15", "(level)"] in lines
    assert ["LLaVA-1.5", "no: needs frame_features, pooling_attention"] in lines
    adapted = [re.split(r" {2,}", line) for line in shown(capsys, "show", "fastervlm").splitlines()]
    assert ["LLaVA-Video", "adaptation: received_attention in place of cls_attention"] in adapted


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.file)
def test_show_has_everything_of_an_architecture(entry, capsys):
    text = shown(capsys, "show", entry.key)
    assert text.startswith(entry.name) and text == shown(capsys, "show", entry.name)
    for said in (entry.paper, entry.code, entry.licence, entry.tokens, entry.template, *entry.checkpoints):
        assert said in text
    for argument in entry.arguments:
        assert re.search(rf"^{argument.name} ", text, re.MULTILINE) and argument.meaning.replace("``", "`") in text
    for name in available():
        runs = why_not(method_class(name), entry) is None
        assert bool(re.search(rf"^{name} +(yes|adaptation)", text, re.MULTILINE)) == runs


@pytest.mark.parametrize(
    ("method", "model", "code", "says"),
    [
        ("fastvid", "llava_onevision", 0, "fastvid runs on llava_onevision"),
        ("fastvid", "LLaVA-OneVision", 0, "fastvid runs on LLaVA-OneVision"),
        ("fastvid", "qwen2.5-vl", 0, "fastvid runs on qwen2.5-vl"),
        ("prunevid", "embedded", 0, "prunevid runs on embedded"),
        ("fastervlm", "llava_video", 0, "(adaptation: received_attention in place of cls_attention)"),
        ("visionzip+fastv", "llava_next", 0, "visionzip+fastv runs on llava_next"),
        ("random", "llava_1_5", 0, "random runs on llava_1_5"),  # without a budget
        ("tome+fastv", "llava_next", 0, "tome+fastv runs on llava_next"),
        ("fewer_frames", "llava_1_5", 1, "it acts on video only"),
        ("uniform+pool", "embedded", 1, "both act at the compress stage"),
        ("fastv", "mqt_llava", 0, "fastv runs on mqt_llava"),
        ("fastv", "MQT-LLaVA", 0, "fastv runs on MQT-LLaVA"),
        ("evit", "mqt_llava", 1, "acts at the encode stage, which this architecture does not offer"),
        ("fastvid", "LLaVA-1.5", 1, "it needs frame_features, pooling_attention"),
        ("fastvid", "InternVL", 1, "fastvid cannot run on InternVL"),
        ("dycoke", "llava_1_5", 1, "it acts on video only"),
        ("downsample", "qwen2_5_vl", 1, "acts at the sample stage"),
        ("fastvid+visionzip", "embedded", 1, "both act at the compress stage"),
    ],
)
def test_check(method, model, code, says, capsys):
    text = shown(capsys, "check", method, model, code=code)
    assert says in text and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["show", "fastvd"], "unknown method 'fastvd'. Did you mean 'fastvid'"),
        (["check", "fastvd", "llava_1_5"], "Did you mean 'fastvid'"),
        (["check", "fastvid", "llava_onevison"], "unknown model 'llava_onevison'. Did you mean 'llava_onevision'"),
        (["check", "fastvid", "LLaVA-1.6"], "Did you mean 'LLaVA-1.5'"),
        (["check", "random@0.2", "llava_1_5"], "'random', and parameters are given beside it"),
        (["check", "/nowhere.yaml", "llava_1_5"], "config /nowhere.yaml: no such file"),
    ],
)
def test_unknown_names_end_with_2_and_the_nearest(argv, says, capsys):
    assert command.main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err and not captured.out


def test_a_model_that_leaves_the_family_open():
    assert [f.name for f in families_of("llava_1_5")] == ["LLaVA-1.5"]
    assert [f.name for f in families_of("qwen2_5_vl")] == ["Qwen2/2.5/3-VL"]
    assert [f.name for f in families_of("embedded")] == ["LLaVA-OneVision"]
    with pytest.raises(UnknownNameError, match="Did you mean 'LLaVA-Video'"):
        families_of("LLaVA-Vidoe")


@pytest.fixture
def bracketed():
    """A method whose texts look like markup of rich."""

    @register("bracketed")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bracketed(CompressMethod):
        """x

        Attributes:
            size: in [bold]pixels[/], see [/nothing].
        """

        title: ClassVar[str] = "A [red]title[/]"
        paper: ClassVar[str] = "[1]"
        size: str = "[/]"

    yield
    names._registered.pop("bracketed")


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_taken_for_markup(terminal, bracketed, capsys, monkeypatch):
    if terminal:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "200")
    text = shown(capsys, "show", "bracketed")
    for said in ("A [red]title[/]", "[1]", "in [bold]pixels[/], see [/nothing].", "[/]"):
        assert said in text
    assert "A [red]title[/]" in shown(capsys, "list")
