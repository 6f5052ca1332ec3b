"""FastViTHD: FastVLM's vision encoder, convolutions in three stages and attention in two, total stride 64.

In the inference form in which the weights are released (`apple/ml-fastvlm@592b4add`, `mobileclip/mci.py`): every
multi-branch convolution is folded into one (``reparam_conv``), residuals of token mixers included. Modules have the
names of the checkpoints. All maps are [B, C, H, W].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelerate_methods.hosts.tower_files import TowerError

#: width of an attention head, and the part of the channels that squeeze-and-excitation keeps
HEAD_WIDTH, SQUEEZE = 32, 0.0625
_MIXERS = ("repmixer", "attention")


@dataclasses.dataclass
class FastViTHDConfig:
    """The numbers of an encoder, under the keys of ``fastvithd_config``; the defaults are those of `mobileclip_l`.

    Attributes:
        image_size: side of the input in pixels; patch_size: total stride.
        layers, embed_dims, mlp_ratios, token_mixers: blocks, channels, width of the FFN and mixer of each stage.
        pos_embs_shapes: kernel of the position encoding in front of each stage, None where there is none.
        down_patch_size, down_stride: of the convolutions between stages; repmixer_kernel_size: of the token mixers.
        cls_ratio: channels of the last map, in those of the last stage; hidden_size: the same as a number.
        projection_dim: of the CLIP head, whose output nobody uses here.
    """

    image_size: int = 1024
    patch_size: int = 64
    layers: Sequence[int] = (2, 12, 24, 4, 2)
    embed_dims: Sequence[int] = (96, 192, 384, 768, 1536)
    mlp_ratios: Sequence[float] = (4, 4, 4, 4, 4)
    token_mixers: Sequence[str] = ("repmixer", "repmixer", "repmixer", "attention", "attention")
    pos_embs_shapes: Sequence[Sequence[int] | None] = (None, None, None, (7, 7), (7, 7))
    down_patch_size: int = 7
    down_stride: int = 2
    repmixer_kernel_size: int = 3
    cls_ratio: float = 2.0
    hidden_size: int = 3072
    projection_dim: int = 768
    model_type: str = "fastvithd"

    @classmethod
    def of(cls, image_size: int, settings: dict[str, Any] | None) -> FastViTHDConfig:
        """The config for a side and the checkpoint's ``fastvithd_config``; None means `mobileclip_l`.

        Raises:
            TowerError: an encoder of another kind, or numbers that do not fit each other.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"image_size", "model_type"}
        settings = dict(settings or {})
        config = cls(image_size=image_size, **{key: value for key, value in settings.items() if key in known})
        if not settings.get("inference_mode", True) or settings.get("stem_scale_branch", False):
            raise TowerError(
                "fastvithd_config: only the released form of the encoder is supported, with its branches folded into "
                "single convolutions (inference_mode true, stem_scale_branch false)."
            )
        config.check()
        return config

    def check(self) -> None:
        """TowerError if the numbers do not fit each other."""
        stages = len(self.layers)
        for name in ("embed_dims", "mlp_ratios", "token_mixers", "pos_embs_shapes"):
            if len(getattr(self, name)) != stages:
                raise TowerError(f"fastvithd_config: {name} has {len(getattr(self, name))} values for {stages} stages.")
        wrong = sorted(set(self.token_mixers) - set(_MIXERS))
        if wrong:
            raise TowerError(f"fastvithd_config: token mixer {wrong[0]!r} is not one of {', '.join(_MIXERS)}.")
        if int(self.embed_dims[-1] * self.cls_ratio) != self.hidden_size:
            raise TowerError(
                f"fastvithd_config: hidden_size {self.hidden_size} is not the last of embed_dims "
                f"({self.embed_dims[-1]}) times cls_ratio ({self.cls_ratio})."
            )
        for before, after in zip(self.embed_dims, self.embed_dims[1:], strict=False):
            if after % before:
                raise TowerError(f"fastvithd_config: {after} channels cannot be made of groups for {before}.")
        if 4 * self.down_stride ** (stages - 1) != self.patch_size:
            raise TowerError(f"fastvithd_config: patch_size {self.patch_size} is not the stride of {stages} stages.")
        if self.image_size < 1 or self.image_size % self.patch_size:
            raise TowerError(
                f"mm_vision_tower: a side of {self.image_size} pixels; it must be a multiple of {self.patch_size}."
            )


def _conv(channels: int, out: int, kernel: int | Sequence[int], stride: int = 1, groups: int = 1, **more: Any):
    padding = kernel // 2 if isinstance(kernel, int) else tuple(side // 2 for side in kernel)
    return nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, **more)


