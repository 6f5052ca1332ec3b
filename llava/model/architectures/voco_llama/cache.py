"""What is kept of images: keys and values of the ``<voco>`` tokens, and the cache that begins with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from accelerate_methods.engine.cache import RowsAlong, check_cache
from accelerate_methods.engine.cached_keys import cached_length, replace_entries
from accelerate_methods.engine.prompt import PromptLayout
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.printing import ShapesShown
from llava.model.architectures.voco_llama.division import Division


@dataclasses.dataclass(repr=False)
class CompressedImages(ShapesShown):
    """The images and videos in front of the text of one prompt, as the text sees them.

    Attributes:
        keys, values: for each layer [G, S, d] of the ``<voco>`` tokens (of all frames), keys after rotation.
        position: of the first text row; it is not S, as the images took positions, too.
        prefix: ids up to the last ``<voco>``.
    """

    keys: list[Tensor]
    values: list[Tensor]
    position: int
    prefix: tuple[int, ...]

    @property
    def length(self) -> int:
        """Entries in every layer."""
        return self.keys[0].shape[1]


@dataclasses.dataclass
class Kept:
    """Keys and values [B, G, S, d] of each layer for a batch; real: [B, S] on the host, False in padding."""

    keys: list[Tensor]
    values: list[Tensor]
    real: Tensor

    @classmethod
    def of(cls, images: Sequence[CompressedImages]) -> Kept:
        """A batch of them, padded on the left."""
        longest = max(image.length for image in images)
        lengths = torch.tensor([image.length for image in images])

        def stacked(parts: Callable[[CompressedImages], list[Tensor]]) -> list[Tensor]:
            pad = torch.nn.functional.pad
            each = [[pad(part, (0, 0, longest - part.shape[1], 0)) for part in parts(image)] for image in images]
            return [torch.stack(layer) for layer in zip(*each, strict=True)]

        real = torch.arange(longest) >= longest - lengths[:, None]
        return cls(stacked(lambda image: image.keys), stacked(lambda image: image.values), real)

    def repeated(self, times: int) -> Kept:
        if times == 1:
            return self
        keys, values = ([part.repeat_interleave(times, 0) for part in parts] for parts in (self.keys, self.values))
        return Kept(keys, values, self.real.repeat_interleave(times, 0))


@dataclasses.dataclass
class DividedLayout(PromptLayout):
    """What the decoder is told of prompts with ``<voco>`` tokens.

    Attributes:
        division: where they divide; positions: [B, L] position ids.
        given: what is kept of images already.
    """

    division: Division | None = None
    positions: Tensor | None = None
    given: Kept | None = None


class VocoCache(RowsAlong):
    """The cache of a request: entries of ``<voco>`` tokens, then of the text.

    Attributes:
        awaits: the prompts that will fill it; None once they have run.
        real: [B, S + T] False in padding, None where there is none.
        following: [B, 1] position of the next token.
    """

    awaits: DividedLayout | None = None
    real: Tensor | None = None
    following: Tensor | None = None

    @classmethod
    def of(cls, layout: DividedLayout, cache: DynamicCache | None = None) -> VocoCache:
        """A new one for these prompts, or the caller's empty ``cache`` made one.

        Raises:
            MethodError: a cache of another class, or one that holds a prompt.
        """
        check_cache(cache, "VoCo-LLaMA")
        if cached_length(cache):
            raise MethodError("images of a later turn need a new cache; give the whole chat again.")
        cache = cls() if cache is None else cache
        cache.__class__ = cls
        cache.awaits = layout
        return cache

    def begin(self, kept: Kept) -> None:
        """Fill the layers with what is kept."""
        for layer, (keys, values) in enumerate(zip(kept.keys, kept.values, strict=True)):
            if layer < len(self.layers) and self.layers[layer].is_initialized:
                replace_entries(self.layers[layer], keys, values)
            else:
                self.update(keys, values, layer)
        self.awaits = None

    def grow(self, rows: int, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """Which entries are real, with ``rows`` new ones, whose padding ``mask`` [B, ...] may say."""
        if self.real is None and mask is None:
            return None
        new = torch.ones(like.shape[0], rows, dtype=torch.bool, device=like.device)
        if mask is not None:
            new = mask[:, -rows:].bool()
        before = self.real
        if before is None:
            before = new.new_ones(new.shape[0], self.get_seq_length())
        self.real = torch.cat([before.to(new.device), new], dim=1)
        return self.real

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self.real = None if self.real is None else self.real[:, :tokens_to_remove]
            self.following = None if self.following is None else self.following + tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.awaits = self.real = self.following = None

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.real = None if self.real is None else change(self.real)
        self.following = None if self.following is None else change(self.following)
