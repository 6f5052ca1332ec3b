"""What a server is asked to do: sources, precedence, errors. Nothing here needs vLLM."""

import subprocess
import sys

import pytest

from accelerate_methods.hosts import vllm
from accelerate_methods.hosts.vllm.spec import VARIABLE, dense_rows, from_environment, merged, method_of, read, sent
from accelerate_methods.stages.errors import MethodError
from tests.support.served_methods import PARAMETERS, not_served, specification

UNIFORM = {"method": "uniform", "retention_ratio": 0.25}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([], None),
        ([None, None], None),
        (["uniform"], {"method": "uniform"}),
        ([UNIFORM, None, {"retention_ratio": 0.5}], {**UNIFORM, "retention_ratio": 0.5}),
        ([UNIFORM, "none"], None),
        ([UNIFORM, {"method": None}], None),
        (["none", UNIFORM], UNIFORM),
        ([{**UNIFORM}, {"method": "random", "retention_ratio": 0.5}], {"method": "random", "retention_ratio": 0.5}),
        ([{"method": "random", "seed": 3, "retention_ratio": 0.5}, UNIFORM], UNIFORM),
        ([UNIFORM, {"tokens_per_image": 9}], {"method": "uniform", "tokens_per_image": 9}),
        ([{"method": "vidcom2", "cap": 0.2}, {"retention_ratio": 0.5}], {"method": "vidcom2", "retention_ratio": 0.5}),
        ([{"method": "prunevid"}, {"cap": 0.3}], {"method": "prunevid", "cap": 0.3}),
    ],
)
def test_later_sources_go_before_earlier_ones(sources, expected):
    found = merged(sources)
    assert (None if found is None else {k: v for k, v in found.items() if v is not None}) == expected


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([{"retention_ratio": 0.5}], "names no method"),
        ([3], "must be a method's name or a mapping"),
        ([{"method": "none", "seed": 1}], "but no method"),
        ([UNIFORM, {"colour": 1}], "unknown parameter"),
        ([{"method": "unifrom", "retention_ratio": 0.5}], "Did you mean 'uniform'"),
    ],
)
def test_what_makes_no_sense_is_refused(sources, said):
    with pytest.raises(MethodError, match=said):
        merged(sources)


@pytest.mark.parametrize("cap", [0, 1.5, True, "half"])
def test_a_cap_is_a_share(cap):
    with pytest.raises(MethodError, match="cap"):
        method_of({**UNIFORM, "cap": cap})


def test_the_environment_holds_json_or_a_name(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert from_environment() is None
    monkeypatch.setenv(VARIABLE, '{"method": "uniform"}')
    assert from_environment() == {"method": "uniform"}
    monkeypatch.setenv(VARIABLE, "uniform")
    assert from_environment() == "uniform"
    monkeypatch.setenv(VARIABLE, "{method: uniform}")
    with pytest.raises(MethodError, match="no JSON"):
        from_environment()


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_worker_reads_the_same_method(name):
    method = method_of(specification(name))
    text = sent(method, 100_000)
    assert read(text) == method
    assert dense_rows(text) == 100_000
    assert method.name == name


@pytest.mark.parametrize("name", not_served())
def test_what_cannot_be_served_says_why(name):
    """A new method belongs into one of the two lists."""
    for parameters in ({}, {"retention_ratio": 0.5}):
        try:
            method_of({"method": name, **parameters})
        except MethodError as error:
            if "cannot be served" in str(error):
                return
    pytest.fail(f"{name} can be served: name it in tests/support/served_methods.py, so that it is compared")


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0"])
def test_supported_releases(version):
    vllm.check_release(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0rc1", "1.0.0", "0.3.2"])
def test_other_releases_are_named(version):
    with pytest.raises(MethodError, match=version):
        vllm.check_release(version)


def test_the_package_does_not_import_vllm():
    code = (
        "import sys, importlib; sys.modules['vllm'] = None\n"
        "for name in ('', '.spec', '.served', '.layouts', '.grids', '.prompts'):\n"
        "    importlib.import_module('accelerate_methods.hosts.vllm' + name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
