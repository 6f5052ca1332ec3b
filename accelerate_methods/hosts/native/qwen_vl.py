"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches merged two by two, several position ids per token, deepstack features.

A frame (of a video: of two input frames) has h x w patches in blocks of ``spatial_merge_size`` squared, which the
merger makes one token each. Signals come from the last vision block, whose patches attend to their whole frame, or
from those that a method names: over the whole frame, too, whatever windows the block itself has. They are averaged
over a token's patches, as FastVID's tree for Qwen2.5-VL does (docs/methods/fastvid.md, step 1).
"""

from __future__ import annotations

import dataclasses
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.encoder_attention import asked_layers, received_per_map
from accelerate_methods.hosts.native.encoding import (
    TakenOver,
    frames_in_place,
    layer_input,
    pruned_in_place,
    tokens_in_place,
)
from accelerate_methods.hosts.native.family import Call, Family, ItemRows, Seen, locate_items
from accelerate_methods.hosts.native.prompt import PromptItem
from accelerate_methods.hosts.native.qwen_encoding import FrameShape, QwenRun, rotated
from accelerate_methods.hosts.native.qwen_pixels import Layout, PixelTower
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.registry import families
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.encode import EncodeMethod
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.frames import FrameMap
from accelerate_methods.stages.pixels import PixelMethod
from accelerate_methods.stages.signals import Signal

_ATTENTION = frozenset({"pooling_attention", "received_attention"})
_FROM_BLOCK = _ATTENTION | {"key_states"}


@dataclasses.dataclass
class AttentionInput:
    """What the attention of a block got: [S, M] normed states of all patches, rotary tables [S, d] each."""

    states: Tensor
    rotary: tuple[Tensor, Tensor]


class QwenVL(Family):
    about = families.QWEN_VL

    def __init__(self, model: nn.Module):
        super().__init__(model)
        config = self.config.vision_config
        try:
            self.attentions = [block.attn for block in model.model.visual.blocks]
            self.heads, self.unit = self.attentions[-1].num_heads, config.spatial_merge_size**2
            self.attentions[-1].qkv  # noqa: B018
        except (AttributeError, IndexError) as error:
            raise MethodError(
                f"the vision tower of {type(model).__name__} is not built as this host expects ({error}); this version "
                "of transformers is not supported."
            ) from error
        full = getattr(config, "fullatt_block_indexes", None)
        self.windowed, self.whole = full is not None, full
        self._blocks, self._names, self._merging = [len(self.attentions) - 1], [], False
        self._inputs: ContextVar[dict[int, Any]] = ContextVar("accelerate_block_inputs", default={})  # noqa: B039
        self._keeps_tokens = False
        self.sees_frames = not self.windowed or config.depth - 1 in full
        if not self.sees_frames:
            self.signal_limits = "Its last vision block attends to windows only, which says nothing of a frame."

    @property
    def signals(self) -> frozenset[str]:
        return (_FROM_BLOCK if self.sees_frames else _FROM_BLOCK - _ATTENTION) | {"frame_features", "patch_pixels"}

    def prepare(self, wanted: frozenset[str]) -> None:
        self._names = sorted(self._asked(wanted))
        self._keeps_tokens = "encoder_tokens" in wanted
        self._blocks = sorted({*self._asked(wanted).values(), len(self.attentions) - 1})

    def _asked(self, wanted: frozenset[str]) -> dict[str, int]:
        """Signal -> block that it is read from."""
        last = len(self.attentions) - 1
        asked = asked_layers(wanted, last + 1, last, self.whole)
        return asked | {name: last for name in wanted & {"pooling_attention"}}

    def watch(self, seen: Any) -> list[Any]:
        """``seen`` gets {block: what its attention got} of the blocks that signals come from; under the number behind
        the last one what the merger got, if a method asks for it."""
        last = self._blocks[-1]
        behind = len(self.attentions)

        def hook_of(index: int) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                got = AttentionInput(layer_input(args, kwargs), kwargs["position_embeddings"])
                inputs = {**self._inputs.get(), index: got}
                self._inputs.set({} if index == last and not self._keeps_tokens else inputs)
                if index == last:
                    seen(inputs)

            return hook

        def merger_hook(module: nn.Module, args: tuple) -> None:
            self._inputs.get()[behind] = args[0].detach()
            self._inputs.set({})

        kept = [self.model.model.visual.merger.register_forward_pre_hook(merger_hook)] if self._keeps_tokens else []
        return kept + [self.attentions[i].register_forward_pre_hook(hook_of(i), with_kwargs=True) for i in self._blocks]

    def take_over(self, method: EncodeMethod, wrappers: Wrappers, seen: Any, seeing: Any) -> None:
        """``seen`` gets where the tokens of each image and video are, None where every patch is in its place."""
        if self._names:
            raise MethodError(
                f"{', '.join(self._names)}: signals of vision blocks are not read on {self.about.name} models while "
                f"{method.name} merges tokens there."
            )
        self._merging, visual = True, self.model.model.visual
        self._keeps_tokens = False  # those that are left have no grid
        if isinstance(method, PixelMethod):
            PixelTower(visual, method, self._layout(), wrappers, seen, seeing)
            return
        run = QwenRun(
            visual.blocks, method, whole=self.whole, unit=self.unit, shape_of=self._shape,
            keep=getattr(visual, "deepstack_visual_indexes", ()),
        )  # fmt: skip
        side = self.config.vision_config.spatial_merge_size
        grids: ContextVar[Any] = ContextVar("accelerate_vision_grids")

        def visual_forward(hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
            grids.set([(frames, rows // side, columns // side) for frames, rows, columns in grid_thw.tolist()])
            return before(hidden_states, grid_thw, **kwargs)

        def first_block(hidden_states: Tensor, *args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
            kind = "image" if seeing() is None else seeing().kind
            if kind not in method.modalities:
                seen([None] * len(grids.get()))
                return None
            outputs, maps = run(hidden_states, position_embeddings, grids.get(), kind == "video")
            seen(maps)
            return outputs

        before = wrappers.wrap(visual, "forward", visual_forward)
        TakenOver(wrappers, visual.blocks, first_block)

    def _layout(self) -> Layout:
        config = self.config.vision_config
        halves = self.config.model_type.startswith("qwen3")
        mean, scale = ((0.5,) * 3,) * 2 if halves else (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))
        return Layout(
            side=config.spatial_merge_size, frames=config.temporal_patch_size, mean=mean, scale=scale,
            whole=self.whole, shape_of=self._shape,
        )  # fmt: skip

    def _shape(self, rows: int, columns: int) -> FrameShape:
        if not self.windowed:
            return FrameShape(torch.arange(rows * columns))
        order, windows = self._window_order(rows, columns), self._windows(rows, columns)
        _, numbers, sizes = torch.unique_consecutive(windows[order], return_inverse=True, return_counts=True)
        return FrameShape(order, numbers, sizes.tolist())

    def added(self, kwargs: dict[str, Any]) -> list[Tensor]:
        where, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if features is None:
            return []
        embeds = kwargs["inputs_embeds"]
        rows = where if where.ndim == 2 else where[..., 0]
        out = []
        for part in features:
            # unlike a boolean index, which reads how many rows there are
            out.append(torch.zeros_like(embeds).masked_scatter_(rows.to(embeds.device)[..., None], part.to(embeds)))
        return out

    def items(self, call: Call) -> list[PromptItem]:
        items = [item for kind in ("image", "video") if kind in call.seen for item in self._of(call, kind)]
        return sorted(items, key=lambda item: (item.sample, item.start))

    def _of(self, call: Call, kind: str) -> list[PromptItem]:
        seen, token = call.seen[kind], getattr(self.config, f"{kind}_token_id")
        grids = torch.as_tensor(seen.arguments[f"{kind}_grid_thw" if kind == "video" else "image_grid_thw"]).tolist()
        side = self.config.vision_config.spatial_merge_size
        shapes = [(frames, rows // side, columns // side) for frames, rows, columns in grids]
        lengths = [frames * rows * columns for frames, rows, columns in shapes]
        maps = seen.encoded[0] if self._merging else None
        pixels = self._pixels(seen, shapes) if "patch_pixels" in call.wanted and not self._merging else None
        signals = self._signals(seen, shapes, lengths, call.wanted)
        out = []
        for at in locate_items(call.ids, token, lengths, kind, call.embeds.device):
            frames, rows, columns = shapes[at.number]
            features = call.embeds[at.sample, at.rows].view(frames, rows * columns, -1)
            marks = self._marks(call.ids, at) if kind == "video" else None
            if maps is not None and isinstance(maps[at.number], FrameMap):
                found = moved(maps[at.number], features.device)
                out.append(frames_in_place(features, found, at, (rows, columns), marks))
                continue
            if maps is not None and maps[at.number] is not None:
                if isinstance(maps[at.number], Tensor):
                    found = pruned_in_place(features, maps[at.number], at, (rows, columns))
                else:
                    tokens = moved(maps[at.number], features.device)
                    found = tokens_in_place(features, tokens, at, kind, (rows, columns))
                if "frame_features" in call.wanted:
                    found.item.signals["frame_features"] = found.item.features.mean(1)
                out.append(found)
                continue
            item = VisualItem(
                modality=kind,
                features=features,
                positions=torch.arange(features.shape[0] * features.shape[1], device=features.device).view(frames, -1),
                length=lengths[at.number],
                layout="grid",  # a token's place is part of its position ids: methods leave it where it was
                grid=(rows, columns),
                signals=dict(signals[at.number]),
            )
            if "frame_features" in call.wanted:
                item.signals["frame_features"] = features.mean(1)
            if pixels is not None:
                item.signals["patch_pixels"] = pixels[at.number].to(features.device)
            out.append(PromptItem(at.sample, at.rows, at.start, at.end, item, marks=marks))
        return out

    def _pixels(self, seen: Seen, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
        """Signal "patch_pixels" of each image or video."""
        layout = self._layout()
        cells = layout.cells(seen.arguments[f"pixel_values{'_videos' * (seen.kind == 'video')}"], shapes)
        mean, scale = (torch.tensor(part)[:, None] for part in (layout.mean, layout.scale))
        frames = [torch.stack([one.values.flatten(0, 1) for one in own]) for own in cells]
        return [(part * scale.to(part) + mean.to(part)).flatten(2) for part in frames]

    def _marks(self, ids: Tensor, at: ItemRows) -> Tensor | None:
        """Rows of the tokens that Qwen3-VL's prompts have around each frame of a video; other models mark the whole."""
        if not self.config.model_type.startswith("qwen3"):
            return None
        first, ids = max(0, at.start - 1), ids[at.sample].cpu()
        around = ids[first : at.end + 1]
        marks = torch.tensor([self.config.vision_start_token_id, self.config.vision_end_token_id])
        return torch.isin(around, marks).nonzero().squeeze(1) + first

    # -- signals -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _signals(
        self, seen: Seen, shapes: list[tuple[int, int, int]], lengths: list[int], wanted: frozenset[str]
    ) -> list[dict[str, Tensor]]:
        """Per item [T, N, ...] over its merged tokens."""
        out: list[dict[str, Tensor]] = [{} for _ in shapes]
        asked = self._asked(wanted)
        if not asked and not self._keeps_tokens:
            return out
        (inputs,) = seen.encoded
        if self._keeps_tokens:
            self._add_encoder_tokens(out, inputs[len(self.attentions)], shapes)
        for block in sorted(set(asked.values())):
            names = [name for name, index in asked.items() if index == block]
            for found, more in zip(out, self._of_block(block, inputs[block], shapes, lengths, names), strict=True):
                found |= more
        return out

    def _add_encoder_tokens(
        self, out: list[dict[str, Tensor]], states: Tensor, shapes: list[tuple[int, int, int]]
    ) -> None:
        """Signal "encoder_tokens" of what the merger got, [S, C] of all patches."""
        for found, own, (_, rows, columns) in zip(out, merged_patches(states, self.unit, shapes), shapes, strict=True):
            if self.windowed:
                own = own[:, torch.argsort(self._window_order(rows, columns)).to(own.device)]
            found["encoder_tokens"] = own

    def _of_block(
        self,
        block: int,
        got: AttentionInput,
        shapes: list[tuple[int, int, int]],
        lengths: list[int],
        names: list[str],
    ) -> list[dict[str, Tensor]]:
        """Signals of one block, per item."""
        query, key, _ = self.attentions[block].qkv(got.states).unflatten(-1, (3, self.heads, -1)).unbind(1)
        plain = key
        query, key = (rotated(part, *(table[:, None] for table in got.rotary)) for part in (query, key))
        found = block_signals((query, key, plain), lengths, [shape[0] for shape in shapes], self.unit, names)
        return [self._by_raster(own, shape) for own, shape in zip(found, shapes, strict=True)]

    def _by_raster(self, signals: dict[str, Tensor], shape: tuple[int, int, int]) -> dict[str, Tensor]:
        if not self.windowed:
            return signals
        order = torch.argsort(self._window_order(*shape[1:]))
        return {name: value[:, order.to(value.device)] for name, value in signals.items()}

    def _window_order(self, rows: int, columns: int) -> Tensor:
        """[N] merged tokens of a frame, window by window, as Qwen2.5-VL's tower sorts them."""
        return torch.argsort(self._windows(rows, columns), stable=True)

    def _windows(self, rows: int, columns: int) -> Tensor:
        """[N] window of each merged token of a frame, by raster."""
        return frame_windows(self.config.vision_config, rows, columns)


