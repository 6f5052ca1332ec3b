"""A tokenizer of few words for text towers of tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_SENTENCES = "what is it how many where who when colour of the ? ! are there in this picture video a cat dog"
_WORDS = _SENTENCES.split()


def tiny_text_tokenizer(folder: Path, begin: str | None = None, end: str = "</s>", size: int = 64) -> None:
    """Write one into ``folder``: words have ids from 3 on, ``end`` has the largest one, padding is 1, as SigLIP's.

    Args:
        begin: word in front of every text, None for no such word; end: behind it; size: of the vocabulary.
    """
    vocab = {"<zero>": 0, "<pad>": 1, "<unk>": 2}
    vocab |= {word: number for number, word in enumerate(_WORDS, 3)}
    if begin is not None:
        vocab[begin] = size - 2
    vocab[end] = size - 1
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, vocab[word]) for word in (begin, end) if word is not None]
    front = "" if begin is None else f"{begin} "
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{front}$A {end}", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=end)
    fast.save_pretrained(folder)
