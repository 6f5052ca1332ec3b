"""The query rows of a prompt: where they stand, which words they read, and when they are refreshed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from accelerate_methods.engine.devices import moved
from accelerate_methods.ops.select import on_device
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.architectures.flashsloth.modules import EmbeddedQuery
from llava.model.splice import Prompts, Spliced


@dataclasses.dataclass(frozen=True)
class QueryGroup:
    """The queries of one turn.

    Attributes:
        sample: its prompt; start: row of the first query in the (padded) prompt.
        words: (first, end) rows of the question that they read.
    """

    sample: int
    start: int
    words: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class QueryUpdate:
    """What happens to the queries in front of decoder layer ``layer`` (``engine.prompt.RowUpdate``).

    Attributes:
        module: refreshes them; count: queries of a group.
        image: [S, N, D] features of the images of each prompt, zeros where it has fewer; mask: [S, N] 0 there, or None.
        of: which of the S each group reads.
    """

    module: EmbeddedQuery
    layer: int
    count: int
    groups: Sequence[QueryGroup]
    image: Tensor
    mask: Tensor | None
    of: Sequence[int]

    def __call__(self, hidden: Tensor, kept: Tensor | None) -> Tensor:
        device = hidden.device
        longest = max(end - first for first, end in (group.words for group in self.groups))
        starts = [[group.sample, group.start, *group.words] for group in self.groups]
        sample, start, first, end = on_device(starts, device)[..., None].unbind(1)
        queries = start + torch.arange(self.count, device=device)
        words = first + torch.arange(longest, device=device)
        real = words < end
        words = torch.where(real, words, first)
        if kept is not None:
            queries, _ = _now_at(queries, kept[sample[:, 0]])
            words, here = _now_at(words, kept[sample[:, 0]])
            real = real & here
        text = hidden[sample, words] * real[..., None]
        given = moved((self.image, self.mask, on_device(list(self.of), device)), device)
        image, mask, of = given
        fresh = self.module(hidden[sample, queries], image, text, real, mask, of)
        return hidden.index_put((sample, queries), moved(fresh, device).to(hidden.dtype))

    def expanded(self, times: int) -> QueryUpdate:
        groups = [
            dataclasses.replace(group, sample=group.sample * times + copy)
            for group in self.groups
            for copy in range(times)
        ]
        return dataclasses.replace(self, groups=groups, of=[number for number in self.of for _ in range(times)])


def _now_at(rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows [G, R] of the prompt are among those that are left, ``kept`` [G, q], and whether they are there."""
    same = kept[:, None] == rows[..., None]
    return same.int().argmax(-1), same.any(-1)


# -- in the ids --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QueryIds:
    """A batch of ids with a row for each query.

    Attributes:
        input_ids, attention_mask, labels: as given, with the query's id repeated; [B, m], padded on the right.
        groups: (sample, index of the first) of every group, by sample and then by place.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor | None
    groups: list[tuple[int, int]]


def with_query_ids(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, query: int, count: int
) -> QueryIds:
    """The ids with ``count`` times the id ``query`` where it stands once, in prompts that hold an image.

    Reads the ids from the device once.
    """
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    ids, keep = torch.stack([input_ids, keep.to(input_ids)]).cpu()
    keep = keep.bool()
    shown = ((ids == IMAGE_TOKEN_INDEX) & keep).any(1, keepdim=True)
    asks = (ids == query) & keep & shown
    if not asks.any():
        return QueryIds(input_ids, attention_mask, labels, [])
    times = torch.where(asks, count, 1) * keep
    lengths = times.sum(1, keepdim=True)
    real = torch.arange(int(lengths.max())) < lengths
    source = torch.zeros(real.shape, dtype=torch.long)
    source[real] = torch.arange(ids.numel()).repeat_interleave(times.flatten())
    starts = times.cumsum(1) - times
    groups = [(sample, int(starts[sample, at])) for sample, at in asks.nonzero().tolist()]
    repeated, source = asks.flatten()[source], on_device(source, input_ids.device)
    if labels is not None:
        own = labels.flatten()[source.to(labels.device)]
        labels = own.masked_fill(on_device(repeated, labels.device), IGNORE_INDEX)
    return QueryIds(input_ids.flatten()[source], on_device(real, input_ids.device), labels, groups)


def query_groups(spliced: Spliced, prompts: Prompts, starts: Sequence[Sequence[int]], count: int) -> list[QueryGroup]:
    """Where the queries stand once images have taken the place of their placeholders.

    The question of the first group of a prompt goes from behind the line break after the image to the queries; without
    labels every group of the prompt reads that one, as released. With labels (training) a later group reads the rows
    from the third behind the answer before it. Groups that a cut took are left out.

    Args:
        starts: (sample, index) of the groups in the ids.
    """
    holes = prompts.on_host[0]
    targets = spliced.labels.cpu() if prompts.labels is not None else None
    length = spliced.mask.shape[1]
    found: list[QueryGroup] = []
    for sample, index in starts:
        places = holes[sample].nonzero().squeeze(1).tolist()
        spans = spliced.spans[sample]
        if len(spans) < len(places):  # the prompt was cut
            places = places[: len(spans)]
        before = [span for place, span in zip(places, spans, strict=True) if place < index]
        offset = spans[0].start - places[0] if spans else 0
        row = index + offset + sum(span.length - 1 for span in before)
        if row + count > length:
            continue
        earlier = [group for group in found if group.sample == sample]
        if not earlier:
            words = (min(before[-1].end + 1, row) if before else offset, row)
        elif targets is None:
            words = earlier[0].words
        else:
            answered = (targets[sample, :row] != IGNORE_INDEX).nonzero()
            words = (min(int(answered[-1]) + 3, row), row) if len(answered) else earlier[0].words
        found.append(QueryGroup(sample, row, words))
    return found


def padded_features(features: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[S, N, D] of features [n, D] of different length, and which are real, [S, N]; None where all are."""
    lengths = [len(part) for part in features]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.stack(list(features)), None
    image = torch.stack([functional.pad(part, (0, 0, 0, longest - len(part))) for part in features])
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return image, on_device(real, image.device)


def update_of(
    spliced: Spliced, groups: Sequence[QueryGroup], features: Sequence[Tensor], owners: Sequence[int], **how: Any
) -> QueryUpdate | None:
    """The update of a batch; None where no prompt has queries.

    Args:
        features: [n, D] of every image; owners: the prompt of each. ``how``: ``module``, ``layer``, ``count``.
    """
    if not groups:
        return None
    samples = sorted({group.sample for group in groups})
    of_sample = [torch.cat([part for part, owner in zip(features, owners, strict=True) if owner == s]) for s in samples]
    image, mask = padded_features(of_sample)
    of = [samples.index(group.sample) for group in groups]
    return QueryUpdate(groups=list(groups), image=image, mask=mask, of=of, **how)
