"""Runs that claim a method and are the dense model in effect: found by their counts or answers, marked and told."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval_accelerate.compare import table as comparison
from lmms_eval_accelerate.distributions import pack
from lmms_eval_accelerate.models.costs import summarise
from lmms_eval_accelerate.report.loyalty import loyalty
from lmms_eval_accelerate.report.results import Sample
from lmms_eval_accelerate.runs import no_op, summary
from lmms_eval_accelerate.session import Session

FASTV = {"method": "fastv", "retention_ratio": 0.5, "k": 2}
RANDOM = {"method": "random", "retention_ratio": 0.25}


def cost(before: int, by_layer: list[int], kind: str = "image") -> dict:
    """The costs of one answer, as far as what was kept goes."""
    mean = sum(by_layer) / len(by_layer)
    others = ("prompt_tokens_dense", "prompt_tokens", "vision_ms", "compress_ms", "prefill_ms", "decode_ms")
    others += ("generate_ms", "llm_tflops_dense", "llm_tflops", "generated_tokens", "visual_tokens_after")
    return {
        **dict.fromkeys(others, 1.0),
        "visual_tokens_before": before,
        "visual_tokens_per_layer": mean,
        "visual_tokens_by_layer": by_layer,
        "kept": mean / before if before else None,
        "modalities": [kind] if before else [],
        "warmup": False,
    }


def means(*costs: dict) -> dict:
    return summarise(costs)


# -- realised ratio ----------------------------------------------------------------------------------------------------


def test_the_realised_ratio_is_told_per_layer_and_averaged_over_layers_and_answers():
    made = means(cost(100, [100, 100, 50, 50]), cost(200, [200, 100, 50, 50]), cost(0, [0, 0, 0, 0]))
    assert made["kept"] == pytest.approx((0.75 + 0.5) / 2)
    assert made["kept_by_layer"] == pytest.approx([1.0, 0.75, 0.375, 0.375])
    assert (made["kept_least"], made["kept_most"]) == (0.5, 0.75)
    assert (made["with_visual_tokens"], made["kept_everything"], made["visual_tokens_most"]) == (2, 0, 200)


def test_the_summary_holds_it_per_sample_and_by_task():
    samples = {"quiz": [{"doc_id": n, "token_counts": [cost(100, [100, 25 * n])]} for n in (1, 2)]}
    results = {"results": {"quiz": {"exact_match,none": 0.5}}, "configs": {}}
    run = Session()
    run.settings = {"methods": [FASTV], "method": "fastv", "pretrained": "nowhere"}
    made = summary.build(results, samples, Namespace(model="m", model_args=""), run)
    assert made["kept_by_document"] == {"quiz": {"1": 0.625, "2": 0.75}}
    assert made["costs"]["by_task"]["quiz"]["kept_by_layer"] == [1.0, 0.375]
    assert made["no_op"] == {}


def test_layers_that_are_alike_are_told_as_one():
    assert no_op.layers_text([1.0, 1.0, 0.25, 0.25, 0.25]) == "100% x 2, 25% x 3"
    assert no_op.layers_text([1 - n / 10 for n in range(10)]) == "100% to 10%, 10 layers"


# -- by its own counts -------------------------------------------------------------------------------------------------

WHOLE = cost(100, [100, 100])


@pytest.mark.parametrize(
    ("costs", "methods", "told"),
    [
        ([WHOLE], [FASTV], r"kept in every layer \(fastv\("),
        ([WHOLE, cost(100, [100, 99])], [FASTV], None),
        ([WHOLE], [], None),
        ([WHOLE], [{**RANDOM, "retention_ratio": 1.0}], "as asked: random has retention_ratio=1$"),
        ([WHOLE], [{"method": "random", "tokens_per_image": 100}], "as asked: random has tokens_per_image=100$"),
        ([WHOLE], [{"method": "random", "tokens_per_image": 99}], r"kept in every layer \(random"),
        ([WHOLE], [{"method": "fastvid", "retention_ratio": 0.1}], "as asked: fastvid acts on videos only$"),
        ([cost(100, [100, 100], "video")], [{"method": "fastvid"}], "in every layer"),
        ([cost(0, [0, 0])], [FASTV], "no prompt has visual tokens"),
        ([cost(0, [0, 0]), WHOLE], [RANDOM], "in every layer"),
        # what these do is not seen in the numbers of tokens
        ([cost(100, [100, 100], "video")], [{"method": "dycoke"}], None),
        ([WHOLE], [{"method": "dycoke"}], "dycoke acts on videos only"),
        ([cost(100, [100, 100], "video")], [{"method": "aks"}], None),
        ([WHOLE], [{"method": "streamingllm"}], None),
        ([cost(0, [0, 0])], [{"method": "streamingllm"}], None),
        # nothing is said of a method that this process does not know
        ([WHOLE], [{"method": "somebody_elses"}], None),
    ],
)
def test_a_run_that_kept_everything_is_found(costs, methods, told):
    reason = no_op.kept_everything(means(*costs), methods)
    if told is None:
        assert reason is None
    else:
        import re

        assert reason is not None and re.search(told, reason), reason


def test_a_summary_without_these_counts_says_nothing():
    assert no_op.kept_everything({"samples": 5, "visual_tokens_before": 100.0}, [RANDOM]) is None


# -- by its answers ----------------------------------------------------------------------------------------------------


def distribution(*probabilities: float) -> str:
    logprobs = [math.log(p) for p in probabilities]
    return pack(range(len(logprobs)), logprobs, float("-inf"))


def answers(*pairs: tuple[str, str | None]) -> dict[int, Sample]:
    return {n: Sample(n, "?", "yes", answer, 1.0, first) for n, (answer, first) in enumerate(pairs)}


SURE, ROUNDED, TORN = distribution(0.9, 0.1), distribution(0.90001, 0.09999), distribution(0.89, 0.11)


@pytest.mark.parametrize(
    ("other", "unchanged"),
    [
        (answers(("yes", SURE), ("no", SURE)), 2),
        (answers(("yes", ROUNDED), ("no", SURE)), 2),  # the same sums in another order
        (answers(("yes", TORN), ("no", SURE)), 1),
        (answers(("yes", SURE), ("yes", SURE)), 1),
        (answers(("yes", SURE), ("no", None)), 1),  # equal answers alone prove nothing
        (answers(("yes", None), ("no", None)), 0),
    ],
)
def test_answers_and_distributions_must_both_be_the_dense_runs(other, unchanged):
    found = loyalty(answers(("yes", SURE), ("no", SURE)), other)
    assert found.unchanged == unchanged
    assert (no_op.answers_as_dense(found, [RANDOM]) is None) == (unchanged < 2)


def test_documents_that_neither_run_could_read_hide_nothing():
    read, skipped = [("yes", SURE)] * 19, [("", None)]
    assert loyalty(answers(*read, *skipped), answers(*read, *skipped)).identical
    assert not loyalty(answers(*read, *skipped), answers(*read, ("yes", None))).identical
    assert not loyalty(answers(*skipped), answers(*skipped)).identical


def test_likelihoods_are_compared_by_their_losses():
    one, same, other = (
        {0: Sample(0, "?", "a", "choice 0", 1.0, None, losses)} for losses in ((0.5, 2.0), (0.5, 2.0), (0.51, 2.0))
    )
    assert loyalty(one, same).unchanged == 1 and loyalty(one, other).unchanged == 0


def test_a_method_of_decode_steps_is_told_with_its_stage():
    same = loyalty(answers(("yes", SURE)), answers(("yes", SURE)))
    assert "decode steps only" in no_op.answers_as_dense(same, [{"method": "streamingllm"}])
    assert "decode steps only" not in no_op.answers_as_dense(same, [RANDOM])
    assert no_op.answers_as_dense(loyalty({}, {}), [RANDOM]) is None


# -- how it is shown ---------------------------------------------------------------------------------------------------


def write_run(folder: Path, methods: list[dict], by_layer: list[int], first: str) -> Path:
    """A finished run of two documents; ``first``: the distribution of the first tokens."""
    counts = [{**cost(100, by_layer), "first_token": first} for _ in range(2)]
    own = means(*counts)
    idle = no_op.kept_everything(own, methods)
    content = {
        "tasks": {"quiz": {"exact_match": 1.0}},
        "n_samples": {"quiz": 2},
        "costs": {"overall": own, "by_task": {"quiz": own}},
        "methods": methods,
        "no_op": {"quiz": idle} if idle else {},
        "settings": {"methods": methods},
        "date": "20260101_000000",
    }
    lines = [
        {"doc_id": n, "input": "?", "target": "a", "filtered_resps": ["a"], "exact_match": 1.0, "token_counts": [c]}
        for n, c in enumerate(counts)
    ]
    (folder / "model").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "model" / "20260101_000000_samples_quiz.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def found(tmp_path):
    """Dense; a method that says it dropped three quarters and changed nothing; one that did; one that kept all."""
    return comparison.read(
        {
            "dense": write_run(tmp_path / "dense", [], [100, 100], SURE),
            "random@0.25": write_run(tmp_path / "false", [RANDOM], [25, 25], SURE),
            "fastv": write_run(tmp_path / "real", [FASTV], [100, 50], TORN),
            "random@1": write_run(tmp_path / "all", [{**RANDOM, "retention_ratio": 1.0}], [100, 100], SURE),
        }
    )


def test_a_comparison_marks_it_in_table_json_and_last_line(found, tmp_path):
    reasons = {row.setting: row.no_op for row in found}
    assert reasons["dense"] is None is reasons["fastv"]
    assert reasons["random@0.25"].startswith("all 2 answers") and "as asked" in reasons["random@1"]
    text = comparison.markdown(found)
    assert f"| random@0.25 {no_op.MARK} |" in text and f"| random@1 {no_op.MARK} |" in text
    assert "| fastv | 100.0 |" in text and "| dense | 100.0 |" in text
    assert f"quiz: {no_op.MARK}: no effect, the dense model's numbers (random@0.25): all 2 answers" in text
    assert comparison.closing(found).startswith(f"{no_op.MARK} no effect in 2 of 3: random@0.25 on quiz, random@1 on")
    assert comparison.closing(found[:1] + found[2:3]) == ""
    comparison.write(found, tmp_path)
    saved = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [bool(row["no_op"]) for row in saved] == [False, True, False, True]
    assert saved[2]["kept_by_layer"] == [1.0, 0.5] and saved[2]["kept_least"] == 0.75


def test_a_comparison_tells_what_was_kept_where_layers_or_samples_differ(found):
    text = comparison.markdown(found)
    assert "| fastv | 75.0% | 75.0% | 75.0% | 100% x 1, 50% x 1 |" in text
    assert "| random@0.25 | 25.0%" not in text  # the first table says it


def test_a_run_alone_says_so_at_its_end(tmp_path, capsys):
    report = json.loads((write_run(tmp_path / "run", [FASTV], [100, 100], SURE) / "summary.json").read_text())
    summary.show({**report, "model": "m", "method": "fastv", "warnings": []}, tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{no_op.MARK}: no effect, the dense model's numbers (fastv on quiz): every visual token" in printed
    assert f"{no_op.MARK} no effect in 1 of 1: quiz" in printed and "100% x 2" in printed
