"""Methods and hosts from outside: files, modules and packages that name them, errors, hashes, child processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lmms_eval_accelerate.runs import fingerprint, launch

from accelerate_methods import MethodError, UnknownNameError, available, get
from accelerate_methods.hosts import _registered as hosts
from accelerate_methods.hosts import host_for, register_host
from accelerate_methods.registry import families, plugins
from accelerate_methods.registry import names as registry

METHOD = """
import dataclasses
from accelerate_methods.stages.compress import CompressMethod
from accelerate_methods.stages.compress import selection
from accelerate_methods.registry import register

@register({name!r})
@dataclasses.dataclass(frozen=True, kw_only=True)
class First(CompressMethod):
    count: int = {count}

    def compress(self, item):
        import torch
        return selection(item, torch.arange(self.count))
"""


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    modules, imported, registered = set(sys.modules), set(plugins._imported), dict(registry._registered)
    yield
    plugins._imported.clear()
    plugins._imported.update(imported)
    registry._registered.clear()
    registry._registered.update(registered)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "First", None) is not None or name.startswith("made_up"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def write(file: str, name: str, count: int = 3) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(METHOD.format(name=name, count=count))
        return path

    return write


def name_them(monkeypatch, *entries) -> None:
    monkeypatch.setenv(plugins.VARIABLE, os.pathsep.join(map(str, entries)))


# -- files and modules -------------------------------------------------------------------------------------------------


def test_a_file(write, monkeypatch):
    name_them(monkeypatch, write("random.py", "made_up"))  # a name that another module has
    assert "made_up" in available()
    assert get("made_up", count=2).to_dict() == {"method": "made_up", "count": 2}
    assert "First" not in vars(sys.modules["random"])


def test_by_name_alone(write, monkeypatch):
    name_them(monkeypatch, write("a.py", "made_up"))
    assert get("made_up").count == 3


def test_several_files_of_one_name_and_a_module(write, monkeypatch, tmp_path):
    one, two = write("one/m.py", "made_up"), write("two/m.py", "made_up_too", 4)
    write("made_up_module.py", "made_up_as_well", 5)
    monkeypatch.syspath_prepend(tmp_path)
    name_them(monkeypatch, one, "", two, "made_up_module")
    assert [get(n).count for n in ("made_up", "made_up_too", "made_up_as_well")] == [3, 4, 5]


def test_a_file_is_imported_once(write, monkeypatch):
    path = write("a.py", "made_up")
    name_them(monkeypatch, path)
    cls = registry.method_class("made_up")
    assert available() == available() and registry.method_class("made_up") is cls
    name_them(monkeypatch, path, path.parent / ".." / path.parent.name / "a.py")
    assert registry.method_class("made_up") is cls


def test_a_file_that_is_running_already(write, monkeypatch, tmp_path):
    """``python file.py`` with the variable naming the same file."""
    monkeypatch.syspath_prepend(tmp_path)
    name_them(monkeypatch, write("made_up_script.py", "made_up"))
    import made_up_script

    assert "made_up" in available() and registry.method_class("made_up") is made_up_script.First


def test_without_the_variable_nothing_is_there(write):
    write("a.py", "made_up")
    with pytest.raises(UnknownNameError, match="made_up"):
        get("made_up")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file"),
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("open('nowhere.txt')", "FileNotFoundError"),
        ("def broken(", "SyntaxError"),
        (METHOD.format(name="fastv", count=1), "MethodError: method name 'fastv' is already registered"),
    ],
)
def test_errors_name_the_file(content, says, monkeypatch, tmp_path):
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content)
    name_them(monkeypatch, path)
    for _ in range(2):  # not only the first time
        with pytest.raises(MethodError, match=r"(?s)ACCELERATE_METHODS_IMPORT.*bad\.py") as error:
            available()
        assert says in str(error.value)
    assert not [name for name in sys.modules if name.startswith("bad_")]


def test_an_unknown_module(monkeypatch):
    name_them(monkeypatch, "made_up_nowhere")
    with pytest.raises(MethodError, match="made_up_nowhere cannot be imported: ModuleNotFoundError"):
        available()


def test_two_files_with_one_method_name(write, monkeypatch):
    name_them(monkeypatch, write("a.py", "made_up"), write("b.py", "made_up"))
    with pytest.raises(MethodError, match=r"b\.py cannot be imported: MethodError: method name 'made_up' is already"):
        available()


# -- packages ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(write, monkeypatch, tmp_path):
    """package(entry point): an installed distribution that offers it."""

    def install(line: str) -> None:
        write("made_up_package.py", "made_up")
        info = tmp_path / "made_up_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{line}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_a_package(package):
    package("made_up = made_up_package:First")
    assert "made_up" in available() and "made_up_package" not in sys.modules, "listing imports nothing"
    assert get("made_up").count == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("made_up = made_up_package:Second", "cannot be loaded: AttributeError"),
        ("made_up = made_up_nowhere:First", "cannot be loaded: ModuleNotFoundError"),
        ("other = made_up_package:First", r"registered under another name, or not at all; write @register\('other'\)"),
    ],
)
def test_a_package_with_an_error(package, line, says):
    package(line)
    name = line.split(" ")[0]
    with pytest.raises(MethodError, match=f"method '{name}'.*{says}"):
        get(name)


# -- what follows from it ----------------------------------------------------------------------------------------------


def test_the_hash_of_the_code_holds_the_files(write, package, monkeypatch):
    def code() -> str:
        return fingerprint.code_hash.__wrapped__()

    plain = code()
    name_them(monkeypatch, write("a.py", "made_up"))
    first = code()
    write("a.py", "made_up", 4)
    second = code()
    name_them(monkeypatch, write("elsewhere/a.py", "made_up", 4))
    assert len({plain, first, second}) == 3 and code() == second, "content counts, not the place"
    name_them(monkeypatch)
    package("made_up = made_up_package:First")
    assert code() not in (plain, first, second)
    name_them(monkeypatch, "made_up_nowhere")
    assert code() != plain


def test_a_started_command_knows_the_files_in_its_folder(write, monkeypatch, tmp_path):
    path = write("a.py", "made_up")
    monkeypatch.chdir(tmp_path)
    name_them(monkeypatch, "a.py", "made_up_module")
    assert plugins.environment() == {plugins.VARIABLE: f"{path}{os.pathsep}made_up_module"}
    started = {}

    def stop(command, cwd, environment):
        started.update(environment)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_started", stop)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(KeyboardInterrupt):
        launch.execute([], launch.Machines(), tmp_path, launch.Console())
    assert started[plugins.VARIABLE] == f"{path}{os.pathsep}made_up_module"


def test_a_fresh_process_has_the_model_ids(write):
    pytest.importorskip("lmms_eval_accelerate")
    path = write("a.py", "made_up")
    code = "from lmms_eval_accelerate.manifest import model_ids; print(model_ids()['llava_onevision_made_up'])"
    environment = {**os.environ, plugins.VARIABLE: str(path)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "('llava_onevision', 'made_up')"


def test_the_harness_command_says_what_is_wrong(monkeypatch, tmp_path, capsys):
    pytest.importorskip("lmms_eval")
    cli = pytest.importorskip("lmms_eval_accelerate.cli")
    for name in ("HF_HOME", "ACCELERATE_USE_CPU"):  # the command sets what is missing
        monkeypatch.setenv(name, os.environ.get(name, str(tmp_path)) if name == "HF_HOME" else "true")
    name_them(monkeypatch, tmp_path / "gone.py")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--model", "llava_onevision_made_up", "--tasks", "shapes_video"])
    assert stop.value.code == 2 and "there is no file" in capsys.readouterr().err


# -- hosts -------------------------------------------------------------------------------------------------------------


class Other:
    """A model of no family."""


class OtherHost:
    def supports(self, model):
        return isinstance(model, Other)


def test_a_host_from_outside():
    before = list(hosts)
    try:
        with pytest.raises(MethodError, match="no host for"):
            host_for(Other())
        first = register_host(OtherHost())
        assert host_for(Other()) is first
        second = register_host(OtherHost())
        assert host_for(Other()) is second, "the one registered last"
        with pytest.raises(MethodError, match="no host for"):
            host_for(object())
    finally:
        hosts[:] = before


def test_a_host_in_a_named_file(monkeypatch, tmp_path):
    (tmp_path / "host.py").write_text(
        "from accelerate_methods.hosts import register_host\nfrom tests.registry.test_plugins import OtherHost\n"
        "register_host(OtherHost())\n"
    )
    before = list(hosts)
    name_them(monkeypatch, tmp_path / "host.py")
    try:
        assert isinstance(host_for(Other()), OtherHost)
    finally:
        hosts[:] = before


@pytest.mark.parametrize(
    ("family", "says"),
    [
        (type("NoFamily", (), {"classes": ("X",)}), "subclasses of Family"),
        (None, "about must be a ModelFamily"),
        ({"module": "a_module"}, r"classes must be a tuple of class names, not \(\)"),
        ({"module": "a_module", "classes": "X"}, "classes must be a tuple of class names, not 'X'"),
        ({"classes": ("X",)}, r"and module what defines them, not \(\)"),
    ],
)
def test_a_family_must_be_one(family, says):
    from accelerate_methods.hosts.native import Family, register_family

    before = families.families()
    if not isinstance(family, type):
        about = None if family is None else families.ModelFamily(name="made", signals=frozenset(), **family)
        family = type("Made", (Family,), {"about": about} if about else {})
    with pytest.raises(MethodError, match=says):
        register_family(family)
    assert families.families() == before
