"""TextVQA's and VizWiz's accuracy of short answers, under the official names (they come from MMF's M4C evaluator).

The rules are those of the VQA evaluation (visualqa.org/evaluation.html): texts are normalised, and an answer counts as
far as three of the other nine people gave it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_COUNTS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_FREE_PERIOD = re.compile(r"\.(?!\d)")
#: words that get back an apostrophe that an answer leaves out
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, sign in enumerate(word)
    if sign == "'"
} | {"somebody'd": "somebodyd"}  # the reference's own slip


class EvalAIAnswerProcessor:
    """Normalises an answer: lower case, no articles and punctuation, digits for number words, full contractions."""

    def __call__(self, item: str) -> str:
        text = item.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
        text = self._without_punctuation(re.sub(r"[\n\t]", " ", text).strip())
        words = (_NUMBERS.get(word, word) for word in text.split())
        return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)

    @staticmethod
    def _without_punctuation(text: str) -> str:
        """A sign beside a space goes; one between two words becomes a space."""
        numbers = _COMMA_IN_NUMBER.search(text) is not None
        out = text
        for sign in _PUNCTUATION:
            alone = numbers or f"{sign} " in text or f" {sign}" in text
            out = out.replace(sign, "" if alone else " ")
        return _FREE_PERIOD.sub("", out)


class TextVQAAccuracyEvaluator:
    """Mean accuracy of answers that ten people have answered too."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[dict[str, Any]]) -> float:
        """Accuracy in 0..1.

        Args:
            pred_list: ``{"pred_answer": text, "gt_answers": ten texts}`` each.
        Raises:
            ValueError: no answers, or not ten texts beside one.
        """
        if not pred_list:
            raise ValueError("no predictions to evaluate")
        return sum(self._score(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list) / len(pred_list)

    def _score(self, answer: str, people: Sequence[str]) -> float:
        if len(people) != 10:
            raise ValueError(f"the accuracy is defined over 10 answers of people, got {len(people)}")
        same = [self.answer_processor(text) for text in people].count(self.answer_processor(answer))
        # mean over the ten people of min(1, how many of the nine others agree / 3)
        others = [same - 1] * same + [same] * (10 - same) if same else []
        return sum(min(1.0, count / 3) for count in others) / 10
