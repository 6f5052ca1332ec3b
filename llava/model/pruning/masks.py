"""Which weights of a matrix become zero: by magnitude, by Wanda's score, or as SparseGPT reconstructs; tensors only.

A *pattern* says what is chosen: single weights ("unstructured"), n of every m neighbours of a row that stay ("2:4"), or
whole columns ("columns"), which are the inputs of the matrix. Of equal scores the weight with the lower index stays, so
that pruning twice changes nothing.

Sources: Wanda (arXiv 2306.11695, locuslab/wanda), SparseGPT (arXiv 2301.00774, IST-DASLab/sparsegpt); written from the
papers.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from accelerate_methods.ops.select import top_mask
from accelerate_methods.stages.errors import MethodError

METHODS = ("magnitude", "wanda", "sparsegpt")
_BLOCK = 128  # columns that SparseGPT goes through before it corrects the others


def check_pattern(pattern: str, ratio: float) -> None:
    """
    Raises:
        MethodError: no such pattern, or one that cannot have this ratio.
    """
    if pattern in ("unstructured", "columns"):
        return
    kept, group = _of_group(pattern)
    if ratio not in (0, 1 - kept / group):
        raise MethodError(f"pattern {pattern} prunes {1 - kept / group:g} of a matrix or nothing, not {ratio:g}.")


def _of_group(pattern: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise MethodError(f"pattern {pattern!r}: unstructured, columns, or n:m such as 2:4 (n of m weights stay).")
    return int(found[1]), int(found[2])


def keep_mask(scores: Tensor, ratio: float, pattern: str = "unstructured", by_row: bool = False) -> Tensor:
    """[O, I] bool: the weights that stay.

    Args:
        scores: [O, I] float; higher stays.
        ratio: share of zeros, rounded to whole weights (columns).
        by_row: whether every row has its own share; otherwise the matrix as a whole. "unstructured" only.

    Raises:
        MethodError: as :func:`check_pattern`, or rows that are no multiple of the pattern's groups.
    """
    check_pattern(pattern, ratio)
    rows, columns = scores.shape
    if ratio == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if pattern == "columns":
        kept = columns - round(ratio * columns)
        return top_mask(scores.sum(0)[None], kept).expand(rows, -1)
    if pattern != "unstructured":
        kept, group = _of_group(pattern)
        if columns % group:
            raise MethodError(f"rows of {columns} weights are not made of groups of {group}, as {pattern} wants.")
        return top_mask(scores.reshape(-1, group), kept).view(rows, columns)
    if by_row:
        return top_mask(scores, columns - round(ratio * columns))
    return top_mask(scores.reshape(1, -1), scores.numel() - round(ratio * scores.numel())).view(rows, columns)


def pruned(
    weight: Tensor, ratio: float, method: str, pattern: str = "unstructured", inputs: Tensor | None = None
) -> Tensor:
    """[O, I] the matrix with about ``ratio`` of zeros, in the dtype of ``weight``.

    Args:
        inputs: what the matrix is multiplied with in the calibration: for "wanda" [I] mean squares of each input, for
            "sparsegpt" [I, I] mean products of inputs.
    """
    if ratio == 0:
        return weight.clone()
    values = weight.float()
    if method == "magnitude":
        kept = keep_mask(values.abs(), ratio, pattern)
    elif method == "wanda":
        kept = keep_mask(values.abs() * inputs.sqrt(), ratio, pattern, by_row=True)
    elif method == "sparsegpt":
        return reconstructed(values, ratio, pattern, inputs).to(weight.dtype)
    else:
        raise MethodError(f"pruning method {method!r} is none of {', '.join(METHODS)}.")
    return weight.masked_fill(~kept, 0)


def reconstructed(weight: Tensor, ratio: float, pattern: str, products: Tensor, damping: float = 0.01) -> Tensor:
    """SparseGPT: column after column, what a zero takes away is made up for by the columns behind it.

    Args:
        weight: [O, I] float32; products: [I, I] mean products of the inputs.
        damping: added to the diagonal, as a share of its mean.
    """
    check_pattern(pattern, ratio)
    weight, products = weight.clone(), products.float().clone()
    columns = weight.shape[1]
    diagonal = products.diagonal()
    unused = diagonal == 0  # inputs that were always zero say nothing
    weight[:, unused] = 0
    diagonal[unused] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    group = _BLOCK
    if pattern == "columns":
        fixed = keep_mask((weight / inverse.diagonal()).square(), ratio, pattern)
    elif pattern != "unstructured":
        group = _of_group(pattern)[1]
        group *= max(1, _BLOCK // group)
    zeros = 0
    for start in range(0, columns, group):
        block = slice(start, min(start + group, columns))
        here, part = weight[:, block], inverse[block, block]
        scores = (here / part.diagonal()).square()
        if pattern == "columns":
            kept = fixed[:, block]
        elif pattern == "unstructured":  # exactly the share of all columns up to here
            wanted = round(ratio * weight.shape[0] * block.stop) - zeros
            kept = top_mask(scores.reshape(1, -1), scores.numel() - wanted).view_as(scores)
            zeros += wanted
        else:
            kept = keep_mask(scores, ratio, pattern)
        errors = torch.zeros_like(here)
        for column in range(here.shape[1]):
            errors[:, column] = here[:, column].masked_fill(kept[:, column], 0) / part[column, column]
            here[:, column].masked_fill_(~kept[:, column], 0)
            here[:, column + 1 :] -= errors[:, column, None] * part[column, column + 1 :]
        weight[:, block.stop :] -= errors @ inverse[block, block.stop :]
    return weight
