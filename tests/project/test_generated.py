"""Generated files are those that the generators make now, and there is one for everything that should have one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from accelerate_methods.registry import names
from accelerate_methods.registry.architectures import ARCHITECTURES
from accelerate_methods.registry.compatibility import why_not
from accelerate_methods.registry.configs import config_names, model_names
from accelerate_methods.registry.models import families_of
from accelerate_methods.registry.names import method_class
from tests.support.paths import ROOT

GENERATE = ROOT / "scripts" / "generate"
#: (method, model) that could be run and has no config, with the reason
WITHOUT_CONFIG: dict[tuple[str, str], str] = {}


def python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def generate():
    spec = importlib.util.spec_from_file_location("generate_main", GENERATE / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_fresh():
    done = python("scripts/generate", "--check")
    assert done.returncode == 0, f"run `python scripts/generate`:\n{done.stdout}{done.stderr}"


def test_check_names_what_is_stale_and_writing_repairs_it(generate, tmp_path, monkeypatch, capsys):
    script, page = Path("scripts/eval/a.sh"), Path("docs/b.md")
    monkeypatch.setattr(generate, "generated", lambda: {script: "new\n", page: "page\n"})
    (tmp_path / page).parent.mkdir()
    (tmp_path / page).write_text("page\n", encoding="utf-8")
    old, mine = tmp_path / "scripts" / "eval" / "old.sh", tmp_path / "scripts" / "eval" / "mine.sh"
    old.parent.mkdir(parents=True)
    old.write_text(f"#!/bin/sh\n# {generate.MARK} from x\n", encoding="utf-8")
    mine.write_text("#!/bin/sh\n# by hand\n", encoding="utf-8")
    assert generate.main(["--check"], tmp_path) == 1
    shown = capsys.readouterr().out
    assert f"stale: {script}" in shown and "no longer made: scripts/eval/old.sh" in shown and str(page) not in shown
    assert old.exists() and not (tmp_path / script).exists()
    assert generate.main([], tmp_path) == 0 and generate.main(["--check"], tmp_path) == 0
    assert (tmp_path / script).read_text(encoding="utf-8") == "new\n" and os.access(tmp_path / script, os.X_OK)
    assert mine.exists() and not old.exists()


def test_help_of_the_generator_is_quick():
    code = (
        "import runpy, sys; sys.argv = ['generate', '-h']\n"
        "try: runpy.run_path('scripts/generate', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'yaml', 'rich') if m in sys.modules])"
    )
    assert python("-c", code).stdout.rstrip().endswith("[]")


def test_every_method_that_a_model_can_run_has_a_config():
    missing = []
    for name in names.built_in():
        if method_class(name).baseline:
            continue
        for model in set(model_names()) - {"embedded"} - {entry.key for entry in ARCHITECTURES}:
            if any(why_not(method_class(name), f) is None for f in families_of(model)):
                missing.append((name, model))
    wanted = {key for key in missing if key not in WITHOUT_CONFIG}
    there = {tuple(name.split("/")) for name in config_names()}
    assert sorted(wanted - there) == []
    assert not [key for key in WITHOUT_CONFIG if key in there or key not in missing]  # no reason that is out of date


def test_every_config_of_a_method_has_its_script():
    scripts = {path.stem: path for path in (ROOT / "scripts" / "eval").glob("*.sh")}
    for config in config_names():
        method, _, model = config.partition("/")
        if method_class(method).baseline or model == "embedded":
            continue
        text = scripts[f"{method}_{model}"].read_text(encoding="utf-8")
        assert f'exec "$PY" -m lmms_eval_accelerate.compare --config {config} ' in text
        assert method_class(method).title in text and f"bash scripts/eval/{method}_{model}.sh" in text
    assert "fastvid_llava_ov" in scripts  # the name that is in use


def test_the_short_name_is_the_same_script():
    folder = ROOT / "scripts" / "eval"
    for short in folder.glob("*_llava_ov.sh"):
        long = folder / f"{short.stem.removesuffix('_ov')}_onevision.sh"
        code = [[line for line in p.read_text("utf-8").splitlines() if not line.startswith("#")] for p in (short, long)]
        assert code[0] == code[1]


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "eval").glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_valid_and_can_be_run(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


VARIABLES = {
    "PRETRAINED": "--pretrained", "TASKS": "--tasks", "METHODS": "--methods", "RETENTION_RATIO": "--retention-ratio",
    "MATCH": "--match", "LIMIT": "--limit", "NUM_PROCESSES": "--num-processes", "NUM_MACHINES": "--num-machines",
    "MACHINE_RANK": "--machine-rank", "MAIN_PROCESS_IP": "--main-process-ip",
    "MAIN_PROCESS_PORT": "--main-process-port", "BATCH_SIZE": "--batch-size", "MODEL_ARGS": "--model-args",
    "GPUS_PER_MODEL": "--gpus-per-model", "DATA": "--data", "OUTPUT": "--output",
}  # fmt: skip


def run_script(name: str, tmp_path: Path, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    """A script with an interpreter that prints its arguments, one a line."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n', encoding="utf-8")
    fake.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in {*VARIABLES, "DRY_RUN", "FULL", "VENV"}}
    script = ROOT / "scripts" / "eval" / f"{name}.sh"
    return subprocess.run(
        ["bash", str(script), *argv], env=kept | {"PYTHON": str(fake)} | variables, capture_output=True, text=True
    )


