"""What methods ask of a vision encoder of transformers: read from one of its layers while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from accelerate_methods.engine.encoder_attention import ENCODER_SIGNALS, Encoded, encoder_signals
from accelerate_methods.stages.errors import MethodError


class ClipTower:
    """A CLIP or SigLIP tower.

    Args:
        tower: ``CLIPVisionModel`` or ``SiglipVisionModel``.
        feature_layer: index of the hidden state that the projector gets, or several, as in the model's config.

    Attributes:
        joined: whether the features are of several layers, or of none (the embeddings): no layer's attention is theirs.

    Raises:
        MethodError: another tower, or an encoder that is not built as expected.
    """

    def __init__(self, tower: nn.Module, feature_layer: Any):
        kind = tower.config.model_type
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise MethodError(f"vision tower {kind}: only CLIP and SigLIP towers are known to this host.")
        self.config, self.is_clip = tower.config, kind == "clip_vision_model"
        try:
            layers = tower.encoder.layers
            self._states = len(layers) + 1  # the embeddings are the first
            numbers = self.layer_numbers(feature_layer)
            self.joined = len(numbers) > 1 or numbers[0] == 0
            self.layer = layers[max(numbers) - 1]
            for name in ("num_heads", "head_dim", "scale", "q_proj", "k_proj"):
                getattr(self.layer.self_attn, name)
            self.layer.layer_norm1  # noqa: B018
        except (AttributeError, IndexError, ValueError) as error:
            raise MethodError(
                f"the encoder of {type(tower).__name__} is not built as this host expects ({error}); this version of "
                "transformers is not supported."
            ) from error
        self.special = int(self.is_clip)

    def layer_numbers(self, given: Any) -> tuple[int, ...]:
        """Hidden states that ``vision_feature_layer`` names (a number, or several), counted from the embeddings."""
        numbers = (given,) if isinstance(given, int) else tuple(given)
        return tuple(range(self._states)[number] for number in numbers)

    @property
    def signals(self) -> frozenset[str]:
        if self.joined:
            return frozenset()
        return ENCODER_SIGNALS if self.is_clip else ENCODER_SIGNALS - {"cls_attention"}

    @property
    def side(self) -> int:
        """Pixels of a view."""
        return self.config.image_size

    def watch(self, seen: Callable[[Encoded], None]) -> Any:
        """Call ``seen`` after every run; returns the hook's handle."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            hidden = output[0] if isinstance(output, tuple) else output
            seen(Encoded(hidden, self.special, before.detach()))

        return self.layer.register_forward_hook(hook, with_kwargs=True)

    def read(self, encoded: Encoded, names: frozenset[str]) -> dict[str, Tensor]:
        """Signals over the patches, see :func:`accelerate_methods.engine.encoder_attention.encoder_signals`."""
        return encoder_signals(self.layer, encoded.before, names, self.special)
