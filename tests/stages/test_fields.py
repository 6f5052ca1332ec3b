"""Declared hyper-parameters: every kind of rule, budgets of one and of two fields, and what pages read of them."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch

from accelerate_methods import MethodError, UnknownNameError, available
from accelerate_methods.registry import method_class
from accelerate_methods.stages.budget import BudgetedMethod
from accelerate_methods.stages.fields import (
    budgets,
    choice,
    flag,
    integer,
    integers,
    parameters_of,
    real,
    reals,
    rules,
    share,
)
from accelerate_methods.stages.method import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared(Method):
    """Something with a field of each kind.

    Attributes:
        keep: share that stays,
            in any case.
        rows, columns: the same as two counts.
    """

    name = "declared"

    keep: float | None = share(0.5, budget=True)
    rows: int | None = integer(None, low=1, budget="grid")
    columns: int | None = integer(None, low=1, budget="grid")
    cut: float = real(0.9, low=-1, high=1)
    mode: str = choice("fast", "fast", "exact")
    sorted: bool = flag(True)
    free: object = "anything"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0}, r"declared: keep=0 is outside the allowed range \(0, 1\]"),
        ({"keep": 1.01}, r"declared: keep=1.01 is outside the allowed range \(0, 1\]"),
        ({"keep": "0.5"}, "declared: keep must be a number, got '0.5'"),
        ({"keep": float("nan")}, "declared: keep must be a number, got nan"),
        ({"keep": True}, "declared: keep must be a number, got True"),
        ({"cut": None}, "declared: cut must be a number, got None"),
        ({"cut": 2}, r"declared: cut=2 is outside the allowed range \[-1, 1\]"),
        ({"sorted": 1}, "declared: sorted must be True or False, got 1"),
        ({"keep": None}, r"give exactly one budget out of keep, rows and columns \(got none\)"),
        ({"rows": 2, "columns": 2}, r"exactly one budget out of keep, rows and columns \(got keep, rows, columns\)"),
        ({"keep": None, "rows": 2}, "rows and columns belong together; give both or neither"),
        ({"keep": None, "rows": 0, "columns": 2}, r"rows=0 is outside the allowed range \[1, inf\)"),
        ({"keep": None, "rows": 2.0, "columns": 2}, "rows must be an integer, got 2.0"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        Declared(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several(Method):
    """Lists of numbers.

    Attributes:
        layers: where it acts.
        ratios: what stays there.
    """

    name = "several"

    layers: tuple[int, ...] = integers((2, 6), low=0)
    ratios: tuple[float, ...] | None = reals(None, low=0, high=1)


@pytest.mark.parametrize("given", [[3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4])])
def test_a_list_of_numbers_becomes_a_tuple(given):
    method = Several(layers=given)
    assert method.layers == (3, 4) and method.ratios is None and hash(method)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 3}, "several: layers must be a list of integers, got 3"),
        ({"layers": []}, r"several: layers must be a list of integers, got \[\]"),
        ({"layers": [1, 2.5]}, "several: layers must be an integer, got 2.5"),
        ({"layers": [-1]}, r"several: layers=-1 is outside the allowed range \[0, inf\)"),
        ({"ratios": ["a"]}, "several: ratios must be a number, got 'a'"),
        ({"ratios": [0.5, 2]}, r"several: ratios=2 is outside the allowed range \[0, 1\]"),
    ],
)
def test_what_a_list_refuses(given, message):
    with pytest.raises(MethodError, match=message):
        Several(**given)


def test_a_choice_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'exakt'.*Did you mean 'exact'\? Allowed: exact, fast"):
        Declared(mode="exakt")


def test_one_budget_replaces_the_other():
    grid = Declared.create(rows=2, columns=3)
    assert (grid.keep, grid.rows, grid.columns) == (None, 2, 3)
    assert Declared.create(keep=0.1).keep == 0.1
    assert budgets(Declared) == {"keep": ["keep"], "grid": ["rows", "columns"]}
    assert Declared.budget_fields() == ("keep", "rows", "columns")


@pytest.mark.parametrize("value", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), np.array(0.25)])
def test_numbers_of_arrays_become_plain(value):
    method = Declared(keep=value)
    assert method.keep == 0.25 and type(method.keep) is float
    with pytest.raises(MethodError, match="must be an integer"):
        Declared.create(rows=value, columns=1)


def test_a_batch_of_numbers_is_no_number():
    with pytest.raises(MethodError, match="keep must be a number"):
        Declared(keep=np.array([0.1, 0.2]))


def test_what_pages_read():
    found = {p.name: p for p in parameters_of(Declared)}
    assert list(found) == ["keep", "rows", "columns", "cut", "mode", "sorted", "free"]
    assert found["keep"].meaning == "share that stays, in any case."
    assert found["rows"].meaning == found["columns"].meaning == "the same as two counts."
    assert [p.allowed for p in found.values()] == [
        *("(0, 1]", "[1, inf)", "[1, inf)", "[-1, 1]", "fast, exact", "True, False", "")
    ]
    assert found["rows"].budget and not found["cut"].budget
    assert parameters_of(BudgetedMethod)[0].meaning == "share of the tokens that stay."


@pytest.mark.parametrize("name", available())
def test_every_parameter_is_declared_and_explained(name):
    cls = method_class(name)
    assert all(rule is not None for rule in rules(cls).values())
    assert all(p.meaning for p in parameters_of(cls)), [p.name for p in parameters_of(cls) if not p.meaning]
    assert cls.title and cls.paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renamed(Method):
    """Fields that other code bases call otherwise."""

    name = "renamed"
    misleading: ClassVar[dict[str, str]] = {"r": "some drop it, others keep it; give keep"}

    keep: float | None = share(0.5, budget=True, aliases=("keep_ratio",))
    tokens: int | None = integer(None, low=1, budget=True, aliases=("num_tokens", "rank"))


def test_names_of_other_code_bases():
    assert Renamed.create(keep_ratio=0.1) == Renamed(keep=0.1)
    assert Renamed.create(rank=4) == Renamed(keep=None, tokens=4), "an alias replaces the other budget, too"
    with pytest.raises(MethodError, match="renamed: num_tokens and rank are names of one parameter; give one of them"):
        Renamed.create(num_tokens=4, rank=4)
    with pytest.raises(MethodError, match="renamed has no parameter 'r': some drop it, others keep it; give keep"):
        Renamed.create(r=0.5)
    with pytest.raises(MethodError, match="renamed has no retention_ratio: say how much it keeps with keep or tokens"):
        Renamed.create(retention_ratio=0.5)
    assert parameters_of(Renamed)[1].aliases == ("num_tokens", "rank")


@pytest.mark.parametrize(
    ("method", "given", "meant"),
    [
        ("fastvid", {"dyseg_c": 3, "dyseg_tau": 0.5, "stprune_d": 0.1}, {"c": 3, "tau": 0.5, "d": 0.1}),
        ("fastvid", {"dtm_p": 2, "dtm_alpha": 0.9}, {"p": 2, "beta": 0.9}),
        ("prunevid", {"temporal_segment_ratio": 0.5, "cluster_ratio": 0.3}, {"gamma": 0.5, "beta": 0.3}),
        ("visionzip", {"dominant_num": 54, "contextual_num": 10}, {"dominant": 54, "contextual": 10}),
        ("fastervlm", {"visual_token_num": 128}, {"tokens_per_view": 128}),
        ("fastv", {"fastv_k": 3, "fast_v_attention_rank": 72}, {"k": 3, "tokens_per_image": 72}),
    ],
)
def test_aliases_of_the_methods(method, given, meant):
    from accelerate_methods import get, resolve

    assert get(method, **given) == get(method, **meant)
    assert resolve({"method": method, **given}) == resolve(method, **meant)
    configured = f"{method}/{'llava_1_5' if method in ('visionzip', 'fastv') else 'llava_onevision'}"
    assert resolve(configured, **given).methods == resolve(configured, **meant).methods, "over those of a config"


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("dycoke", {"retention_ratio": 0.5}, "how much it keeps follows from k, p, l, threshold, ttm, dp"),
        ("dycoke", {"merging_ratio": 0.5}, "give k, the share of a compressed frame's tokens that is dropped"),
        ("fastv", {"fastv_r": 0.5}, r"give r \(dropped\) or retention_ratio \(kept\)"),
        ("FastVID", {}, "unknown method 'FastVID'. Did you mean 'fastvid'"),
        ("fastvid", {"Tau": 0.5}, "'Tau'. Did you mean 'tau'"),
    ],
)
def test_what_names_that_mean_something_else_get(method, given, says):
    from accelerate_methods import get

    with pytest.raises(MethodError, match=says):
        get(method, **given)
