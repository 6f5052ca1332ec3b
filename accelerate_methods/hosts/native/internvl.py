"""InternVL of transformers (the ``-hf`` checkpoints): square tiles, of which four patches make one token.

Every tile has a CLS token, which the projector does not get, and a token per block of 2 x 2 patches. A prompt holds an
image as one run of placeholders, tile after tile with the thumbnail last. A video is written as many images with text
in between ("Frame1: <img>...</img>\\n"), and the model is not told which images are its frames: here every frame is an
image by itself, so methods that compare frames cannot act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from accelerate_methods.engine.devices import moved
from accelerate_methods.engine.encoder_attention import ENCODER_SIGNALS, asked_layers, signals_of_layers
from accelerate_methods.engine.encoder_block import EncoderBlock
from accelerate_methods.engine.encoder_blocks import BlockRun, EncodedTokens, acting_blocks
from accelerate_methods.engine.packed_blocks import run_packed
from accelerate_methods.hosts.native.encoding import (
    TakenOver,
    chosen,
    layer_input,
    pruned_in_place,
    tokens_in_place,
)
from accelerate_methods.hosts.native.family import Call, Family, locate_items
from accelerate_methods.hosts.native.prompt import PromptItem
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry import families
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.encode import EncodeMethod, TokenMap
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.pixels import PixelCells, PixelMethod

#: mean and deviation of the processors of these models: what pixels of [0, 1] are brought to the encoder's range with
_NORMALISED = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class InternVL(Family):
    about = families.INTERNVL

    def __init__(self, model: nn.Module):
        super().__init__(model)
        number = self.config.vision_feature_layer
        if not isinstance(number, int) or number == 0:
            raise MethodError(f"features of vision layer {number} are not supported; one layer is needed.")
        if self.config.vision_feature_select_strategy != "default":
            raise MethodError(
                f"vision_feature_select_strategy={self.config.vision_feature_select_strategy!r} is not supported: "
                "only 'default', which leaves the CLS token out, gives tiles of whole blocks."
            )
        self.factor = int(1 / self.config.downsample_ratio)
        try:
            tower = model.model.vision_tower
            layers, sizes = tower.encoder.layer, zip(tower.config.image_size, tower.config.patch_size, strict=True)
            self.feature = number - 1 if number > 0 else len(layers) + number
            self.layers = [as_clip(layer) for layer in layers]
            self._modules = list(layers)
            tower.embeddings.cls_token  # noqa: B018
        except (AttributeError, IndexError, TypeError) as error:
            raise MethodError(
                f"the vision tower of {type(model).__name__} is not built as this host expects ({error}); this version "
                "of transformers is not supported."
            ) from error
        rows, columns = (pixels // patch for pixels, patch in sizes)
        if rows != columns or rows % self.factor:
            raise MethodError(f"tiles of {rows} x {columns} patches do not make blocks of {self.factor} squared.")
        self.side = rows // self.factor
        self._asked, self._names = {"key_states": self.feature}, []
        self._inputs: ContextVar[dict[int, Tensor]] = ContextVar("accelerate_layer_inputs", default={})  # noqa: B039

    @property
    def signals(self) -> frozenset[str]:
        return ENCODER_SIGNALS | {"patch_pixels"}

    def prepare(self, wanted: frozenset[str]) -> None:
        self._names = sorted(asked_layers(wanted, len(self.layers), self.feature))
        # without any, the feature's layer says how large the tiles are
        self._asked = asked_layers(wanted | {"key_states"}, len(self.layers), self.feature)

    def watch(self, seen: Any) -> list[Any]:
        """``seen`` gets {layer: [V, 1 + P, M] its input, CLS token first} of the layers that signals come from."""
        wanted = sorted(set(self._asked.values()))

        def hook_of(index: int) -> Any:
            def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                inputs = {**self._inputs.get(), index: layer_input(args, kwargs)}
                self._inputs.set({} if index == wanted[-1] else inputs)
                if index == wanted[-1]:
                    seen(inputs)

            return hook

        return [self._modules[i].register_forward_pre_hook(hook_of(i), with_kwargs=True) for i in wanted]

    def take_over(self, method: EncodeMethod, wrappers: Wrappers, seen: Any, seeing: Any) -> None:
        """``seen`` gets the :class:`EncodedTokens`, over the blocks of a tile by raster; under a method that looks at
        pixels [V, N] bool, on the host, the tokens that are left."""
        if isinstance(method, PixelMethod):
            self._take_over_pixels(method, wrappers, seen, seeing)
            return
        blocks = self.feature + 1
        acting_blocks(method, blocks)
        unit, order = self.factor**2, _block_order(self.side, self.factor)
        back = torch.argsort(order)

        def run(hidden: Tensor) -> Any:
            self._check_patches(hidden)
            by_block = on_device(order, hidden.device) + 1
            parts = [InternBlock(module, taken.forwards[i]) for i, module in enumerate(self._modules[:blocks])]
            encoded = BlockRun(parts, method, depth=len(self._modules), special=1, unit=unit)(
                torch.cat([hidden[:, :1], hidden[:, by_block]], dim=1), inputs=set(self._asked.values())
            )
            seen(encoded)
            full = encoded.full()
            full = torch.cat([full[:, :1], full[:, on_device(back, hidden.device) + 1]], dim=1)
            return lambda number: full

        taken = TakenOver(wrappers, self._modules, run)

    def _take_over_pixels(self, method: PixelMethod, wrappers: Wrappers, seen: Any, seeing: Any) -> None:
        if self._names:
            raise MethodError(
                f"{', '.join(self._names)}: signals of vision blocks are not read on {self.about.name} models while "
                f"{method.name} drops tokens there."
            )
        blocks = self.feature + 1
        first, order = method.first_block(blocks), _block_order(self.side, self.factor)
        back = torch.argsort(order)

        def run(hidden: Tensor) -> Any:
            self._check_patches(hidden)
            call = seeing()
            kept = torch.ones(len(hidden), self.side**2, dtype=torch.bool)
            if call is not None:
                cells = self._cells(call.arguments["pixel_values"])
                kept = torch.stack(chosen(method, cells)).flatten(1)
            seen(kept)
            if first is None or bool(kept.all()):
                return None
            by_block, in_place = on_device(order, hidden.device) + 1, on_device(back, hidden.device) + 1
            parts = [InternBlock(module, taken.forwards[i]) for i, module in enumerate(self._modules[:blocks])]
            states = torch.cat([hidden[:, :1], hidden[:, by_block]], dim=1)
            full = run_packed(parts, states, kept, first, special=1, unit=self.factor**2)
            full = torch.cat([full[:, :1], full[:, in_place]], dim=1)
            return lambda number: full

        taken = TakenOver(wrappers, self._modules, run)

    def _cells(self, pixels: Tensor) -> list[PixelCells]:
        """The pixels [V, 3, H, W] of every tile, token by token."""
        tokens = pixels.unflatten(3, (self.side, -1)).unflatten(2, (self.side, -1)).permute(0, 2, 4, 1, 3, 5)
        return [PixelCells(tile.flatten(3)[:, :, None], tuple(_NORMALISED[1])) for tile in tokens]

    def _check_patches(self, states: Tensor) -> None:
        """MethodError unless [V, 1 + P, M] are states of tiles of the checkpoint's size."""
        patches, own = states.shape[1] - 1, (self.side * self.factor) ** 2
        if patches != own:
            raise MethodError(f"tiles of {patches} patches; this checkpoint's have {own}.")

    def items(self, call: Call) -> list[PromptItem]:
        seen, token, per_tile = call.seen["image"], self.config.image_token_id, self.side**2
        (inputs,) = seen.encoded
        merged = inputs if isinstance(inputs, EncodedTokens) else None
        kept = inputs if isinstance(inputs, Tensor) else None
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if seen.arguments.get(name) not in (None, getattr(self.config, name)):
                raise MethodError(f"{name}={seen.arguments[name]!r} is not the model's own; set it in its config.")
        if merged is None and kept is None:
            self._check_patches(inputs[self.feature])
        tiles = len(kept if kept is not None else inputs[self.feature] if merged is None else merged.hidden)
        lengths = _runs(call.ids, token, tiles * per_tile)
        if any(length % per_tile for length in lengths):
            raise MethodError(f"runs of {lengths} image placeholders are not made of tiles of {per_tile} tokens.")
        signals: dict[str, Tensor] = {}
        if merged is not None:
            signals = self._merged_signals(merged, call.wanted)
        elif kept is None:
            signals = self._signals(inputs, call.wanted)
            if "patch_pixels" in call.wanted:
                signals["patch_pixels"] = self._pixels(seen.arguments["pixel_values"])
        firsts = [sum(lengths[:number]) // per_tile for number in range(len(lengths))]
        out = []
        for at in locate_items(call.ids, token, lengths, "image", call.embeds.device):
            count, first = lengths[at.number] // per_tile, firsts[at.number]
            features = call.embeds[at.sample, at.rows].view(count, per_tile, -1)
            own = {name: value[first : first + count] for name, value in signals.items()}
            if kept is not None and not bool(kept[first : first + count].all()):
                out.append(pruned_in_place(features, kept[first : first + count], at, (self.side, self.side)))
                continue
            if merged is not None and not merged.grid:
                tokens, own = moved((merged[first : first + count].tokens, own), features.device)
                out.append(tokens_in_place(features, tokens, at, "image", (self.side, self.side), own))
                continue
            item = VisualItem(
                modality="image",
                features=features,
                positions=torch.arange(lengths[at.number], device=features.device).view(count, per_tile),
                length=lengths[at.number],
                layout="grid",  # a tile's tokens stay in raster order, as those of a frame do
                grid=(self.side, self.side),
                signals=own,
            )
            out.append(PromptItem(at.sample, at.rows, at.start, at.end, item))
        return out

    def _pixels(self, pixels: Tensor) -> Tensor:
        """Signal "patch_pixels"."""
        cells = torch.stack([tile.values.flatten(0, 1) for tile in self._cells(pixels)])
        mean, scale = (torch.tensor(part)[:, None].to(cells) for part in _NORMALISED)
        return (cells * scale + mean).flatten(2)

    def _merged_signals(self, merged: EncodedTokens, wanted: frozenset[str]) -> dict[str, Tensor]:
        """[V, N, ...] over the tokens that an encode method has left, or all places if the grid has returned."""
        return merged.signals(self.layers, asked_layers(wanted, len(self.layers), self.feature))

    def _signals(self, inputs: dict[int, Tensor], wanted: frozenset[str]) -> dict[str, Tensor]:
        """[V, N, ...] over tokens: averages of their blocks of patches. Keys are those that the queries meet."""
        asked = asked_layers(wanted, len(self.layers), self.feature)
        found = signals_of_layers(self.layers, inputs, asked, special=1)
        return {name: block_means(value, self.factor) for name, value in found.items()}


class InternBlock(EncoderBlock):
    """A layer of InternVL's vision encoder, with its own norms of queries and keys and scales of its residuals.

    Args:
        forward: its own, where something else has been put in its place.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]):
        self._layer, self._forward = layer, forward
        self.scale = layer.attention.scale

    def project(self, hidden: Tensor, tokens: TokenMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attention, states = self._layer.attention, self._layer.layernorm_before(hidden)
        parts = (
            attention.q_norm(attention.q_proj(states)),
            attention.k_norm(attention.k_proj(states)),
            attention.v_proj(states),
        )
        query, key, value = (
            part.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2) for part in parts
        )
        return query, key, value, key

    def attended(self, hidden: Tensor, output: Tensor) -> Tensor:
        attention = self._layer.attention
        return hidden + self._layer.lambda_1 * attention.projection_dropout(attention.projection_layer(output))

    def feed_forward(self, hidden: Tensor) -> Tensor:
        layer = self._layer
        return hidden + layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(hidden)))

    def whole(self, hidden: Tensor) -> Tensor:
        return self._forward(hidden)


def _block_order(side: int, factor: int) -> Tensor:
    """[P] raster index of each patch of a tile, block after block."""
    index = torch.arange((side * factor) ** 2).view(side, factor, side, factor)
    return index.transpose(1, 2).flatten()


def as_clip(layer: nn.Module) -> SimpleNamespace:
    """The parts of an encoder layer that signals are computed with, under the names of a CLIP layer."""
    attention = layer.attention

    def projected(name: str) -> Callable[[Tensor], Tensor]:
        projection, norm = getattr(attention, f"{name}_proj"), getattr(attention, f"{name}_norm", None)
        return projection if norm is None else lambda states: norm(projection(states))

    return SimpleNamespace(
        layer_norm1=layer.layernorm_before,
        self_attn=SimpleNamespace(
            num_heads=attention.num_heads,
            head_dim=attention.head_dim,
            scale=attention.scale,
            q_proj=projected("q"),
            k_proj=projected("k"),
        ),
    )


def _runs(ids: Tensor, token: int, rows: int) -> list[int]:
    """Lengths of the runs of ``token`` in ``ids`` [B, L], sample after sample.

    Args:
        ids: on the host.
        rows: tokens that the vision side made; prompts that stand there several times, for beams, are read once.
    """
    total = int((ids == token).sum())
    copies = total // rows if total and total % rows == 0 else 1
    mask = nn.functional.pad((ids[::copies] == token).long(), (1, 1))
    edges = mask.diff(dim=1)
    return ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()


def block_means(signal: Tensor, factor: int) -> Tensor:
    """[V, P, ...] over a square of patches -> [V, P / factor**2, ...], averages over blocks."""
    side = math.isqrt(signal.shape[1]) // factor
    blocks = signal.unflatten(1, (side, factor, side, factor))
    return blocks.mean((2, 4)).flatten(1, 2)