def test_every_variable_becomes_an_argument(tmp_path):
    given = {name: f"value of {name}" for name in VARIABLES}
    done = run_script("fastvid_llava_onevision", tmp_path, "--picture", "a b.mp4", **given, DRY_RUN="1", FULL="1")
    words = done.stdout.splitlines()
    words = words[words.index("lmms_eval_accelerate.compare") :]
    assert words[1:3] == ["--config", "fastvid/llava_onevision"]
    for name, option in VARIABLES.items():
        assert words[words.index(option) + 1] == given[name]
    assert {"--dry-run", "--full"} <= set(words) and words[-2:] == ["--picture", "a b.mp4"]


def test_without_variables_there_are_no_arguments(tmp_path):
    words = run_script("fastvid_llava_ov", tmp_path).stdout.splitlines()
    words = words[words.index("lmms_eval_accelerate.compare") :]
    assert words[1:] == ["--config", "fastvid/llava_onevision", "--batch-size", "1"]


def test_scripts_of_transformers_models_need_a_checkpoint(tmp_path):
    done = run_script("fastvid_qwen2_5_vl", tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert re.search(r"error: fastvid/qwen2_5_vl needs a checkpoint, e\.g\. PRETRAINED=Qwen/Qwen2\.5-VL", done.stderr)
    assert run_script("fastvid_qwen2_5_vl", tmp_path, PRETRAINED="x").returncode == 0


def test_every_variable_is_explained():
    text = (ROOT / "scripts" / "lib" / "run_eval.sh").read_text(encoding="utf-8")
    comment = text.partition("\nsource ")[0]
    assert [name for name in [*VARIABLES, "DRY_RUN", "FULL"] if name not in comment] == []


@pytest.mark.parametrize("name", ["DRY_RUN", "FULL"])
def test_a_switch_is_on_or_off_or_an_error(name, tmp_path):
    option = f"--{name.lower().replace('_', '-')}"
    for value, on in {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}.items():
        done = run_script("fastvid_llava_ov", tmp_path, **{name: value})
        assert done.returncode == 0 and (option in done.stdout.splitlines()) is on, value
    done = run_script("fastvid_llava_ov", tmp_path, **{name: "perhaps"})
    assert done.returncode == 2 and not done.stdout and f"{name}=perhaps is neither on" in done.stderr


def test_a_value_of_zero_is_handed_on(tmp_path):
    """Whether it is allowed is said by the command; the script must not take it for nothing."""
    numbers = (
        "RETENTION_RATIO",
        "LIMIT",
        "NUM_PROCESSES",
        "NUM_MACHINES",
        "MACHINE_RANK",
        "GPUS_PER_MODEL",
        "BATCH_SIZE",
    )
    words = run_script("fastvid_llava_ov", tmp_path, **dict.fromkeys(numbers, "0")).stdout.splitlines()
    for name in numbers:
        assert words[words.index(VARIABLES[name]) + 1] == "0"


def test_arrays_that_may_be_empty_are_not_expanded_bare():
    """``set -u`` in bash before 4.4 takes an empty array for an unset variable."""
    for path in (ROOT / "scripts").rglob("*.sh"):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"^ *(?:local )?(\w+)=\(\)$", text, re.MULTILINE):
            bare = re.findall(rf'(?<!\+)"\${{{name}\[@\]}}"', text)
            assert not bare, (path, name)
