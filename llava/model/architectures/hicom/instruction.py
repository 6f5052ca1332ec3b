"""The instruction out of a question: what is asked, without options and without what is said about the answer."""

from __future__ import annotations

import re

from accelerate_methods.hosts.questions import plain_question

#: sentences before the question in prompts of multiple choice
_LEADS = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option.",
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.",
)
_FIRST_OPTION = re.compile(r"\n\s*(?:Options?:\s*)?(?:\(A\)|A[.):])\s.*?\n\s*(?:\(B\)|B[.):])\s", re.DOTALL)
_HEADING = re.compile(r"^\s*Question:\s*")


def instruction_in(text: str) -> str:
    """The bare question, as the official evaluations give it to the compressor.

    Lists of options from A on, what stands behind them, and known sentences around the question are no part of it; a
    text that is nothing but those stays as it is.
    """
    text = plain_question(text)
    found = text
    for lead in _LEADS:
        found = found.replace(lead, "")
    found = _HEADING.sub("", found)
    option = _FIRST_OPTION.search("\n" + found)
    if option is not None:
        found = ("\n" + found)[: option.start()]
    return found.strip() or text
