"""Projector and Qwen2 decoder with the parameter names of the official checkpoint, and a packed forward for training.

The arithmetic is that of transformers' ``Qwen2ForCausalLM`` (checked in ``check_export.py``). What is special is the
packing: the visual prefix of a clip is computed once, and many independent questions read its keys and values.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from text import Text
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    vocab: int
    vision: int = 128
    width: int = 128
    layers: int = 6
    heads: int = 4
    groups: int = 2
    mlp: int = 384
    theta: float = 1e6
    eps: float = 1e-6

    @property
    def head(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass
class Watch:
    """Which attention maps to collect: of ``layers``, from positions ``where`` [B, n, Q] of the questions.

    ``maps`` receives one tensor [B, n * Q, P] per layer: attention to the prefix, mean over heads.
    """

    layers: tuple[int, ...]
    where: Tensor
    maps: list[Tensor] = dataclasses.field(default_factory=list)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.q_proj = nn.Linear(s.width, s.width)
        self.k_proj = nn.Linear(s.width, s.groups * s.head)
        self.v_proj = nn.Linear(s.width, s.groups * s.head)
        self.o_proj = nn.Linear(s.width, s.width, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [B, heads, n, head] (key-value groups repeated)."""
        s = self.shape
        q, k, v = (f(x).unflatten(-1, (-1, s.head)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        repeat = s.heads // s.groups
        return rotate(q, rope), rotate(k, rope).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)

    def merge(self, x: Tensor) -> Tensor:
        return self.o_proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(s.width, s.mlp, bias=False)
        self.up_proj = nn.Linear(s.width, s.mlp, bias=False)
        self.down_proj = nn.Linear(s.mlp, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = Mlp(s)
        self.input_layernorm = Norm(s.width, s.eps)
        self.post_attention_layernorm = Norm(s.width, s.eps)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.self_attn.merge(mixed)
        return x + self.mlp(self.post_attention_layernorm(x))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * rope[0] + turned * rope[1]


class TinyLlava(nn.Module):
    """Projector, newline, decoder and head; the tower is kept apart because it is frozen here."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = self.shape = shape
        self.embed_tokens = nn.Embedding(s.vocab, s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = Norm(s.width, s.eps)
        self.lm_head = nn.Linear(s.width, s.vocab, bias=False)
        self.mm_projector = nn.Sequential(nn.Linear(s.vision, s.width), nn.GELU(), nn.Linear(s.width, s.width))
        self.image_newline = nn.Parameter(torch.randn(s.width) * 0.06)
        self.register_buffer("inverse", s.theta ** (-torch.arange(0, s.head, 2).float() / s.head), persistent=False)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, n, head] for positions [B, n]."""
        angle = positions[:, None, :, None].float() * self.inverse
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def packed(
        self,
        prefix: Tensor,
        positions: Tensor,
        questions: Tensor,
        starts: Tensor,
        hidden_span: tuple[int, int],
        blind_layers: int = 0,
        keep: dict[int, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Final normed hidden states of many questions over one prefix per clip.

        prefix [B, P, D] with ``positions`` [B, P]; questions [B, Q, T] token ids, right padded, whose positions start
        at ``starts`` [B]. In the first ``blind_layers`` layers questions do not see prefix columns
        ``hidden_span[0]:hidden_span[1]`` (the visual tokens). ``keep[k]`` [B, P'] (column indices) drops prefix columns
        before layer k for good, keeping their positions. ``watch`` collects attention to the prefix.
        Returns [B, Q, T, D].
        """
        b, q, t = questions.shape
        x, y = prefix, self.embed_tokens(questions).flatten(1, 2)
        places = (starts[:, None, None] + torch.arange(t)[None, None]).expand(b, q, t).flatten(1)
        prope, qrope = self.rope(positions), self.rope(places)
        block = torch.arange(q).repeat_interleave(t)
        step = torch.arange(t).repeat(q)
        own = (block[:, None] == block[None]) & (step[:, None] >= step[None])
        for number, layer in enumerate(self.layers):
            if keep and number in keep:
                index = keep[number]
                x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
                positions = positions.gather(1, index)
                prope = self.rope(positions)
            sight = torch.ones(q * t, x.shape[1], dtype=torch.bool)
            if number < blind_layers:
                sight[:, hidden_span[0] : hidden_span[1]] = False
            attn = layer.self_attn
            pq, pk, pv = attn.project(layer.input_layernorm(x), prope)
            qq, qk, qv = attn.project(layer.input_layernorm(y), qrope)
            mixed = F.scaled_dot_product_attention(
                qq, torch.cat([pk, qk], 2), torch.cat([pv, qv], 2), attn_mask=torch.cat([sight, own], 1)
            )
            if watch is not None and number in watch.layers:
                row = (torch.arange(q) * t + watch.where).flatten(1)  # [B, watched positions]
                query = qq.gather(2, row[:, None, :, None].expand(-1, qq.shape[1], -1, qq.shape[3]))
                score = query @ torch.cat([pk, qk], 2).transpose(2, 3) * qq.shape[-1] ** -0.5
                score = score.masked_fill(~torch.cat([sight, own], 1)[row][:, None], -torch.inf)
                watch.maps.append(score.softmax(-1)[..., : x.shape[1]].mean(1))
            y = layer.finish(y, mixed)
            if number + 1 < len(self.layers):
                x = layer.finish(x, F.scaled_dot_product_attention(pq, pk, pv, is_causal=True))
        return self.norm(y).unflatten(1, (q, t))

    def logits_full(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Plain causal forward of one sequence [1, n, D] -> logits [1, n, vocab] (reference for the checks)."""
        x, rope = embeds, self.rope(positions)
        for layer in self.layers:
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), rope)
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.lm_head(self.norm(x))


@torch.no_grad()
def initialise(
    model: TinyLlava, text: Text, words: list[str], places: dict[int, tuple[int, int]], plain_layers: int = 3
) -> Tensor:
    """Weights before training.

    The first ``plain_layers`` layers start from small random numbers. Later layers start "mimetic": queries equal keys
    and the output is a transposed value map, so that like attends to like and passes it on. The head's row of an answer
    word equals the embedding of the same word with a leading space. Returns two random directions [2, D] that stand for
    "up on the frame" and "left"; ``places`` gives axis and sign of the tokens that name a side.
    """
    s = model.shape
    nn.init.normal_(model.embed_tokens.weight, std=0.06)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    for number, layer in enumerate(model.layers):
        attn = layer.self_attn
        for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
            nn.init.zeros_(linear.bias)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            nn.init.normal_(linear.weight, std=0.05)
        nn.init.normal_(layer.mlp.down_proj.weight, std=0.003)  # branches start near zero: the words must survive
        if number < plain_layers:
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
                nn.init.normal_(linear.weight, std=0.05)
            nn.init.normal_(attn.o_proj.weight, std=0.003)
            continue
        repeat = s.heads // s.groups
        nn.init.normal_(attn.k_proj.weight, std=s.width**-0.5)
        nn.init.normal_(attn.v_proj.weight, std=s.width**-0.5)
        key, value = (
            f.weight.unflatten(0, (s.groups, s.head)).repeat_interleave(repeat, 0) for f in (attn.k_proj, attn.v_proj)
        )
        attn.q_proj.weight.copy_(key.flatten(0, 1))
        attn.o_proj.weight.copy_(0.25 * value.flatten(0, 1).T)
    for word in words:
        inner, outer = text.encode(" " + word)[-1], text.encode(word)[0]
        model.embed_tokens.weight[outer] = model.embed_tokens.weight[inner]
        model.lm_head.weight[outer] = model.embed_tokens.weight[inner]
    axes = torch.randn(2, s.width) * 0.06
    for token, (axis, sign) in places.items():
        model.lm_head.weight[token] = sign * axes[axis]
    return axes
