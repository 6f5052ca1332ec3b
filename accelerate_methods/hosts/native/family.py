"""What a native host has to know of one model family."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.devices import computes_on
from accelerate_methods.engine.encoder_attention import Encoded
from accelerate_methods.engine.layers import DecoderLayers
from accelerate_methods.hosts.native.prompt import HostSide, PromptItem
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.hosts.text_tower import TextTower, text_tower_of
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry.families import ModelFamily
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.encode import EncodeMethod
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.signals import IMAGE_TEXT
from accelerate_methods.stages.views import Views


@dataclasses.dataclass
class Seen:
    """One run of the vision side.

    Attributes:
        arguments: what ``get_image_features`` or ``get_video_features`` was called with.
        encoded: what the vision encoder's hook saw, run by run.
        kind: "image" or "video".
    """

    arguments: dict[str, Any]
    encoded: list[Any] = dataclasses.field(default_factory=list)
    kind: str = "image"


@dataclasses.dataclass
class Call:
    """One ``forward`` of a model with images or videos in its prompt.

    Attributes:
        ids: [B, L] the prompt, on the host.
        embeds: [B, L, D] the same with the visual features in place.
        seen: what the vision side did, by kind of item ("image", "video"); sizes and grids among its arguments are on
            the host.
        arguments: the model's keyword arguments.
        wanted: signals that are asked for.
        on_views: kinds of item that are compressed before the projector.
    """

    ids: Tensor
    embeds: Tensor
    seen: dict[str, Seen]
    arguments: dict[str, Any]
    wanted: frozenset[str]
    on_views: frozenset[str]


def read_prompt(
    seen: dict[str, Seen], ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, embeds: Tensor
) -> tuple[dict[str, Seen], HostSide]:
    """What the host has to know of a prompt [B, L, D]: ids, padding, and the sizes and grids of its images.

    One device read: the only one of a prompt without text inside its videos, but for what the methods read.
    """
    sizes = [
        (kind, name)
        for kind, run in seen.items()
        for name, value in run.arguments.items()
        if isinstance(value, Tensor) and not value.is_floating_point() and value.device == embeds.device
    ]
    host = HostSide.read(ids, mask, positions, embeds.shape[1], [seen[kind].arguments[name] for kind, name in sizes])
    found = {kind: dataclasses.replace(run, arguments=dict(run.arguments)) for kind, run in seen.items()}
    for (kind, name), value in zip(sizes, host.more, strict=True):
        found[kind].arguments[name] = value
    return found, host


@contextlib.contextmanager
def expected(module: nn.Module) -> Iterator[None]:
    """Block that looks at parts of ``module``; :class:`MethodError` if one is not there."""
    try:
        yield
    except (AttributeError, IndexError) as error:
        raise MethodError(
            f"{type(module).__name__} is not built as this host expects ({error}); this version of transformers is "
            "not supported."
        ) from error


class Family(ABC):
    """One model of one family; made when something is attached to it.

    Raises:
        MethodError: (constructor) the model is not built as expected.
    """

    #: what the family declares; methods that act on none of its modalities are refused
    about: ModelFamily
    #: kinds of item that can be compressed before the projector
    views: frozenset[str] = frozenset()
    #: why this model gives no more signals, a sentence for errors
    signal_limits: str = ""
    #: gives the signals that compare images with text
    text_tower: TextTower | None = None

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        with expected(model):
            self.language: nn.Module = model.model.language_model
            for name in ("layers", "rotary_emb", "embed_tokens"):
                getattr(self.language, name)
            DecoderLayers(self.language).final_norm  # noqa: B018

    def check_attention(self) -> None:
        """Raise :class:`MethodError` unless attention of the decoder can be computed anew for some rows."""
        with expected(self.model):
            DecoderLayers(self.language).check_attention()

    @property
    @abstractmethod
    def signals(self) -> frozenset[str]:
        """Signals that this model can give."""

    def prepare(self, wanted: frozenset[str]) -> None:  # noqa: B027 (most need nothing)
        """Load what these signals need beside the model."""

    def text_tower_name(self, pipeline: Pipeline) -> str | None:
        """Where a text tower for this model's vision tower is to be had, None if there is none."""
        return None

    def available(self, pipeline: Pipeline) -> frozenset[str]:
        """All signals that this model can give to these methods."""
        return self.signals if self.text_tower_name(pipeline) is None else self.signals | IMAGE_TEXT

    def prepare_text(self, wanted: frozenset[str], pipeline: Pipeline) -> None:
        """Load it, if signals that it gives are wanted."""
        name = self.text_tower_name(pipeline) if wanted & IMAGE_TEXT else None
        if name is not None:
            tower = self.model.model.vision_tower
            text = text_tower_of(self.model, name, tower.config.hidden_size, pipeline.name)
            self.text_tower = text.on_device(computes_on(tower), tower.dtype)

    def added(self, kwargs: dict[str, Any]) -> list[Tensor]:
        """[B, L, D] each, what the model adds to the output of its first decoder layers (deepstack)."""
        return []

    @abstractmethod
    def watch(self, seen: Any) -> list[Any]:
        """Hook the vision encoder: ``seen(encoded)`` after every run. Returns the hooks' handles."""

    def take_over(self, method: EncodeMethod, wrappers: Wrappers, seen: Any, seeing: Any) -> None:
        """Run the vision encoder under an encode method, in place of :meth:`watch`; ``seeing()`` is the :class:`Seen`
        of the run that is going on."""
        raise MethodError(f"{method.name} acts inside the vision encoder, which {self.about.name} does not offer.")

    @abstractmethod
    def items(self, call: Call) -> list[PromptItem]:
        """The images and videos of the prompt, those of one sample in the order in which they stand."""

    def project(self, tokens: Tensor) -> Tensor:
        """[K, M] features of views -> [K, D]."""
        raise NotImplementedError