class FoldedConv(nn.Module):
    """A convolution that was several branches in training, with an activation behind it unless told otherwise."""

    def __init__(self, *sizes: Any, activation: bool = True, squeeze: bool = False, **more: Any):
        super().__init__()
        self.reparam_conv = _conv(*sizes, **more)
        self.se = SqueezeExcite(self.reparam_conv.out_channels) if squeeze else nn.Identity()
        self.activation = nn.GELU() if activation else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        return self.activation(self.se(self.reparam_conv(maps)))


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole map says of them."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, int(channels * SQUEEZE), 1)
        self.expand = nn.Conv2d(int(channels * SQUEEZE), channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        mean = maps.mean((2, 3), keepdim=True)
        return maps * self.expand(self.reduce(mean).relu()).sigmoid()


class LargeKernelConv(nn.Module):
    """The first half of a step between stages: few channels in each group, large kernel."""

    def __init__(self, channels: int, out: int, config: FastViTHDConfig):
        super().__init__()
        self.lkb_reparam = _conv(channels, out, config.down_patch_size, config.down_stride, groups=channels)
        self.activation = nn.GELU()

    def forward(self, maps: Tensor) -> Tensor:
        return self.activation(self.lkb_reparam(maps))


class Downsample(nn.Module):
    """From one stage to the next: fewer pixels, more channels."""

    def __init__(self, channels: int, out: int, config: FastViTHDConfig):
        super().__init__()
        self.proj = nn.Sequential(LargeKernelConv(channels, out, config), FoldedConv(out, out, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return self.proj(maps)


class FixedBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of the checkpoint, in training mode, too: the other branches are folded in."""

    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            maps, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class ConvFFN(nn.Module):
    """Depthwise convolution and norm, then an MLP over the channels of each pixel."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", _conv(channels, channels, 7, groups=channels, bias=False))
        self.conv.add_module("bn", FixedBatchNorm(channels))
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.conv(maps))))


class RepMixerBlock(nn.Module):
    """A depthwise convolution mixes pixels (its residual is folded in), an FFN channels."""

    def __init__(self, channels: int, ratio: float, config: FastViTHDConfig):
        super().__init__()
        self.token_mixer = FoldedConv(
            channels, channels, config.repmixer_kernel_size, groups=channels, activation=False
        )
        self.convffn = ConvFFN(channels, int(channels * ratio))
        self.layer_scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.token_mixer(maps)
        return maps + self.layer_scale * self.convffn(maps)


class Attention(nn.Module):
    """Attention among all pixels of a map, in heads of a fixed width."""

    def __init__(self, channels: int):
        super().__init__()
        if channels % HEAD_WIDTH:
            raise TowerError(f"fastvithd_config: {channels} channels are no whole number of heads of {HEAD_WIDTH}.")
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, states: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        query, key, value = self.qkv(states).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """Attention over normed channels, then an FFN, each scaled and added."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.token_mixer = Attention(channels)
        self.convffn = ConvFFN(channels, int(channels * ratio))
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.ones(channels, 1, 1)) for _ in range(2))

    def forward(self, maps: Tensor) -> Tensor:
        mixed = self.token_mixer(self.norm(maps.flatten(2).transpose(1, 2)))
        maps = maps + self.layer_scale_1 * mixed.transpose(1, 2).reshape(maps.shape)
        return maps + self.layer_scale_2 * self.convffn(maps)


class ClipHead(nn.Module):
    """The head of the image-text model that the encoder was trained in; kept so that checkpoints stay whole."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(channels, out))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out]."""
        return maps.mean((2, 3)) @ self.proj


class FastViTHD(nn.Module):
    """The encoder: [B, 3, S, S] in 0..1 -> [B, hidden_size, S / 64, S / 64], the last map (FastVLM, section 3.2)."""

    def __init__(self, config: FastViTHDConfig):
        super().__init__()
        widths = config.embed_dims
        self.patch_embed = nn.Sequential(
            FoldedConv(3, widths[0], 3, 2),
            FoldedConv(widths[0], widths[0], 3, 2, groups=widths[0]),
            FoldedConv(widths[0], widths[0], 1),
        )
        parts: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage:
                parts.append(Downsample(widths[stage - 1], width, config))
            kernel = config.pos_embs_shapes[stage]
            if kernel is not None:
                parts.append(FoldedConv(width, width, tuple(kernel), groups=width, activation=False))
            parts.append(self._stage(stage, config))
        self.network = nn.Sequential(*parts)
        self.conv_exp = FoldedConv(widths[-1], config.hidden_size, 3, groups=widths[-1], squeeze=True)
        self.head = ClipHead(config.hidden_size, config.projection_dim)

    @staticmethod
    def _stage(stage: int, config: FastViTHDConfig) -> nn.Sequential:
        width, ratio = config.embed_dims[stage], config.mlp_ratios[stage]
        attends = config.token_mixers[stage] == "attention"
        return nn.Sequential(
            *(
                AttentionBlock(width, ratio) if attends else RepMixerBlock(width, ratio, config)
                for _ in range(config.layers[stage])
            )
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.conv_exp(self.network(self.patch_embed(pixels)))
