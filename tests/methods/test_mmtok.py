"""MMTok beyond its golden vectors."""

import pytest
import torch
from torch.nn import functional

import accelerate_methods
from accelerate_methods import MethodError, accelerate
from accelerate_methods.hosts.questions import word_ids
from accelerate_methods.mmtok import MMTok, coverage_of, keywords, padded_patches
from tests.support.items import make_item, make_views
from tests.support.native_models import expanded, native_model, tree_model


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_coverage_is_a_share_of_every_word_and_of_every_token():
    tokens, inner, text = drawn(2, 20, 8), drawn(2, 20, 6, seed=1), drawn(3, 8, seed=2)
    found = coverage_of(tokens, inner, text, 0.5, 0.02, 0.2)
    unit = functional.normalize(inner, dim=-1)
    words = functional.normalize(tokens, dim=-1) @ functional.normalize(text, dim=-1).T
    expected = torch.cat([(words / 0.02).softmax(1) / 3, 0.5 * (unit @ unit.mT / 0.2).softmax(1) / 20], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_rows_without_direction_count_for_nothing():
    """So the rows of a prompt that are no text change no pick."""
    tokens, text = drawn(1, 40, 8), drawn(4, 8, seed=1)
    padded = torch.cat([torch.zeros(2, 8), text, torch.full((1, 8), torch.nan)])
    method = accelerate_methods.get("mmtok")
    assert torch.equal(method._order(tokens, tokens, text, 9), method._order(tokens, tokens, padded, 9))


@pytest.mark.parametrize("text", [torch.zeros(0, 8), torch.zeros(3, 8)])
def test_without_a_word_the_view_alone_is_covered(text):
    tokens = drawn(1, 30, 8)
    tokens[0, 3], tokens[0, 5] = 0.0, torch.nan
    order = accelerate_methods.get("mmtok")._order(tokens, tokens, text, 30)
    assert order.sort(1).values.tolist() == [list(range(30))]


@pytest.mark.parametrize(
    ("size", "rows"), [((336, 24), {11, 12}), ((400, 400), set(range(24))), ((640, 427), set(range(4, 20)))]
)
def test_padding(size, rows):
    """A picture of 336 x 24 pixels touches two rows of patches; upright it is the same with columns."""
    left = ~padded_patches(size, (24, 24)).view(24, 24)
    assert {row for row, there in enumerate(left.any(1).tolist()) if there} == rows and left[min(rows)].all()
    assert torch.equal(padded_patches(size[::-1], (24, 24)).view(24, 24), ~left.T)


def test_padding_stays_only_where_nothing_else_is_left():
    """The release then repeats the first patch, which is padding."""
    views, _ = make_views(None, 5, True, "random", torch.float32, 0)
    views.size = (70, 14)
    order = accelerate_methods.get("mmtok", tokens_per_view=8).compress_views(views).info["order"][0]
    assert (order // 5 == 2)[:5].all() and len(order.unique()) == 8


@pytest.mark.parametrize(
    ("params", "each"),
    [({}, 64), ({"tokens_per_view": 999}, 576), ({"retention_ratio": 0.2}, 115), ({"retention_ratio": 1e-6}, 1)],
)
def test_budget(params, each):
    assert accelerate_methods.get("mmtok", **params).view_budget(576) == each


def test_encoder_tokens_are_compared_where_there_are_any():
    item = make_item("flat", 1, 5, "random", torch.float32, 0)
    method = accelerate_methods.get("mmtok", tokens_per_view=6)
    found = method.compress(item).info["order"]
    inner, text = item.signals.pop("encoder_tokens"), item.signals["question_rows"]
    assert torch.equal(found, method._order(item.features, inner, text, 6))
    assert torch.equal(method.compress(item).info["order"], method._order(item.features, item.features, text, 6))


def test_words():
    assert keywords("What is the man's shirt?") == "man s shirt"
    assert keywords("What is it?") == "What is it?" and keywords("") == ""
    assert MMTok(question="all").words("What is it?") == ["Question:", "What", "is", "it?"]


class Bytes:
    """A byte-level tokenizer."""

    bos_token_id = 7

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text.encode())}

    def convert_ids_to_tokens(self, ids):
        return [chr(id) for id in ids]


def test_words_of_a_byte_level_vocabulary_carry_no_blank():
    assert word_ids(["ab", "c"], Bytes()) == list(b"abc") and word_ids([], Bytes()) == [7]


IDS, PIXELS = torch.tensor([[5, -200, 8, 9]]), torch.zeros(1, 3, 336, 336)


def read_by(monkeypatch):
    """What the method is given for the question's words, request by request."""
    seen, before = [], MMTok._order
    monkeypatch.setattr(MMTok, "_order", lambda self, *rest: seen.append(rest[2]) or before(self, *rest))
    return seen


@pytest.mark.parametrize("make", [tree_model, native_model])
def test_a_model_reads_the_words_in_its_own_table(make, monkeypatch):
    model, seen, native = make("tiny-llava-1.5"), read_by(monkeypatch), make is native_model
    ids = expanded([5, 7, 8, 9], 7, 576) if native else IDS
    asked = {"pixel_values" if native else "images": PIXELS, "max_new_tokens": 1}
    with accelerate(model, "mmtok", tokenizer=Bytes()):
        model.generate(ids, **asked, questions=["what is a dog?"])
    with accelerate(model, "mmtok"), pytest.raises(MethodError, match="tokenizer"):
        model.generate(ids, **asked, questions=["what is a dog?"])
    with accelerate(model, "mmtok", tokenizer=Bytes(), question="prompt"):
        model.generate(ids, **asked)
    table = model.get_input_embeddings().weight
    words, prompt = seen
    assert torch.equal(words, table[list(b"dog")])
    text = ids[0] != (7 if native else -200)
    assert torch.equal(prompt[text], table[ids[0][text]]) and not prompt[~text].any()


@pytest.mark.parametrize("wrong", [{"tau_text": 0}, {"tau_vision": 0.0}, {"alpha": -1}, {"question": "none"}])
def test_refuses(wrong):
    with pytest.raises(MethodError, match="mmtok"):
        accelerate_methods.get("mmtok", **wrong)