def frame_windows(config: Any, rows: int, columns: int) -> Tensor:
    """[N] window of each merged token of a frame, by raster, under Qwen2.5-VL's vision config."""
    size = config.window_size // config.spatial_merge_size // config.patch_size
    windows = (torch.arange(rows)[:, None] // size) * (columns // size + 1) + torch.arange(columns) // size
    return windows.flatten()


def merged_patches(states: Tensor, unit: int, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    """Signal "encoder_tokens" of each item, [T, N, C] in the order in which the merger has them.

    Args:
        states: [S, C] what the merger gets of all patches; unit: patches per token; shapes: as (T, h, w) of tokens.
    """
    tokens = states.view(-1, unit, states.shape[-1]).float().mean(1)
    parts = tokens.split([frames * rows * columns for frames, rows, columns in shapes])
    return [part.unflatten(0, (shape[0], -1)) for part, shape in zip(parts, shapes, strict=True)]


def block_signals(
    projected: tuple[Tensor, Tensor, Tensor], lengths: list[int], frames: list[int], unit: int, names: list[str]
) -> list[dict[str, Tensor]]:
    """Signals of a vision block, per item [T, N, ...] over merged tokens in the order in which the block has them.

    Args:
        projected: [S, H, d] queries and keys, rotated, and keys that are not, of the patches of all items.
        lengths: merged tokens of each item; frames: T of each; unit: patches per merged token.
    """
    out, first = [], 0
    for length, count in zip(lengths, frames, strict=True):
        here = slice(first, first + length * unit)
        first = here.stop
        parts = [part[here].unflatten(0, (count, -1)) for part in projected]
        found: dict[str, Tensor] = {}
        for name in names:
            asked = Signal(name)
            q, k, bare = parts if asked.heads == "mean" else (part.flatten(2)[:, :, None] for part in parts)
            if asked.name == "pooling_attention":
                found[name] = frame_attention(q, k, unit)
            elif asked.name == "received_attention":
                found[name] = received_attention(q, k, unit)
            else:
                found[name] = bare.unflatten(1, (-1, unit)).mean(2).mean(2)
        out.append(found)
    return out


def frame_attention(query: Tensor, key: Tensor, unit: int) -> Tensor:
    """Attention of a frame's mean query to its merged tokens (docs/methods/fastvid.md, step 1): float32 softmax,
    head mean.

    Args:
        query, key: [T, P, H, d] rotated; unit: patches per merged token.

    Returns:
        [T, P // unit] in the dtype of ``query``.
    """
    mean_query = query.mean(1)
    mean_keys = key.unflatten(1, (-1, unit)).mean(2)
    scores = torch.einsum("thd,tnhd->thn", mean_query, mean_keys) * query.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype).mean(1)


def received_attention(query: Tensor, key: Tensor, unit: int) -> Tensor:
    """Attention that a merged token's patches receive, averaged over heads, query patches and its patches.

    Args:
        query, key: [T, P, H, d] rotated; unit: patches per merged token.

    Returns:
        [T, P // unit] float32. A few (frame, head) maps are formed at a time.
    """
    frames, _, heads, dim = query.shape
    queries = query.transpose(1, 2).flatten(0, 1) * dim**-0.5
    received = received_per_map(queries, key.permute(0, 2, 3, 1).flatten(0, 1))
    return received.view(frames, heads, -1, unit).mean((1, 3))
