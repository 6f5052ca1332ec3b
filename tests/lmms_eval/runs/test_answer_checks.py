"""Warnings about answers: each trap is named, good answers raise none."""

from __future__ import annotations

import doctest
import math

import pytest

pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate.runs import answer_checks
from lmms_eval_accelerate.runs.answer_checks import check, repeated_unit

CONFIG = {"generation_kwargs": {"max_new_tokens": 16, "temperature": 0}}


def lines(answers: list, targets: list | None = None, tokens: int = 2, **more) -> list[dict]:
    """Lines of a samples file."""
    targets = targets or ["ABCD"[n % 4] for n in range(len(answers))]
    return [
        {
            "doc_id": n,
            "filtered_resps": answer,
            "target": target,
            "token_counts": [{"generated_tokens": tokens, "warmup": False}],
            "input": f"question {n}?",
            **more,
        }
        for n, (answer, target) in enumerate(zip(answers, targets, strict=True))
    ]


def only(warnings: list[str]) -> str:
    (warning,) = warnings
    assert warning.startswith("quiz: ")
    return warning


@pytest.mark.parametrize(
    ("answers", "targets"),
    [
        (["A", "B", "C", "D"] * 25, None),
        (["yes", "no"] * 50, ["yes", "no"] * 50),
        (["Yes, there is."] * 60 + ["no"] * 40, ["yes", "no"] * 50),
        (["no"] * 100, ["no"] * 90 + ["yes"] * 10),  # the references are as one-sided
        (["no"] * 100, [""] * 100),  # nobody knows the references
        (["A"] * 49, None),  # too few to say
        (["A red ball rolls over the table and falls.", "111", "no, no", "ha ha ha", "It is 12:12."] * 20, None),
        ([f"{n} birds" for n in range(100)], None),
        (["1111"] + [str(n) for n in range(199)], None),  # one number of 200
    ],
)
def test_good_answers_are_met_with_silence(answers, targets) -> None:
    assert check("quiz", lines(answers, targets), CONFIG) == []


def test_no_samples_no_warnings() -> None:
    assert check("quiz", []) == []


