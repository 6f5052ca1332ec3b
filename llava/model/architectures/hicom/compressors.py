"""The two branches of HICom: blocks of patches and learnt queries, both asked with the instruction.

Shapes: B items of one form, T frames of H x W patches, C channels of the features, K of the space that patches and text
share (SigLIP: the same), D of the language model. Attention has no loop over frames or blocks; it is computed in
float32 where it is small and in SDPA where it is not.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from accelerate_methods.ops.select import on_device
from llava.model.architectures.hicom.blocks import block_counts, in_blocks
from llava.model.architectures.hicom.grammar import Global, Local
from llava.model.checkpoint import CheckpointError

_EPS = 1e-6


def mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class Attention(nn.Module):
    """Multi-head attention of queries [B, N, C] over a source [B, S, C]."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        if width % head_width:
            raise CheckpointError(f"HICom: width {width} cannot be divided in heads of {head_width}.")
        self.heads = width // head_width
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, source: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        """``logit_scale``: CLIP's, for cosines over the full width in the place of scaled products."""
        query, key, value = self.q_proj(queries), self.k_proj(source), self.v_proj(source)
        scale = None
        if logit_scale is not None:
            query = functional.normalize(query, dim=-1) * logit_scale.exp().to(query.dtype)
            key, scale = functional.normalize(key, dim=-1), 1.0
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        out = functional.scaled_dot_product_attention(query, key, value, scale=scale)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def add_adapter(module: nn.Module, name: str, width: int, proj: nn.Module | None = None) -> None:
    """Give ``module`` the parameters of an adapter under the official names, an MLP unless ``proj`` is given."""
    module.add_module(f"{name}_proj", mlp(width, width) if proj is None else proj)
    module.add_module(f"{name}_norm", nn.LayerNorm(width, eps=_EPS))
    module.register_parameter(f"{name}_alpha", nn.Parameter(torch.zeros(1)))


def adapted(module: nn.Module, name: str, states: Tensor) -> Tensor:
    """(1 - alpha) x + alpha LN(f(x)), or x where ``module`` has no adapter of this name."""
    if not hasattr(module, f"{name}_proj"):
        return states
    proj, norm, alpha = (getattr(module, f"{name}_{part}") for part in ("proj", "norm", "alpha"))
    return (1 - alpha) * states + alpha * norm(proj(states))


class GuideInjector(nn.Module):
    """Puts the instruction into queries.

    Args:
        mode: "direct": the instruction takes the place of every query; "coarse": it scales and shifts them; "fine":
            they read its words, each for itself.
        text: width of the instruction; width: of the queries; head_width: of the heads of "fine".
    """

    def __init__(self, mode: str, text: int, width: int, adapt: bool, head_width: int):
        super().__init__()
        self.mode = mode
        self.text2qk_proj = mlp(text, width) if text != width else None
        if adapt:
            add_adapter(self, "guide", width)
        if mode == "coarse":
            self.coarse_proj = mlp(width, 2 * width)
            self.coarse_norm = nn.LayerNorm(width, eps=_EPS)
        elif mode == "fine":
            self.fine_proj = Attention(width, head_width)
            self.fine_norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, queries: Tensor, guide: Tensor) -> Tensor:
        """[B, N, C] queries and the instruction [B, L, C], of which the last row is the pooled one -> [B, N, C]."""
        guide = guide if self.mode == "fine" else guide[:, -1:]
        guide = guide if self.text2qk_proj is None else self.text2qk_proj(guide)
        guide = adapted(self, "guide", guide)
        if self.mode == "direct":
            return guide.expand(-1, queries.shape[1], -1)
        if self.mode == "coarse":
            scale, shift = self.coarse_proj(guide).chunk(2, dim=-1)
            return self.coarse_norm(queries * (1 + scale) + shift)
        return self.fine_norm(queries + self.fine_proj(queries, guide))


