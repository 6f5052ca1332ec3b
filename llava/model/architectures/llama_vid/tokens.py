"""What LLaMA-VID gives the language model of an image: one token for the question, and pooled patches.

Follows `vlm_attention` and `token_generation` of `dvlab-research/LLaMA-VID@b3d3ae2b`, `llamavid_arch.py` (section 3
of arXiv 2311.17043; the key projection, the scaling and the softmax in front of the mean are the code's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertTokenizer

from accelerate_methods.hosts.checkpoint_files import CheckpointError, find_file, read_json

BERT = "bert-base-uncased"
#: ids of a question that the Q-Former reads; of a longer one the end
MOST_IDS = 256
#: rows of the word table beyond BERT's vocabulary: the token [DEC]
MORE_WORDS = 1


def content_cells(compress_type: str | None, patches: int) -> int:
    """How many content tokens an image of ``patches`` patches has.

    Raises:
        CheckpointError: ``compress_type`` says something else than "mean", "grid:N" or nothing.
    """
    if compress_type is None:
        return patches
    if "grid" in compress_type:
        side = math.isqrt(patches)
        kernel = _kernel(compress_type, side)
        return ((side - kernel) // kernel + 1) ** 2
    if "mean" in compress_type:
        return 1
    raise CheckpointError(f"compress_type {compress_type!r} is not known; allowed: mean, grid:N, or none for all.")


def _kernel(compress_type: str, side: int) -> int:
    """Edge of the cells of "grid:N" in patches."""
    text = compress_type.partition("grid:")[2]
    if not text.isdigit() or not 1 <= int(text) <= side:
        raise CheckpointError(f"compress_type {compress_type!r}: grid:N needs a number from 1 to {side}.")
    return side // int(text)


def pooled(patches: Tensor, compress_type: str | None) -> Tensor:
    """[B, N, C] patches of square views -> [B, n, C] content, before the projector."""
    if compress_type is None:
        return patches
    if "grid" not in compress_type:
        content_cells(compress_type, patches.shape[1])
        return patches.mean(1, keepdim=True)
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"compress_type {compress_type!r} needs the patches of square views, got {patches.shape[1]}.")
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    return functional.avg_pool2d(maps, _kernel(compress_type, side)).flatten(2).transpose(1, 2)


def context_token(text_q: Tensor, keys: Tensor, patches: Tensor) -> Tensor:
    """[B, 1, C] what the queries read of the patches, as they are, averaged over the queries.

    Args:
        text_q: [B, Q, C]; keys: [B, N, C] projected patches; patches: [B, N, C].
    """
    return functional.scaled_dot_product_attention(text_q, keys, patches).mean(1, keepdim=True)


def patches_of(features: Tensor) -> Tensor:
    """[B, N, C] without the CLS token, which is there where the number of rows is odd."""
    return features[:, 1:] if features.shape[1] % 2 else features


# -- the question ------------------------------------------------------------------------------------------------------


def bert_folder(config: Any) -> str:
    """Where BERT's vocabulary and config are: ``config.bert_folder``, inside the checkpoint, or on the hub."""
    own = getattr(config, "bert_folder", None)
    if own is not None:
        return own
    path = config.name_or_path
    inside = Path(path) / BERT if path else None
    return str(inside) if inside is not None and (inside / "vocab.txt").is_file() else BERT


def bert_config(config: Any) -> BertConfig:
    """The Q-Former's BERT: its folder's config, BERT-base where there is none; "bert_type:n" keeps n layers."""
    folder = Path(bert_folder(config))
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    bert = BertConfig.from_dict(settings) if settings else BertConfig()
    layers = str(config.bert_type).partition(":")[2]
    if layers:
        if not layers.isdigit() or not 1 <= int(layers) <= bert.num_hidden_layers:
            raise CheckpointError(
                f"bert_type {config.bert_type!r}: the number of layers must be 1 to {bert.num_hidden_layers}."
            )
        bert.num_hidden_layers = int(layers)
    return bert


def find_vocabulary(folder: str) -> Path:
    """BERT's vocab.txt in a folder or on the hub, where its repository has two names.

    Raises:
        CheckpointError: it is not there.
    """
    reason = f"{folder!r} has no vocab.txt."
    for name in (folder, f"google-bert/{BERT}") if folder == BERT else (folder,):
        try:
            found = find_file(name, "vocab.txt")
        except CheckpointError as error:
            reason = str(error)
            continue
        if found is not None:
            return found
    raise CheckpointError(f"LLaMA-VID reads the question with BERT's vocabulary: {reason}")


class QuestionTokenizer:
    """BERT's tokenizer with the rules of the official code: [CLS] question [SEP], of long questions the end.

    Raises:
        CheckpointError: no vocabulary.
    """

    def __init__(self, folder: str):
        vocabulary = find_vocabulary(folder)
        self._tokenizer = BertTokenizer.from_pretrained(
            vocabulary.parent, do_lower_case=True, truncation_side="left", padding_side="right", bos_token="[DEC]"
        )

    def __call__(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B, T] and mask [B, T], padded to the longest."""
        how = {"padding": "longest", "truncation": True, "max_length": MOST_IDS, "return_tensors": "pt"}
        out = self._tokenizer(list(questions), **how)
        return out.input_ids, out.attention_mask


def made_up_words(questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """As many ids as a question has words, and two, in place of a :class:`QuestionTokenizer`'s; for the bench."""
    count = 2 + max(len(question.split()) for question in questions)
    ids = torch.arange(count).expand(len(questions), -1)
    return ids, torch.ones_like(ids)


class TextGuide(nn.Module):
    """A container under the official name: ``vlm_att_encoder.bert``."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert
