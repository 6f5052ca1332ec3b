"""What methods ask of a vision encoder of transformers: read from one of its layers while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from accelerate_methods.engine.encoder_attention import ENCODER_SIGNALS, Encoded, asked_layers, signals_of_layers
from accelerate_methods.engine.encoder_blocks import acting_blocks, run_clip
from accelerate_methods.hosts.native.encoding import TakenOver, layer_input
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.stages.encode import EncodeMethod
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
            layers = self._layers = tower.encoder.layers
            self._states = len(layers) + 1  # the embeddings are the first
            numbers = self.layer_numbers(feature_layer)
            self.joined = len(numbers) > 1 or numbers[0] == 0
            self._feature = max(numbers) - 1
            self.layer = layers[self._feature]
            for name in ("num_heads", "head_dim", "scale", "q_proj", "k_proj"):
                getattr(self.layer.self_attn, name)
            self.layer.layer_norm1  # noqa: B018
        except (AttributeError, IndexError, ValueError) as error:
            raise MethodError(
                f"the encoder of {type(tower).__name__} is not built as this host expects ({error}); this version of "
                "transformers is not supported."
            ) from error
        self.special = int(self.is_clip)
        #: inputs of other layers than the feature's, in the run that is going on
        self._inputs: ContextVar[dict[int, Tensor]] = ContextVar("accelerate_layer_inputs", default={})  # noqa: B039
        self._asked: dict[str, int] = {}

    def ask(self, names: frozenset[str]) -> None:
        """Which signals will be read; said before :meth:`watch`, where they are of other layers than the feature's.

        Raises:
            MethodError: a layer that is not there.
        """
        self._asked = asked_layers(names, len(self._layers), self._feature)

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

    def watch(self, seen: Callable[[Encoded], None]) -> list[Any]:
        """Call ``seen`` after every run; returns the hooks' handles."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            inputs = self._inputs.get()
            self._inputs.set({})
            seen(Encoded(hidden, self.special, layer_input(args, kwargs), inputs))

        def remember(index: int) -> Callable[..., None]:
            def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                self._inputs.set({**self._inputs.get(), index: layer_input(args, kwargs)})

            return note

        others = set(self._asked.values()) - {self._feature, self._feature + 1}
        handles = [self._layers[i].register_forward_pre_hook(remember(i), with_kwargs=True) for i in sorted(others)]
        return [*handles, self.layer.register_forward_hook(hook, with_kwargs=True)]

    def take_over(
        self, method: EncodeMethod, wrappers: Wrappers, seen: Callable[[Encoded], None], dense: Callable[[int], int],
        videos: Callable[[], Sequence[int] | None],
    ) -> None:  # fmt: skip
        """Run the encoder under ``method`` from now on, in place of :meth:`watch`.

        Args:
            dense: patches of a view -> tokens of it that the language model gets without a method.
            videos: frames of each video that is being encoded, None for images.

        Raises:
            MethodError: the features are not those of one layer, or a block that does not run.
        """
        if self.joined:
            raise MethodError(f"{method.name}: features of several encoder layers cannot be merged inside the encoder.")
        layers = self._layers[: self._feature + 1]
        acting_blocks(method, len(layers))

        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts = videos()
            acts = ("image" if counts is None else "video") in method.modalities
            encoded = run_clip(
                layers, hidden_states, method if acts else None, depth=len(self._layers), special=self.special,
                inputs=set(self._asked.values()), forwards=taken.forwards,
                dense=dense(hidden_states.shape[1] - self.special), videos=counts,
            )  # fmt: skip
            seen(encoded)
            full = encoded.merged.full() if encoded.shortened else encoded.hidden
            full = encoded.merged.every_frame(full)
            return lambda number: full

        taken = TakenOver(wrappers, self._layers, run)

    def read(self, encoded: Encoded, names: frozenset[str]) -> dict[str, Tensor]:
        """Signals over the patches, see :func:`accelerate_methods.engine.encoder_attention.encoder_signals`."""
        asked = asked_layers(names, len(self._layers), self._feature)
        if encoded.merged is not None:
            return encoded.merged.signals(self._layers, asked)
        return signals_of_layers(self._layers, encoded.around(self._feature), asked, self.special)
