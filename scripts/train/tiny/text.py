"""Tokenizer (Qwen2-style byte-level BPE, trained on the question corpus) and the qwen_1_5 prompt in token ids."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data import easy_vqa
from generator import corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "\n{}<|im_end|>\n<|im_start|>assistant\n"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 4096


def sentences() -> list[str]:
    """Everything the model is ever asked or answers, plus the words of the prompt."""
    lines = corpus()
    for row in easy_vqa("train"):
        for question, answer in row["qa"]:
            lines += [question, answer]
    lines = sorted(set(lines))
    for text in (BEFORE, AFTER):
        for special in SPECIALS:
            text = text.replace(special, "\v")
        lines += [part for part in text.replace("{}", "\v").split("\v") if part]
    return lines


def train_tokenizer() -> Tokenizer:
    """BPE whose merges turn every corpus word (with and without its leading space, as it occurs) into one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, vocab.json, merges.txt and the small JSON files of a Qwen2 checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    ids = {s: tokenizer.token_to_id(s) for s in SPECIALS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": s, **flags, "special": True} for s, i in ids.items()},
        "additional_special_tokens": SPECIALS[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIALS[2],
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": SPECIALS[0],
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    special_map = {
        "additional_special_tokens": SPECIALS[1:],
        "eos_token": {"content": SPECIALS[2], **flags},
        "pad_token": {"content": SPECIALS[0], **flags},
    }
    for name, value in (
        ("added_tokens.json", ids),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special_map),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


class Text:
    """Ids of prompt pieces: ``before`` the visual tokens, and question with answer after them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        self.size = len(self.tokenizer)
        self.end = self.tokenizer.convert_tokens_to_ids(SPECIALS[2])
        self.before = self.encode(BEFORE)
        self.mark = self.encode("is there?")[-1]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def ask(self, question: str) -> list[int]:
        return self.encode(AFTER.format(question))

    def reply(self, answer: str) -> list[int]:
        return [*self.encode(answer), self.end]


def main() -> None:
    parser = argparse.ArgumentParser(description="train and save the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    save_tokenizer(args.out)
    text = Text(args.out)
    words = {w for line in sentences() for w in line.replace("?", "").split()}
    for word in sorted(words):
        if len(text.encode(" " + word)) > 1:
            print("not one token:", repr(" " + word), text.tokenizer.tokenize(" " + word))
    print(
        "vocabulary",
        text.size,
        "| words",
        len(words),
        "|",
        text.tokenizer.tokenize(BEFORE + AFTER.format("is there a red circle?") + "top left"),
    )


if __name__ == "__main__":
    main()
