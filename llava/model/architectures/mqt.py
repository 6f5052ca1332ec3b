"""MQT-LLaVA: any number of visual tokens up to 256, chosen at run time (NeurIPS 2024, arXiv 2405.19315).

LLaVA-1.5 whose projector is a resampler with 256 ordered queries, of which the first n are used: n tokens go to the
language model, and those for n are the first n of those for 256. The keys of its attention are the position table
alone: the weights are the same for every image. Follows `gordonhu608/MQT-LLaVA@92c35d06`, where a released checkpoint
that is asked without a number draws one at random in every call; here it is 256.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from accelerate_methods.engine.recording import SampleRecord
from accelerate_methods.hosts.layouts import flat_item, shortened_item
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.compress import VisualItem
from llava.model.checkpoint import CheckpointError
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM, LlavaLlamaModel

QUERIES = 256
#: attention heads of the released resampler; its config does not say
HEADS = 16

_asked: ContextVar[int | None] = ContextVar("llava_mqt_tokens", default=None)


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of an MQT-LLaVA checkpoint."""
    return config.get("query_abstractor_type") == "matry_query"


class MatryoshkaQueries(nn.Module):
    """The resampler, with the parameter names of the official checkpoints.

    Args:
        width: of the patch features, K; out: of the language model, D; heads: of the attention.
    """

    def __init__(self, width: int, out: int, heads: int):
        super().__init__()
        if width % heads:
            raise CheckpointError(f"query_abstractor: width {width} cannot be divided among {heads} heads.")
        self.pos_embed = nn.Parameter(torch.zeros(QUERIES, width), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(QUERIES, width))
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)  # holds the packed weights
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, features: Tensor, count: int) -> Tensor:
        """[B, P, K] patch features of a square view -> [B, count, D] tokens."""
        batch, patches, width = features.shape
        weight, bias = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        states = (
            self.ln_q(self.query[:count] + self.pos_embed[:count])[None],
            self.ln_k(self.key_positions(patches))[None],
            self.ln_v(features),
        )
        query, key, value = (
            nn.functional.linear(part, w, b).unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
            for part, w, b in zip(states, weight, bias, strict=True)
        )
        query, key = query.expand(batch, -1, -1, -1), key.expand(batch, -1, -1, -1)
        out = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, width)
        return self.attn.out_proj(out) @ self.proj

    def key_positions(self, patches: int) -> Tensor:
        """[P, K] the position table at the size of a view's patches, in the dtype of the table (as released)."""
        side, table = math.isqrt(patches), math.isqrt(QUERIES)
        if side * side != patches:
            raise ValueError(f"MQT-LLaVA needs the patches of square views, got {patches}.")
        grid = self.pos_embed.float().view(1, table, table, -1).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        return resized.flatten(2)[0].T.to(self.pos_embed.dtype)


class MqtLlavaConfig(LlavaConfig):
    model_type = "mqt_llava"


class MqtLlavaModel(LlavaLlamaModel):
    config_class = MqtLlavaConfig

    @staticmethod
    def build_projector(config: Any) -> nn.Module:
        return MatryoshkaQueries(
            config.mm_hidden_size, config.hidden_size, getattr(config, "query_abstractor_heads", HEADS)
        )


@contextlib.contextmanager
def _using(count: int | None) -> Iterator[None]:
    """So many tokens for each view, within the block; None leaves what an outer call said."""
    if count is None:
        yield
        return
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= QUERIES:
        raise ValueError(f"num_visual_tokens must be a whole number from 1 to {QUERIES}, got {count!r}.")
    token = _asked.set(count)
    try:
        yield
    finally:
        _asked.reset(token)


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a model with the argument ``num_visual_tokens``."""

    @functools.wraps(function)  # transformers reads which arguments there are from the signature
    def counted(self: Any, *args: Any, num_visual_tokens: int | None = None, **kwargs: Any) -> Any:
        with _using(num_visual_tokens):
            return function(self, *args, **kwargs)

    return counted


class MqtLlavaForCausalLM(LlavaLlamaForCausalLM):
    """``forward`` and ``generate`` take ``num_visual_tokens``, 1 to 256 for each image or frame; 256 if not given.

    Raises:
        ValueError: another number, or a config that lays patches out as a grid.
    """

    config_class = MqtLlavaConfig
    about = architecture("mqt")
    tokens_have_places = False
    weight_names: ClassVar[Mapping[str, str]] = {r"^model\.query_abstractor\.": "model.mm_projector."}

    def __init__(self, config: MqtLlavaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.build(config, MqtLlavaModel)
        if getattr(config, "mm_patch_merge_type", "flat") != "flat":
            raise CheckpointError(
                f"MQT-LLaVA's queries have no grid; mm_patch_merge_type {config.mm_patch_merge_type!r} is not 'flat'."
            )

    forward = _counted(LlavaLlamaForCausalLM.forward)
    generate = _counted(LlavaLlamaForCausalLM.generate)
    prepare_multimodal = _counted(LlavaLlamaForCausalLM.prepare_multimodal)

    def made_up(self) -> None:
        resampler = self.get_model().mm_projector
        width = resampler.proj.shape[0]
        for parameter, size in ((resampler.pos_embed, 1.0), (resampler.query, 1.0), (resampler.proj, width**-0.5)):
            nn.init.normal_(parameter, std=size)

    def project(self, features: Tensor) -> Tensor:
        projector = self.get_model().mm_projector
        return projector(features.to(projector.proj.dtype), _asked.get() or QUERIES).to(features.device)

    def lay_out(self, tokens: Tensor, kind: str, size: tuple[int, int] | None) -> VisualItem:
        """Tokens in a row: they are those of queries, which have no place in the picture."""
        if kind != "video":
            return flat_item(tokens.flatten(0, 1)[None], None)
        return shortened_item(tokens, "video", None)


    def own_macs(self, sample: SampleRecord, num_visual_tokens: int = QUERIES, **call: Any) -> int:
        """Of the resampler: keys and queries once per call, values, attention and output for each view."""
        views = sum(item.tokens_before // num_visual_tokens for item in sample.items)
        if not views:
            return 0
        width, out = self.get_model().mm_projector.proj.shape
        patches, tokens = self.get_vision_tower().num_patches, num_visual_tokens
        once = (patches + tokens) * width * width
        return once + views * (patches * width**2 + 2 * tokens * patches * width + tokens * width * (width + out))


MODEL = MqtLlavaForCausalLM
AutoConfig.register("mqt_llava", MqtLlavaConfig, exist_ok=True)
AutoModelForCausalLM.register(MqtLlavaConfig, MqtLlavaForCausalLM, exist_ok=True)
