"""VQA accuracy: cases by hand, and word for word as lmms-eval's copy of the reference where that is installed."""

import random

import pytest

from llava.eval.m4c_evaluator import EvalAIAnswerProcessor, TextVQAAccuracyEvaluator


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("The  Dog.", "dog"), ("two", "2"), ("None", "0"), ("dont", "don't"), ("couldn'tve", "couldn't've"),
     ("1,000", "1000"), ("3.5", "3.5"), ("red/blue", "red blue"), ("red - blue", "red blue"), ("lets", "lets"),
     ("it's\n", "it 's"), ("", "")],
)  # fmt: skip
def test_answers(text, wanted):
    assert EvalAIAnswerProcessor()(text) == wanted


def test_answers_as_the_reference():
    reference = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor
    words = [*reference.CONTRACTIONS, *reference.CONTRACTIONS.values(), *reference.NUMBER_MAP, *reference.ARTICLES]
    words += [*reference.PUNCTUATIONS, "1,000", "3.5", "3.", "U.S.A", "x-y", "'", "\n", "\t", ". .", "$5.00", "it's"]
    draw, ours, theirs = random.Random(0), EvalAIAnswerProcessor(), reference()
    for _ in range(5000):
        text = "".join(draw.choice(words) + draw.choice(["", " ", ","]) for _ in range(draw.randint(0, 5)))
        assert ours(text) == theirs(text), text


def test_accuracy():
    people = ["red"] * 2 + ["Blue."] * 8
    evaluate = TextVQAAccuracyEvaluator().eval_pred_list
    assert evaluate([{"pred_answer": "blue", "gt_answers": people}]) == 1
    # of two people who say so: each of them has 1 other, each of the eight has 2
    assert evaluate([{"pred_answer": "RED", "gt_answers": people}]) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert evaluate([{"pred_answer": "blue", "gt_answers": people}, {"pred_answer": "x", "gt_answers": people}]) == 0.5
    with pytest.raises(ValueError, match="over 10 answers"):
        evaluate([{"pred_answer": "x", "gt_answers": ["x"]}])
    with pytest.raises(ValueError, match="no predictions"):
        evaluate([])
