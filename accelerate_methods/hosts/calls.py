"""What a call of ``forward`` may give and ask for while methods are attached; one MethodError for everything else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accelerate_methods.engine.loop import needs_loop
from accelerate_methods.engine.prompt import goes_on
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError

#: how flash-attention is told of several sequences in one row
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def refuse_outputs(pipeline: Pipeline, arguments: dict[str, Any], *configs: Any) -> None:
    """MethodError if states or attention of the layers are asked for, as an argument or in a config.

    transformers collects them where its own forward calls the layers, and layers that differ in length give no stack.
    """
    for name in ("output_attentions", "output_hidden_states"):
        asked = name in arguments
        if arguments[name] if asked else any(getattr(config, name, None) for config in configs):
            where = "" if asked else " (the config asks for it)"
            raise MethodError(f"{name} is not available while {pipeline.name} is attached{where}; detach it first.")


def refuse_embeddings(pipeline: Pipeline, arguments: dict[str, Any], begins: bool) -> None:
    """MethodError for a prompt of embeddings: nobody can tell which of them are visual tokens.

    Args:
        begins: whether the call is the first on its cache.
    """
    if begins and pipeline.methods and arguments.get("inputs_embeds") is not None:
        raise MethodError(
            f"{pipeline.name} cannot act on a prompt given as inputs_embeds: it does not say which of them are visual "
            "tokens. Give input_ids and the images or videos, or detach it first."
        )


def refuse_base_model(pipeline: Pipeline, arguments: dict[str, Any]) -> None:
    """MethodError for images or videos given to the model inside the model, where no method would see them."""
    if needs_loop(pipeline) and any(v is not None and k.startswith("pixel_values") for k, v in arguments.items()):
        raise MethodError(
            f"{pipeline.name} acts on calls of the model that it is attached to, not on those of its base model "
            "(model.model): call the model itself, or detach it first."
        )


def check_visuals(pipeline: Pipeline, arguments: dict[str, Any], begins: bool) -> None:
    """MethodError for a prompt with images or videos that the host cannot cut.

    Args:
        begins: whether the call is the first on its cache.
    """
    if arguments.get("input_ids") is None:
        raise MethodError("images and videos need input_ids: their placeholders say where the tokens stand.")
    if not needs_loop(pipeline):
        return
    if not begins:
        raise MethodError(f"{pipeline.name}: images of a later turn need a new cache; give the whole chat again.")
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise MethodError("a 2-D attention_mask is needed; do not set cache_implementation.")
    if any(arguments.get(name) is not None for name in PACKING) or not goes_on(positions, mask):
        raise MethodError(
            f"{pipeline.name} cannot act on packed prompts with images or videos (position_ids that jump or start "
            "again, cu_seq_lens): give each prompt a row of the batch, with an attention_mask."
        )


def acts_on_text(pipeline: Pipeline, arguments: dict[str, Any], tokens: Tensor, positions: Tensor | None) -> bool:
    """Whether ``pipeline`` acts on a first prompt of text alone: what is done to its cache, if it has one.

    Args:
        arguments: of the language model; tokens: [B, L, ...] of the prompt; positions: ids that the caller gave.

    Raises:
        MethodError: the prompt's mask or positions say more than which of its rows are padding.
    """
    if not pipeline.acts_on_text or arguments.get("use_cache") is False:
        return False
    mask = arguments.get("attention_mask")
    plain = mask is None or (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2])
    if not plain or any(arguments.get(name) is not None for name in PACKING) or not goes_on(positions, mask):
        raise MethodError(
            f"{pipeline.name} acts on the KV cache of text, too, and cannot on packed prompts or masks of "
            "another form than [batch, length]: give each prompt a row of the batch, with its attention_mask, or "
            "use_cache=False."
        )
    return True
