"""Encode methods in transformers' own vision encoders.

The model's code around the encoder's layers stays: it embeds the patches, calls the layers one after the other, and
merges, pools and projects what they give, which it takes to have as many patches as ever. So the first layer runs the
whole encoder under the method, and every layer hands on a full grid, on which each patch is a copy of the token that
holds it. What goes to the language model is then taken from the tokens themselves (:mod:`.llava`), or from the places
where they stand (:mod:`.qwen_vl`, :mod:`.internvl`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.hosts.layouts import shortened_item
from accelerate_methods.hosts.native.family import ItemRows
from accelerate_methods.hosts.native.prompt import PromptItem
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.ops.select import on_device, on_host, pick_rows
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.encode import PatchMap, TokenMap
from accelerate_methods.stages.frames import FrameMap
from accelerate_methods.stages.pixels import PixelCells, PixelMethod, check_choice

#: what each layer of the encoder gives, by its number; None: the layers run by themselves
Outputs = Callable[[int], Tensor] | None


class TakenOver:
    """The layers of one encoder, of which the first runs them all.

    Args:
        layers: of the encoder.
        run: from what the first was called with to what each of them gives.

    Attributes:
        forwards: the layers' own, in their order.
    """

    def __init__(self, wrappers: Wrappers, layers: Sequence[nn.Module], run: Callable[..., Outputs]):
        self._run = run
        #: of the run that is going on
        self._outputs: ContextVar[Outputs] = ContextVar("accelerate_encoder_outputs", default=None)
        self._last = len(layers) - 1
        self.forwards = [
            wrappers.wrap(layer, "forward", functools.partial(self._layer, number))
            for number, layer in enumerate(layers)
        ]

    def _layer(self, number: int, *args: Any, **kwargs: Any) -> Tensor:
        if number == 0:
            self._outputs.set(self._run(*args, **kwargs))
        outputs = self._outputs.get()
        if number == self._last:
            self._outputs.set(None)
        return self.forwards[number](*args, **kwargs) if outputs is None else outputs(number)


def layer_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The states that a layer of an encoder was called with."""
    return (args[0] if args else kwargs["hidden_states"]).detach()


@torch.no_grad()
def chosen(method: PixelMethod, cells: Sequence[PixelCells]) -> list[Tensor]:
    """[R, C] bool of each picture, on the host: the tokens that the method keeps; read from the device together."""
    masks = [method.choose(one) for one in cells]
    for mask, one in zip(masks, cells, strict=True):
        check_choice(method.name, mask, one)
    return on_host(masks)


def pruned_in_place(features: Tensor, kept: Tensor, at: ItemRows, grid: tuple[int, int]) -> PromptItem:
    """An image of which tokens are left where they stand, of each of its views as many as it likes.

    Args:
        features: [F, P, D] one for every place; kept: [F, P] bool, on the host.
    """
    flat = kept.flatten()
    owner = on_device(torch.where(flat, flat.cumsum(0) - 1, -1)[None], features.device)
    stands = on_device(flat.nonzero().T.contiguous(), features.device)
    found = tokens_in_place(features.flatten(0, 1)[None], TokenMap(owner, stands), at, "image", grid)
    patches = found.item.patches
    found.item.patches = PatchMap(patches.owner.view(kept.shape), patches.stands.view(kept.shape), grid)
    return found


def frames_in_place(
    features: Tensor, frames: FrameMap, at: ItemRows, grid: tuple[int, int], marks: Tensor | None
) -> PromptItem:
    """A video of which a method inside the encoder has left fewer frames; their tokens stay where the frames stand.

    Args:
        features: [T, N, D] of every frame, each a copy of the one that holds it; marks: as in :class:`PromptItem`.
    """
    stands = on_device(frames.stands, features.device)
    left = features[stands]
    item = VisualItem(
        modality="video",
        features=left,
        positions=torch.arange(left.shape[0] * left.shape[1], device=left.device).view(left.shape[:2]),
        length=left.shape[0] * left.shape[1],
        layout="grid",
        grid=grid,
        signals=dict(frames.values),
        full_tokens=features.shape[0] * features.shape[1],
        full_length=features.shape[0] * features.shape[1],
    )
    item.tell_frames(frames)
    rows = at.rows.view(features.shape[:2])[stands].flatten()
    return PromptItem(at.sample, rows, at.start, at.end, item, dense_rows=at.rows, marks=marks)


def tokens_in_place(
    features: Tensor,
    tokens: TokenMap,
    at: ItemRows,
    modality: str,
    grid: tuple[int, int],
    signals: Mapping[str, Tensor] | None = None,
) -> PromptItem:
    """What an encode method has left of an image or video whose tokens stay where they stand, in raster order.

    Args:
        features: [F, P, D] one for every place, each a copy of the token that holds it.
        tokens: over these places.
        signals: [F, N, ...] in the order of ``tokens``, or None.
    """
    frames, places, _ = features.shape
    stands, order = tokens.places().sort(dim=1)
    numbers = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, numbers)
    owner = torch.where(tokens.owner >= 0, rank.gather(1, tokens.owner.clamp(min=0)), -1)
    item = shortened_item(pick_rows(features, stands), modality, None)
    item.patches = PatchMap.of(TokenMap(owner, tokens.stands.gather(1, order)), grid)
    item.full_tokens = item.full_length = frames * places
    for name, value in (signals or {}).items():
        item.signals[name] = pick_rows(value, order) if value.ndim == 3 else value.gather(1, order)
    rows = at.rows.view(frames, places).gather(1, stands).flatten()
    return PromptItem(at.sample, rows, at.start, at.end, item, dense_rows=at.rows)
