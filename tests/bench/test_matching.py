"""Solving a method's own budget for a target: which parameter, in which direction, and what cannot be reached."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods import record
from accelerate_methods.bench.matching import (
    Target,
    by_count,
    match,
    parameter_of,
    share_of,
    shares,
    solution,
    solve,
    with_budget,
)
from accelerate_methods.registry import available, get, method_class
from accelerate_methods.stages.errors import MethodError, UnknownNameError
from accelerate_methods.stages.shapes import ItemShape
from tests.support.native_models import tree_model


def test_targets_are_read_and_wrong_ones_refused():
    assert Target.of("tokens=0.25") == Target.of("tokens:0.25") == Target("tokens", 0.25)
    assert str(Target.of("flops=1")) == "flops=1"
    with pytest.raises(UnknownNameError, match=r"'token'\. Did you mean 'tokens'"):
        Target.of("token=0.25")
    for bad in ("tokens", "tokens=0", "tokens=1.5", "tokens=many"):
        with pytest.raises(MethodError, match="not a share above 0"):
            Target.of(bad)


@pytest.mark.parametrize("name", available())
def test_a_method_has_a_budget_to_solve_or_says_why_not(name):
    for kind in ("tokens", "layer_tokens", "flops"):
        try:
            parameter = parameter_of(method_class(name), kind)
        except MethodError as error:
            assert name in str(error)
            continue
        assert parameter in method_class(name).budget_fields()


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("dycoke", "tokens", "no free budget.*k, p, l"),
        ("aks", "layer_tokens", "no free budget"),
        ("streamingllm", "layer_tokens", "decode steps only"),
        ("fastv", "tokens", "which every visual token enters: match layer_tokens or flops"),
    ],
)
def test_what_has_none_to_solve_says_so(name, kind, why):
    with pytest.raises(MethodError, match=why):
        parameter_of(method_class(name), kind)


def test_the_other_budgets_give_way():
    method = with_budget(get("fastv", k=3, tokens_per_image=5), "retention_ratio", 0.5)
    assert method.k == 3 and method.tokens_per_image is None and method.retention_ratio == 0.5


@given(target=st.floats(0.05, 0.98), bend=st.floats(0.7, 3.0))
def test_any_rising_share_is_solved(target, bend):
    found = solve(get("random", retention_ratio=1.0), Target("tokens", target), lambda m: m.retention_ratio**bend)
    assert found.reached and abs(found.realised - target) <= 0.05 * target
    assert found.value == found.method.retention_ratio and found.realised == found.value**bend


def test_a_falling_share_is_solved():
    found = solve(get("evs", pruning_rate=0.1), Target("tokens", 0.3), lambda m: 1 - m.pruning_rate**2)
    assert found.realised == pytest.approx(0.3, rel=0.01) and found.parameter == "pruning_rate"


def test_steps_give_the_nearest_and_say_that_it_is_not_the_target():
    quarters = Target("tokens", 0.3)
    steps = solve(get("random", retention_ratio=0.5), quarters, lambda m: max(1, int(4 * m.retention_ratio)) / 4)
    assert steps.realised == 0.25 and not steps.reached and steps.trials <= 12
    assert solution(steps.to_dict()).endswith("realises 25.0%, the nearest to it")


def test_a_target_out_of_reach_gives_the_end_of_the_range():
    target = Target("layer_tokens", 0.1)
    found = solve(get("random", retention_ratio=0.5), target, lambda m: (1 + m.retention_ratio) / 2)
    assert not found.reached and found.realised == pytest.approx(0.5, abs=0.01)


def test_a_budget_that_changes_nothing_is_an_error():
    with pytest.raises(MethodError, match="retention_ratio changes nothing that flops counts"):
        solve(get("random", retention_ratio=0.5), Target("flops", 0.1), lambda m: 1.0)


# -- from shapes, and from a model -------------------------------------------------------------------------------------

SHAPES = {"video": [ItemShape(8, 49, (7, 7))], "image": [ItemShape(1, 100, (10, 10))]}


def test_methods_that_say_their_count_are_solved_without_a_model():
    predict = by_count("tokens", SHAPES)
    assert predict(get("uniform", retention_ratio=0.25)) == 0.25
    assert predict(get("evs", pruning_rate=0.5)) == pytest.approx(0.5, abs=0.02), "of the videos that it acts on"
    assert predict(get("fastvid", retention_ratio=0.5)) is None, "which looks at the frames"
    assert predict(get("fastv", retention_ratio=0.5)) is None, "which acts inside the language model"
    assert by_count("flops", SHAPES)(get("uniform", retention_ratio=0.25)) is None
    asked = []

    def measure(method):
        asked.append(method)
        return predict(method)

    found = match(get("uniform", retention_ratio=1.0), Target("layer_tokens", 0.2), measure, predict)
    assert found.reached and len(asked) == found.trials == 1


def test_a_count_that_is_not_what_happens_is_not_believed():
    target, predict = Target("tokens", 0.2), by_count("tokens", SHAPES)
    found = match(get("uniform", retention_ratio=1.0), target, lambda m: m.retention_ratio / 2, predict)
    assert found.realised == pytest.approx(0.2, rel=0.01) and found.value == pytest.approx(0.4, rel=0.01)


def test_shares_of_a_request():
    assert share_of("tokens", 100, [50, 50, 20, 20], (1.0, 2.0)) == 0.5
    assert share_of("layer_tokens", 100, [50, 50, 20, 20], (1.0, 2.0)) == 0.35
    assert share_of("flops", 100, [50, 50, 20, 20], (1.0, 2.0)) == 0.5


def test_a_model_realises_what_was_solved():
    import torch

    model = tree_model("tiny-llava-onevision")
    ids = torch.tensor([[5, -200, 6, 7]])
    frames = torch.randn(4, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    config = model.config

    def measure(method, kind):
        with torch.no_grad(), accelerate_methods.accelerate(model, method), record() as calls:
            model(ids, images=[frames], modalities=["video"])
        (share,) = shares(calls[0], config, kind)
        return share

    for kind, name in (("tokens", "fastvid"), ("layer_tokens", "fastv"), ("flops", "uniform")):
        method = get(name, retention_ratio=0.5)
        found = solve(method, Target(kind, 0.6), lambda m, kind=kind: measure(m, kind))
        assert found.reached and measure(found.method, kind) == found.realised
