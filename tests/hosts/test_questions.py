"""What is asked: out of a prompt's text, out of its ids, by the caller."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, accelerate
from accelerate_methods.hosts.questions import mean_embedding, per_prompt, plain_question, question_in
from accelerate_methods.stages.compress import CompressMethod, selection
from tests.support.native_models import expanded, native_model, tree_model


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<image>\nWhat is it?\nAnswer the question using a single word or phrase.", "What is it?"),
        ("Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.",
         "Which?\nA. one\nB. two"),
        ("<image> <image>\nSame?", "Same?"),
        (["<image>\nfirst?", "an answer", "second?"], "second?"),
        (["first?", "an answer"], "first?"),
        ("", ""), ([], ""),
    ],
)  # fmt: skip
def test_the_plain_question_of_a_prompt(text, plain):
    assert plain_question(text) == plain


class Words:
    """A tokenizer whose ids are places in a list of words; those in brackets are special."""

    words: ClassVar[list[str]] = []

    def __init__(self, text):
        self.words = [*dict.fromkeys(text.split(" "))]
        self.all_special_ids = [i for i, word in enumerate(self.words) if word.startswith("[")]
        self.ids = torch.tensor([self.words.index(word) for word in text.split(" ")])
        self.visual = torch.tensor([word == "[image]" for word in text.split(" ")])

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("[bos] be nice USER: [image] [image] what is it? ASSISTANT:", "what is it?"),
        ("[start] system be nice [end] [start] user [open] [image] [close] what is it? [end] [start] assistant",
         "what is it?"),
        ("[start] user what is it? [open] [image] [close] [end] [start] assistant", "what is it?"),
        ("[start] user [image] first? [end] [start] assistant yes [end] [start] user second? [end] [start] assistant",
         "second?"),
        ("[start] user [image] [end]", ""),
    ],
)  # fmt: skip
def test_the_question_in_the_ids(prompt, question):
    words = Words(prompt)
    assert question_in(words.ids, words.visual, words) == question


def test_one_text_per_prompt():
    assert per_prompt(None, 3) is None
    assert per_prompt("a?", 1) == ["a?"] and per_prompt(["a?", "b?"], 4) == ["a?", "a?", "b?", "b?"]
    for wrong in (["a?"] * 2, [], [None], b"a?"):
        with pytest.raises(MethodError, match="one text per prompt"):
            per_prompt(wrong, 3)


def test_means_over_the_text_alone():
    embeds = torch.tensor([[[1.0], [float("nan")], [3.0]], [[5.0], [6.0], [7.0]]])
    text = torch.tensor([[True, False, True], [False] * 3])
    assert mean_embedding(embeds, text).tolist() == [[2.0], [0.0]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listening(CompressMethod):
    """Keeps as many tokens as the question has letters."""

    name: ClassVar[str] = "listening"
    needs_question: ClassVar[bool] = True

    def compress(self, item):
        return selection(item, torch.arange(len(item.question), device=item.features.device))


IDS = torch.tensor([[5, -200, 7, 8]])
PIXELS = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
TOKENIZER = SimpleNamespace(all_special_ids=[2], decode=lambda ids: "four"[: len(ids)])


def counts(requests):
    return [sample.visual_tokens_after for request in requests for sample in request.samples]


def test_the_caller_comes_before_the_tokenizer():
    model = tree_model("tiny-llava-1.5")
    asked = {"images": PIXELS, "max_new_tokens": 1}
    with accelerate(model, Listening(), tokenizer=TOKENIZER), accelerate_methods.record() as requests:
        model.generate(IDS, **asked)
        model.generate(IDS, **asked, questions=["seven??"])
    assert counts(requests) == [2, 7]


def test_native_models_read_their_own_ids():
    model = native_model("tiny-llava-1.5")
    ids = expanded([5, 7, 8, 9, 10], 7, 576)
    processor = SimpleNamespace(tokenizer=TOKENIZER)
    with accelerate(model, Listening(), tokenizer=processor), accelerate_methods.record() as requests:
        model.generate(ids, pixel_values=PIXELS, max_new_tokens=1)
        model.generate(ids, pixel_values=PIXELS, max_new_tokens=1, questions=["seven??"])
        model(input_ids=ids, pixel_values=PIXELS, questions="six???")
    assert counts(requests) == [3, 7, 6]


@pytest.mark.parametrize("make", [tree_model, native_model])
def test_who_does_not_say_what_is_asked_is_told(make):
    model = make("tiny-llava-1.5")
    native = make is native_model
    ids = expanded([5, 7, 8], 7, 576) if native else IDS
    asked = {"pixel_values" if native else "images": PIXELS}
    with accelerate(model, Listening()):
        with pytest.raises(MethodError, match=r"listening looks at the question.*questions="):
            model.generate(ids, **asked, max_new_tokens=1)
        with pytest.raises(MethodError, match=r"questions="):
            model(input_ids=ids, **asked)
        model.generate(torch.tensor([[5, 6, 8]]), max_new_tokens=1)  # nothing to look at
    if not native:  # a model without a method takes the argument and leaves it
        model.generate(ids, **asked, max_new_tokens=1, questions=["what?"])