@pytest.mark.parametrize("count", [1, 200])
def test_nan_that_decodes_to_exclamation_marks(count) -> None:
    answers = ["!" * 16] * count + ["A", "B", "C", "D"] * ((200 - count) // 4) + ["A"] * ((200 - count) % 4)
    warning = only(check("quiz", lines(answers), CONFIG))
    assert f"{count} of 200" in warning and "'!!!'" in warning
    assert "NaN" in warning and "bfloat16" in warning and "sdpa" in warning


def test_repeated_words() -> None:
    answers = [f"{n} dogs" for n in range(95)] + ["the the the the the th"] * 5
    warning = only(check("quiz", lines(answers), CONFIG))
    assert "5 of 100 (5 %) answers are one thing repeated" in warning and "'the the the '" in warning
    assert "conv_template" in warning and "NaN" not in warning


def test_units_that_repeat() -> None:
    assert doctest.testmod(answer_checks).failed == 0
    assert [repeated_unit(a) for a in ("", "a", "!!!", "!!!!", "ab" * 4, "-- -- -- --", "!!!!\n!!!! !!!! !!!!")] == [
        *(None, None, None, "!", "ab", "-- ", "!!!! ")
    ]
    assert repeated_unit("abcdefghijklmnopqrstuvwxyz" * 4) is None  # longer than any unit looked for


def test_empty_answers() -> None:
    warning = only(check("quiz", lines(["", "  "] + [f"{n} dogs" for n in range(98)]), CONFIG))
    assert "2 of 100 (2 %) answers are empty" in warning and "conv_template" in warning and "until" in warning
    assert check("quiz", lines(["", *(f"{n} dogs" for n in range(150))]), CONFIG) == []  # one in 151


@pytest.mark.parametrize("form", ["A", "A.", "(A) a red ball", "A: because"])
def test_the_same_choice_whatever_the_question(form) -> None:
    warning = only(check("quiz", lines([form] * 96 + ["B"] * 4), CONFIG))
    assert "96 of 100 (96 %) answers are 'A', whatever the question" in warning and "frames" in warning
    assert check("quiz", lines([form] * 95 + ["B"] * 5), CONFIG) == []
    assert only(check("quiz", lines([form] * 100, [""] * 100), CONFIG))  # a letter, without references


def test_always_yes_to_balanced_questions() -> None:
    assert "'yes', whatever" in only(check("quiz", lines(["Yes."] * 80, ["yes", "no"] * 40), CONFIG))


def test_skipped_documents() -> None:
    samples = lines([f"{n} dogs" for n in range(48)])
    missing = {"skipped": True, "error": "no such file: 7.mp4"}
    samples += [{**line, "doc_id": 90 + n, "token_counts": [missing]} for n, line in enumerate(lines(["", ""]))]
    warning = only(check("quiz", samples, CONFIG))  # their empty answers are not told twice
    assert "2 of 50 (4 %) documents were skipped" in warning and "no such file: 7.mp4" in warning


def test_answers_that_are_cut_off() -> None:
    rambling = [f"Well, picture {n} shows" for n in range(60)]
    warning = only(check("quiz", lines(rambling, tokens=16), CONFIG))
    assert "60 of 60 (100 %) answers were cut off at max_new_tokens=16" in warning and "prompt_model" in warning
    assert check("quiz", lines(rambling, tokens=15), CONFIG) == []
    assert check("quiz", lines(rambling, tokens=16)) == []  # the limit is not known
    assert check("quiz", lines(rambling, tokens=1), {"generation_kwargs": {"max_new_tokens": 1}}) == []  # meant so
    in_memory = lines(rambling, tokens=9, arguments=["prompt", {"max_new_tokens": 9}, 0, "quiz", "test"])
    assert "max_new_tokens=9" in only(check("quiz", in_memory, CONFIG))


@pytest.mark.parametrize("written", [False, True])
def test_likelihood_tasks_have_numbers_not_answers(written) -> None:
    def line(number: int, *losses: float) -> dict:
        pairs = [(str(loss), "False") if written else (loss, False) for loss in losses]
        return {"doc_id": number, "filtered_resps": pairs, "target": 0, "token_counts": [None, None]}

    good = [line(n, 1.5, 2.5) for n in range(60)]
    assert check("quiz", good, CONFIG) == []
    bad = [*good, line(60, math.nan, math.nan), line(61, math.inf, 1.0)]
    assert "likelihoods of 2 of 62 (3 %) documents are NaN" in only(check("quiz", bad, CONFIG))


def test_several_rounds_and_repeated_lines_of_ranks() -> None:
    samples = lines([["", ""], ["left", "right"]])
    assert "1 of 2 (50 %) answers are empty" in only(check("quiz", [*samples, *samples]))


def test_lines_without_costs_are_read_too() -> None:
    samples = [{"filtered_resps": ["!!!!!!!!"], "target": "x", "token_counts": [None]} for _ in range(3)]
    assert "3 of 3" in only(check("quiz", samples, CONFIG))


def test_a_run_of_the_harness(tmp_path, monkeypatch) -> None:
    """On what the evaluator really hands over: a random model that never ends its answer is told to be cut off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    pytest.importorskip("lmms_eval")
    from tests.support.lmms_tasks import document, evaluate, write_tasks
    from tests.support.paths import CHECKPOINTS

    tasks = write_tasks(tmp_path, text=[document(n) for n in range(4)])
    args = f"pretrained={CHECKPOINTS / 'tiny-llava-onevision'},max_frames_num=4"
    results = evaluate("llava_onevision_accelerated", ["text"], tasks, model_args=args)
    warnings = check("text", results["samples"]["text"], results["configs"]["text"])
    lengths = [s["token_counts"][0]["generated_tokens"] for s in results["samples"]["text"]]
    assert any("cut off at max_new_tokens=6" in w for w in warnings) == (sum(n >= 6 for n in lengths) > 2)