class LocalCompressor(nn.Module):
    """One token for each block of patches: attention inside the block, asked by the instruction or its mean patch.

    Args:
        features: C; shared: K; out: D.
    """

    def __init__(self, setting: Local, features: int, shared: int, out: int, head_width: int):
        super().__init__()
        self.setting = setting
        if features != shared and setting.mode != "direct":
            raise CheckpointError(
                f"HICom's local branch asks in the space of {shared} channels that patches and text share; with "
                f"features of {features} the instruction can only be injected 'direct', not {setting.mode!r}."
            )
        self.scale = shared**-0.5
        letters = setting.adapt
        self.guide_injector = (
            None if setting.mode == "off" else GuideInjector(setting.mode, shared, shared, "g" in letters, head_width)
        )
        if "q" in letters and setting.mode != "direct":
            add_adapter(self, "q", shared, nn.Linear(shared, shared, bias=False))
        if "k" in letters:
            add_adapter(self, "k", shared)
        if "v" in letters:
            add_adapter(self, "v", features)
        self.readout = mlp(features, out)

    def kernels(self, frames: int, still: bool) -> tuple[int, int, int]:
        """Patches of a block along time, rows and columns; a ``still`` picture has no time."""
        space = self.setting.spatial
        return (1 if still or frames == 1 else self.setting.temporal), space, space

    def forward(
        self, features: Tensor, embeds: Tensor | None, guide: Tensor | None, still: bool,
        logit_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One token per block.

        Args:
            features: [B, T, H, W, C]; embeds: [B, T, H, W, K], None for the features themselves.
            guide: [B, L, K] of the instruction, None where it is off.
            still: whether the views are pictures, not frames.
            logit_scale: CLIP's, where cosines are compared. (Its bias changes no softmax.)

        Returns:
            [B, t, h, w, D].
        """
        kernels = self.kernels(features.shape[1], still)
        cosine = logit_scale is not None
        if cosine and embeds is not None:
            embeds = functional.normalize(embeds, dim=-1)
            guide = None if guide is None else functional.normalize(guide, dim=-1)
        query = self._queries(features, guide, block_counts(features.shape[1:4], kernels))
        keys = in_blocks(adapted(self, "k", features if embeds is None else embeds), kernels)
        values = in_blocks(adapted(self, "v", features), kernels)
        query = query.float() * (logit_scale.float().exp() if cosine else self.scale)
        weights = torch.einsum("bthwk,bthwnk->bthwn", query, keys.float()).softmax(-1).to(values.dtype)
        return self.readout(torch.einsum("bthwn,bthwnc->bthwc", weights, values))

    def _queries(self, features: Tensor, guide: Tensor | None, counts: list[int]) -> Tensor:
        """[B, t, h, w, K]."""
        if self.setting.mode == "direct":  # says all there is
            pooled = self.guide_injector(guide[:, -1:], guide)
            return pooled[:, :, None, None].expand(-1, *counts, -1)
        mean = functional.interpolate(features.movedim(-1, 1), size=counts, mode="trilinear").movedim(1, -1)
        query = adapted(self, "q", mean)
        if self.guide_injector is None:
            return query
        return self.guide_injector(query.flatten(1, 3), guide).view(query.shape)


class GlobalCompressor(nn.Module):
    """Learnt queries with the instruction in them, which read all patches with their places.

    In mode "direct" the instruction takes the place of every query, and all tokens are the same one: so the released
    scripts have it.
    """

    def __init__(self, setting: Global, features: int, text: int, out: int, head_width: int):
        super().__init__()
        self.setting = setting
        self.query = nn.Parameter(torch.zeros(setting.queries, features))
        self.guide_injector = (
            None
            if setting.mode == "off"
            else GuideInjector(setting.mode, text, features, setting.adapt_guide, head_width)
        )
        self.attn_layer = Attention(features, head_width)
        self.readout = mlp(features, out)

    def forward(self, features: Tensor, guide: Tensor | None, logit_scale: Tensor | None = None) -> Tensor:
        """[B, T, H, W, C] and [B, L, K] -> [B, N, D]."""
        places = positions(features.shape[1:], features.device).to(features.dtype)
        query = self.query[None].expand(len(features), -1, -1)
        if self.guide_injector is not None:
            query = self.guide_injector(query, guide)
        read = self.attn_layer(query, (features + places).flatten(1, 3), logit_scale)
        return self.readout(query + read)


def positions(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """[T, H, W, C] float32: the sines of three axes, added. Only the axes are kept, not the table."""
    times, rows, columns = (on_device(_axis(size, shape[-1]), device) for size in shape[:3])
    space = (rows[:, None] + columns).float()
    return times.float()[:, None, None] + space


@functools.lru_cache(maxsize=64)
def _axis(size: int, width: int) -> Tensor:
    """[size, width] in float64: sines at even channels and cosines at odd ones, of the place by its wavelength."""
    channel = torch.arange(width)
    angle = torch.arange(size, dtype=torch.float64)[:, None] / 10000.0 ** ((channel // 2 * 2).double() / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


class HIComProjector(nn.Module):
    """Both branches, or the one that there is.

    Args:
        local, whole: settings of the branches; features, shared, out: C, K, D; clip_scale: names of the branches that
            compare cosines.
    """

    def __init__(self, local: Local | None, whole: Global | None, widths: tuple[int, int, int], head_width: int,
                 clip_scale: frozenset[str]):  # fmt: skip
        super().__init__()
        self.local_compressor = None if local is None else LocalCompressor(local, *widths, head_width)
        self.global_compressor = None if whole is None else GlobalCompressor(whole, *widths, head_width)
        for name in sorted(clip_scale):
            self.register_parameter(f"{name}_logit_scale", nn.Parameter(torch.zeros(1)))
            self.register_parameter(f"{name}_logit_bias", nn.Parameter(torch.zeros(1)))

    @property
    def reads_words(self) -> bool:
        """Whether a branch wants the instruction word by word; the others have the pooled one."""
        parts = (self.local_compressor, self.global_compressor)
        return any(part is not None and part.setting.mode == "fine" for part in parts)

    def forward(self, branch: str, *states: Any) -> Tensor:
        """One branch ("local" or "global") with its own arguments, and the scale of cosines where it has one."""
        scale = getattr(self, f"{branch}_logit_scale", None)
        return getattr(self, f"{branch}_compressor")(*states, scale)
