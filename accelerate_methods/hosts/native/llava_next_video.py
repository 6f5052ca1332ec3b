"""LLaVA-NeXT-Video of transformers: images as LLaVA-NeXT, frames pooled before the projector, without newlines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.engine.encoder_attention import Encoded
from accelerate_methods.hosts.layouts import pool_2d, video_item
from accelerate_methods.hosts.native.family import Call, ItemRows, Seen, locate_items
from accelerate_methods.hosts.native.llava import LlavaNext, dense_patches, filled
from accelerate_methods.hosts.native.prompt import PromptItem
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry import families
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.encode import EncodeMethod
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.frames import FrameMap


class PooledVideos(LlavaNext):
    """What the families with videos share: all videos of a call have as many frames, each pooled on its grid."""

    def items(self, call: Call) -> list[PromptItem]:
        items = super().items(call)
        if "video" in call.seen:
            items += self._videos(call, call.seen["video"])
        return sorted(items, key=lambda item: (item.sample, item.start))

    def _videos(self, call: Call, seen: Seen) -> list[PromptItem]:
        encoded = self._encoded(seen)
        frames = next(v.shape[1] for v in seen.arguments.values() if isinstance(v, Tensor) and v.ndim == 5)
        pooled = dense_patches(encoded)
        if encoded.frames is not None:
            pooled = pooled.new_zeros(sum(video.before for video in encoded.frames), *pooled.shape[1:])
        pooled = self._pooled(pooled).to(call.embeds.device)
        layouts = [self._video_layout(part) for part in pooled.split(frames)]
        signals = self._video_signals(encoded, call.wanted)
        out = []
        lengths = [item.length for item in layouts]
        for at in locate_items(call.ids, self.config.video_token_id, lengths, "video", pooled.device):
            here = slice(at.number * frames, (at.number + 1) * frames)
            rows = encoded.rows_of(here)
            own = {name: value[rows] for name, value in signals.items()}
            if encoded.shortened:
                out.append(self._without_grid(encoded[here], layouts[at.number], at, own))
                continue
            if encoded.frames is not None:
                out.append(self._fewer_frames(call, encoded[here].frames[0], layouts[at.number], at, own))
                continue
            item = filled(layouts[at.number], call.embeds[at.sample, at.rows])
            item.signals = own
            out.append(PromptItem(at.sample, at.rows, at.start, at.end, item))
        return out

    def _fewer_frames(
        self, call: Call, frames: FrameMap, layout: VisualItem, at: ItemRows, signals: dict[str, Tensor]
    ) -> PromptItem:
        """A video of which a method inside the encoder has left fewer frames.

        Args:
            layout: of the dense model, whose every frame holds what the frame that it has gone into became.
        """
        stands = on_device(frames.stands, at.rows.device)
        left = self._video_layout(call.embeds.new_empty(frames.left, layout.tokens_per_frame, 1))
        rows = at.rows[layout.positions[stands].flatten()]
        if layout.newline_positions is not None:
            rows = torch.cat([rows, at.rows[layout.newline_positions]])
        item = filled(left, call.embeds[at.sample, rows])
        item.signals, item.full_tokens, item.full_length = signals, layout.num_tokens, layout.length
        item.tell_frames(frames)
        return PromptItem(at.sample, rows, at.start, at.end, item, dense_rows=at.rows)

    def _video_frames(self, seen: Seen | None) -> list[int] | None:
        if seen is None or seen.kind != "video":
            return None
        videos, frames = next(v.shape[:2] for v in seen.arguments.values() if isinstance(v, Tensor) and v.ndim == 5)
        return [frames] * videos

    def _dense(self, patches: int, seen: Seen | None) -> int:
        if seen is None or seen.arguments.get("pixel_values_videos") is None:
            return patches
        return self._pooled(torch.empty(1, patches, 1, device="meta")).shape[1]

    def _pooled(self, patches: Tensor) -> Tensor:
        """[F, P, C] -> [F, N, C]."""
        raise NotImplementedError

    def _video_layout(self, pooled: Tensor) -> VisualItem:
        """Layout of one video of [F, N, 1]."""
        raise NotImplementedError

    def _video_signals(self, encoded: Encoded, wanted: frozenset[str]) -> dict[str, Tensor]:
        """Signals over all frames, pooled as the features are."""
        found = self._read(encoded, wanted) | encoded.carried
        return found if encoded.shortened else {name: self._per_token(value) for name, value in found.items()}

    def _per_token(self, signal: Tensor) -> Tensor:
        """[F, P, ...] -> [F, N, ...]."""
        return self._pooled(signal[..., None])[..., 0] if signal.ndim == 2 else self._pooled(signal)


class LlavaNextVideo(PooledVideos):
    about = families.LLAVA_NEXT_VIDEO_HF

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.stride = self.config.spatial_pool_stride
        # a learned pooling weights a token's patches in its own way; signals are averaged over the same patches
        self.mode = {"conv": "average"}.get(self.config.spatial_pool_mode, self.config.spatial_pool_mode)
        if not hasattr(model.model, "vision_resampler") or self.mode not in ("average", "max"):
            raise MethodError(
                f"{type(model).__name__} does not pool its frames as this host expects "
                f"(spatial_pool_mode={self.config.spatial_pool_mode!r}); this version of transformers is not supported."
            )

    def take_over(self, method: EncodeMethod, wrappers: Wrappers, seen: Any, seeing: Any) -> None:
        if self.config.spatial_pool_mode == "conv" and not method.keeps_grid:
            raise MethodError(f"{method.name}: this model pools frames with a convolution, which needs their grid.")
        super().take_over(method, wrappers, seen, seeing)

    def _pooled(self, patches: Tensor) -> Tensor:
        return pool_2d(patches, self.mode, self.stride)

    def _video_layout(self, pooled: Tensor) -> VisualItem:
        return video_item(pooled, None, "no_token", "spatial_unpad")
