"""Tokenizers of LLaVA checkpoints, free of the guesses that `AutoTokenizer` makes.

Why not `AutoTokenizer`: the folders say model_type "llava", for which transformers 5 returns a generic backend that
drops the leading word-boundary piece of LLaMA; and its SentencePiece loading parses a protobuf, which fails when the
protobuf runtime is older than the one that sentencepiece was built with. Here SentencePiece itself reads
tokenizer.model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from transformers import (
    GPT2Tokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from accelerate_methods.hosts.checkpoint_files import CheckpointError, find_file, read_json
from accelerate_methods.stages.errors import one_line

WORD_BOUNDARY = "\u2581"  # SentencePiece writes a space as this character
SENTENCEPIECE_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
BPE_FILES = ("vocab.json", "merges.txt")
# ModelProto.normalizer_spec (field 3) { add_dummy_prefix (field 3) = false }. A message field that occurs again is
# merged into the first one, so these bytes after a model switch the prefix off, without the protobuf package and on
# every release of sentencepiece (0.2.3 took away the method that did it).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceLlamaTokenizer(PreTrainedTokenizer):
    """The slow LLaMA tokenizer over a SentencePiece BPE model with byte fallback.

    Rule for a non-empty text with `legacy=False`: prefix one word boundary, split at the special and added tokens,
    drop the prefix if it stands alone right before a special token, encode every piece with SentencePiece (its own
    dummy prefix switched off), and put BOS in front. With `legacy=True` every piece between special tokens gets its
    own word boundary.

    Args:
        vocab_file: path of tokenizer.model.
        legacy: which of the two rules; LLaVA-1.5 and 1.6 (Vicuna) say False in tokenizer_config.json.
        add_bos_token, add_eos_token: special tokens put around a sequence.
        pad_token: LLaVA pads with "<unk>"; None leaves the tokenizer without padding.
    Raises:
        OSError: vocab_file is missing. RuntimeError: it is not a SentencePiece model.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": SENTENCEPIECE_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_file = str(vocab_file)
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.legacy = legacy
        self._load_model(Path(vocab_file).read_bytes())
        # AutoTokenizer's keys for other code paths; they must not reach the base class under another meaning.
        for name in ("sp_model_kwargs", "use_fast", "backend", "tokenizer_file"):
            kwargs.pop(name, None)
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            legacy=legacy,
            clean_up_tokenization_spaces=kwargs.pop("clean_up_tokenization_spaces", False),
            **kwargs,
        )

    def _load_model(self, model_proto: bytes) -> None:
        self._model_proto = model_proto
        # We place the word boundary ourselves: SentencePiece would put one before every piece between special tokens.
        self.sp_model = sentencepiece.SentencePieceProcessor(model_proto=model_proto + _NO_DUMMY_PREFIX)
        self._pieces = [self.sp_model.id_to_piece(i) for i in range(self.sp_model.get_piece_size())]
        self._base_vocab = {piece: i for i, piece in enumerate(self._pieces)}

    # The model travels as bytes and is built again, whatever the installed SentencePiece knows of pickling.
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("sp_model", "_pieces", "_base_vocab")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_model(state["_model_proto"])

    @property
    def vocab_size(self) -> int:
        """Number of pieces in tokenizer.model, without added tokens (`len()` counts those too)."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        """Piece to id, added tokens included."""
        return {**self._base_vocab, **self._added_tokens_encoder}

    # -- text to ids ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split a text into pieces, without BOS/EOS (`prepare_for_model` of the base class adds those)."""
        if not text:
            return []
        if not self.legacy:
            text = WORD_BOUNDARY + text.replace(WORD_BOUNDARY, " ")
        pieces = super().tokenize(text, **kwargs)
        if not self.legacy and pieces[0] == WORD_BOUNDARY and len(pieces) > 1 and pieces[1] in self.all_special_tokens:
            pieces = pieces[1:]
        return pieces

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.encode(WORD_BOUNDARY + text if self.legacy else text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self._base_vocab.get(token, self.sp_model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._pieces):
            raise IndexError(f"token id {index} is outside the vocabulary of {len(self)} tokens")
        return self._pieces[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put BOS and/or EOS around one or two sequences."""
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        second = bos + token_ids_1 + eos if token_ids_1 is not None else []
        return bos + token_ids_0 + eos + second

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 where `build_inputs_with_special_tokens` puts a special token, 0 elsewhere."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        bos, eos = [1] * self.add_bos_token, [1] * self.add_eos_token
        second = bos + [0] * len(token_ids_1) + eos if token_ids_1 is not None else []
        return bos + [0] * len(token_ids_0) + eos + second

    # -- ids to text ---------------------------------------------------------------------------------------------------

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Join pieces to text; the word boundary that encoding put in front of the first piece is taken off again."""
        tokens = list(tokens)
        if tokens and tokens[0].startswith(WORD_BOUNDARY):
            tokens[0] = tokens[0][len(WORD_BOUNDARY) :]
        literal = set(self.all_special_tokens) | set(self._added_tokens_encoder)
        text, run = [], []
        for token in tokens:
            if token in literal:  # SentencePiece would print control pieces as nothing and unknown ones as " ?? "
                text += [self.sp_model.decode(run), token]
                run = []
            else:
                run.append(token)
        return "".join([*text, self.sp_model.decode(run)])

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write tokenizer.model, byte for byte the file it was loaded from."""
        name = f"{filename_prefix}-{SENTENCEPIECE_FILE}" if filename_prefix else SENTENCEPIECE_FILE
        path = Path(save_directory) / name
        path.write_bytes(self._model_proto)
        return (str(path),)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write a folder that this class and the official code (which knows `LlamaTokenizer`) both load."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        config_file = Path(save_directory) / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        # The base class drops the two flags, and a reload would bring their defaults back.
        config["tokenizer_class"] = "LlamaTokenizer"
        config.update(add_bos_token=self.add_bos_token, add_eos_token=self.add_eos_token)
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files


def _read_json(model_path: str, name: str) -> dict[str, Any]:
    path = find_file(model_path, name)
    return read_json(path) if path else {}


def added_tokens(model_path: str | os.PathLike[str]) -> dict[str, int]:
    """Tokens that were added to the vocabulary of a checkpoint, with their ids; empty where its files name none.

    Raises:
        CheckpointError: a file cannot be reached or read.
    """
    model_path = os.fspath(model_path)
    listed = dict(_read_json(model_path, "added_tokens.json"))
    decoder = _read_json(model_path, "tokenizer_config.json").get("added_tokens_decoder") or {}
    listed.update({token["content"]: int(number) for number, token in decoder.items()})
    if not listed:
        more = _read_json(model_path, FAST_FILE).get("added_tokens") or []
        listed.update({token["content"]: int(token["id"]) for token in more})
    return listed


def load_tokenizer(model_path: str | os.PathLike[str], config: Any = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a LLaVA-format checkpoint was trained with, chosen by the files that are there.

    tokenizer.model (LLaMA, Vicuna, Mistral, Yi) -> `SentencePieceLlamaTokenizer`; vocab.json + merges.txt of a Qwen2
    model, with or without tokenizer.json -> `Qwen2Tokenizer`; those of a Phi-2 model without it -> `GPT2Tokenizer`; any
    other tokenizer.json -> the generic fast tokenizer, which runs the file as it is.

    Args:
        model_path: folder or hub id.
        config: model config; its tokenizer_padding_side and tokenizer_model_max_length stand in for what
            tokenizer_config.json leaves out.
    Raises:
        FileNotFoundError: none of these files is there; the message lists what was looked for.
        CheckpointError: a file cannot be reached or read.
    """
    model_path = os.fspath(model_path)
    settings = _read_json(model_path, "tokenizer_config.json")
    fallback: dict[str, Any] = {}
    for own, theirs in (("padding_side", "tokenizer_padding_side"), ("model_max_length", "tokenizer_model_max_length")):
        value = getattr(config, theirs, None)
        if value is not None and own not in settings:
            fallback[own] = value

    if (pieces := find_file(model_path, SENTENCEPIECE_FILE)) is not None:
        special = _read_json(model_path, "special_tokens_map.json")
        if settings.get("pad_token") is None and special.get("pad_token") is not None:
            pad = special["pad_token"]
            fallback["pad_token"] = pad["content"] if isinstance(pad, dict) else pad
        # An absent "legacy" means the old rule: the flag was introduced together with the new one.
        legacy = settings.get("legacy", True)
        try:
            return SentencePieceLlamaTokenizer.from_pretrained(model_path, legacy=legacy, **fallback)
        except RuntimeError as error:  # of sentencepiece, or of transformers when it tries other formats
            raise CheckpointError(f"cannot read {pieces}: {one_line(error)}") from error

    has_fast = find_file(model_path, FAST_FILE) is not None
    has_bpe = all(find_file(model_path, name) for name in BPE_FILES)
    named = settings.get("tokenizer_class") or ""
    if has_bpe and not has_fast and named.startswith(("GPT2", "CodeGen")):  # Phi-2; splits words as GPT-2 does
        return GPT2Tokenizer.from_pretrained(model_path, **fallback)
    if has_bpe and (not has_fast or named.startswith("Qwen2")):
        return Qwen2Tokenizer.from_pretrained(model_path, **fallback)
    if has_fast:
        return PreTrainedTokenizerFast.from_pretrained(model_path, **fallback)
    raise FileNotFoundError(
        f"no tokenizer in {model_path}: looked for {SENTENCEPIECE_FILE} (LLaMA, Mistral), {FAST_FILE} (Qwen2 and "
        f"others) and {' + '.join(BPE_FILES)} (Qwen2)"
    )