@dataclasses.dataclass
class ItemRows:
    """Where one image or video stands in the batch.

    Attributes:
        number: its number among what the vision side saw (in a beam search, prompts share their images).
        sample: row of the batch; rows: [n] its rows of the prompt; start, end: the first of them, and behind the last.
    """

    number: int
    sample: int
    rows: Tensor
    start: int
    end: int


def locate_items(
    ids: Tensor, token: int, lengths: Sequence[int], kind: str, device: torch.device | None = None
) -> list[ItemRows]:
    """Where the items of one kind stand: their ``token`` placeholders in ``ids`` [B, L], item after item.

    Args:
        ids: on the host (:class:`Call`); others are read from their device, and the rows are there if ``device`` says
            nothing else.
        lengths: rows of every item that the vision side saw, in the order of the prompts.

    Raises:
        MethodError: not as many placeholders as the items have rows.
    """
    if not lengths:
        return []
    device = ids.device if device is None else device
    ids = ids.cpu()
    where = (ids == token).nonzero()
    copies, rest = divmod(len(where), sum(lengths))
    numbers = [list(range(len(lengths)))]
    if copies > 1 and not rest:  # prompts repeated for beams, one behind the other
        owners = _owners(ids[::copies], token, lengths)
        numbers = [[n for n in numbers[0] if owners[n] == sample] for sample in range(len(ids) // copies)]
    elif copies != 1 or rest:
        raise MethodError(
            f"the prompt holds {len(where)} {kind} placeholders, but the {kind}s have {sum(lengths)} tokens: the "
            "inputs were made by another processor, or this version of transformers lays tokens out differently."
        )
    order = [number for own in numbers for _ in range(copies) for number in own]
    sizes = [lengths[number] for number in order]
    ends = list(itertools.accumulate(sizes))
    edges = where[[edge for end, size in zip(ends, sizes, strict=True) for edge in (end - size, end - 1)]].tolist()
    rows = on_device(where[:, 1].contiguous(), device).split(sizes)
    return [
        ItemRows(number, first[0], part, first[1], last[1] + 1)
        for number, first, last, part in zip(order, edges[::2], edges[1::2], rows, strict=True)
    ]


def _owners(ids: Tensor, token: int, lengths: Sequence[int]) -> list[int]:
    """Sample of each item."""
    where = (ids == token).nonzero()[:, 0]
    return where[[0, *itertools.accumulate(lengths[:-1])]].tolist()


def views_of(
    encoded: Encoded, signals: dict[str, Tensor], grid: tuple[int, int], tiles: Any, uncompressed: Any, project: Any
) -> Views:
    """An image as its encoder saw it."""
    return Views(
        features=encoded.patches,
        special=encoded.special,
        grid=grid,
        tiles=tiles,
        signals=signals,
        uncompressed=uncompressed,
        project=project,
    )
