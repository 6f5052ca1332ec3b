"""What a method is: hyper-parameters plus one pure tensor function per stage where its paper acts.

    sample --> encode --> compress --> prefill --> decode

A method knows no model class. It declares the **signals** it reads (names in :data:`SIGNALS`); a host computes those
and only those. Subclass the stage classes below, one per stage that the paper touches, as a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import MethodError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from .items import Compressed, VisualItem
    from .steps import DecodeStep, PrefillStep, Selection
    from .views import CompressedViews, Views

#: Everything a method may ask a host for, with the shape it gets. F frames/views, N visual tokens per frame. What comes
#: out of an encoder layer is taken in the layer whose output is the visual feature. In a video everything is pooled as
#: the features are; in ``views.Views`` N is the number of patches.
SIGNALS = {
    "frame_features": "[F, G] one global feature per frame (SigLIP attention-pooling head output)",
    "pooling_attention": "[F, N] head-averaged attention of the pooling probe",
    "cls_attention": "[F, N] head-averaged attention of the CLS token (softmax over all tokens, CLS included)",
    "received_attention": "[F, N] attention a patch receives from all tokens, averaged over heads and queries",
    "key_states": "[F, N, d] head-averaged key states",
}

STAGES = ("sample", "encode", "compress", "prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method. Fields are hyper-parameters under the names of the paper; keyword-only.

    Class attributes:
        name: registry name, also used in configs, on the command line and in result files.
        title, paper, licence: for tables and acknowledgements.
        signals: names out of :data:`SIGNALS` that the host must provide.
        substitutes: signal -> signal that serves where an encoder lacks the first; its use is reported as adaptation.
        budget_fields: parameters that together say how much is kept. A caller who gives one replaces all of them.
        modalities: kinds of visual item the method changes; others pass through unpruned.
        positions: "original" keeps the position ids of the uncompressed sequence (with gaps; generated tokens go on
            from the uncompressed length), "compact" re-numbers the shortened sequence.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    baseline: ClassVar[bool] = False
    signals: ClassVar[frozenset[str]] = frozenset()
    substitutes: ClassVar[Mapping[str, str]] = {}
    budget_fields: ClassVar[tuple[str, ...]] = ("retention_ratio", "tokens_per_image", "tokens_per_frame")
    modalities: ClassVar[frozenset[str]] = frozenset({"image", "video"})
    positions: ClassVar[str] = "compact"

    @classmethod
    def class_stages(cls) -> tuple[str, ...]:
        """Stages at which the method can act, in pipeline order: those whose stage class it inherits."""
        return tuple(s for s in STAGES if issubclass(cls, _STAGE_CLASSES[s]))

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages at which this object acts: :meth:`class_stages` without those that a parameter has switched off."""
        off = self.stages_off()
        return tuple(s for s in self.class_stages() if s not in off)

    def stages_off(self) -> tuple[str, ...]:
        """Stages that the parameters switch off; a method with such switches overrides this."""
        return ()

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Hyper-parameter names with their defaults (``dataclasses.MISSING`` where required)."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.init}

    @classmethod
    def create(cls, **params: Any) -> Method:
        """Build the method from keyword arguments; unknown names raise :class:`UnknownNameError`."""
        allowed = cls.parameters()
        for key in params:
            if key not in allowed:
                raise UnknownNameError(f"parameter of method {cls.name!r}:", key, allowed)
        return cls(**cls.without_replaced_budget(params), **params)

    @classmethod
    def without_replaced_budget(cls, given: Mapping[str, Any]) -> dict[str, None]:
        """None for the budget fields that ``given`` replaces: all others, as soon as it holds one."""
        if all(given.get(name) is None for name in cls.budget_fields):
            return {}
        return {name: None for name in cls.budget_fields if name in cls.parameters() and name not in given}

    def to_dict(self) -> dict[str, Any]:
        """Name and hyper-parameters, as a config file would hold them."""
        return {"method": self.name, **{f: getattr(self, f) for f in self.parameters()}}

    def describe(self) -> str:
        """One line for tables and logs: the name and the parameters that differ from their defaults."""
        changed = [f"{k}={getattr(self, k)!r}" for k, d in self.parameters().items() if getattr(self, k) != d]
        return f"{self.name}({', '.join(changed)})"

    # -- validation helpers for __post_init__ ------------------------------------------------------------------------

    def _check_number(
        self,
        field: str,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        open_low: bool = False,
        integer: bool = False,
    ) -> None:
        value = getattr(self, field)
        if value is None and (field in self.budget_fields or self.parameters()[field] is None):
            return
        kind = "an integer" if integer else "a number"
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)) or value != value:
            raise MethodError(f"{self.name}: {field} must be {kind}, got {value!r}.")
        if value < low or value > high or (open_low and value == low):
            left = "(" if open_low or low == -math.inf else "["
            right = ")" if high == math.inf else "]"
            allowed = f"{left}{low:g}, {high:g}{right}"
            raise MethodError(f"{self.name}: {field}={value!r} is outside the allowed range {allowed}.")

    def _check_flag(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, bool):
            raise MethodError(f"{self.name}: {field} must be True or False, got {value!r}.")

    def _check_choice(self, field: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise UnknownNameError(f"value of {self.name}.{field}:", value, allowed)


class SampleMethod(Method):
    """Acts on the input frames or pixels before the vision encoder."""

    def input_side(self, side: int, patch: int) -> int:
        """Side in pixels (a multiple of ``patch``) that a ``side`` x ``side`` view is resized to."""
        return side


class CompressMethod(Method):
    """Acts on the visual tokens between vision side and language model.

    ``compress`` gets one image or video as a :class:`~accelerate_methods.items.VisualItem` (features, layout and the
    declared signals) and returns the tokens that go on, where they stand, and for every original token which output
    token holds it.
    """

    def compress(self, item: VisualItem) -> Compressed:
        raise NotImplementedError


class ViewCompressMethod(CompressMethod):
    """Compresses images view by view, before the projector; videos as every compress method.

    The views of an image are its anyres base and tiles, or the one view that there is. Their unpadding and newlines are
    a matter of what comes out (``CompressedViews.newlines``).
    """

    def compress_views(self, views: Views) -> CompressedViews | None:
        """What goes on of one image; None leaves it as the uncompressed model has it."""
        raise NotImplementedError


class PrefillMethod(Method):
    """Acts between decoder layers during prefill.

    ``prefill`` is called with the hidden states entering each layer of :meth:`prefill_layers` and says which of them
    go on. Attention scores are available through ``step`` for chosen rows only.
    """

    def prefill_layers(self, num_layers: int) -> tuple[int, ...]:
        """0-based indices of the decoder layers before which the method acts; ``num_layers``: after the last one."""
        raise NotImplementedError

    def prefill(self, step: PrefillStep) -> Selection | None:
        raise NotImplementedError


class DecodeMethod(Method):
    """Acts on the view that decode steps have of the KV cache (the cache itself stays whole)."""

    def decode_layer(self, num_layers: int) -> int:
        """First decoder layer (0-based) that sees the reduced view; scores come from the layer before it."""
        raise NotImplementedError

    def decode(self, step: DecodeStep) -> torch.Tensor | None:
        """Boolean [B, S] of visible keys, or None for all."""
        raise NotImplementedError


class EncodeMethod(Method):
    """Acts between the blocks of the vision encoder (token merging inside the ViT)."""


_STAGE_CLASSES = {
    "sample": SampleMethod,
    "encode": EncodeMethod,
    "compress": CompressMethod,
    "prefill": PrefillMethod,
    "decode": DecodeMethod,
}
