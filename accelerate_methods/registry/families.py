"""The model families, each declared once: what a method finds there, and under which names it is run.

Tables, checks, the ids of the lmms-eval plugin, default benchmarks and the choice of a native host are read from here.
A family of somebody else's is added by :func:`add` (``hosts.native.register_family`` does so).
"""

from __future__ import annotations

from accelerate_methods.registry.architectures import ARCHITECTURES
from accelerate_methods.registry.model_family import BOTH_MODALITIES, LATER_STAGES, ModelFamily

_CLS = frozenset({"cls_attention", "received_attention", "key_states"})
_CLIP = _CLS | {"image_embeds", "text_embeds"}
_SIGLIP = frozenset({"frame_features", "pooling_attention", "received_attention", "key_states"})
_IMAGE, _BOTH = frozenset({"image"}), BOTH_MODALITIES
_OWN_STAGES = LATER_STAGES | {"encode"}  # of the families here: for one from outside, its host has to say so


def _tree(name: str, key: str, stock_model: str, signals: frozenset[str], modalities: frozenset[str]) -> ModelFamily:
    """A family of the llava package."""
    return ModelFamily(
        name=name,
        key=key,
        stock_model=stock_model,
        chat=False,
        signals=signals,
        modalities=modalities,
        stages=_OWN_STAGES | {"sample"},
        tasks="videomme" if "video" in modalities else "gqa,mme,pope",
    )


def _native(
    name: str, models: dict[str, str], host: str, signals: frozenset[str], modalities: frozenset[str], limits: str = ""
) -> ModelFamily:
    """A family of transformers; ``models``: folder -> beginning of the class name there."""
    return ModelFamily(
        name=name,
        classes=tuple(f"{start}ForConditionalGeneration" for start in models.values()),
        module=tuple(f"transformers.models.{folder}.modeling_{folder}" for folder in models),
        host=f"accelerate_methods.hosts.native.{host}",
        signals=signals,
        modalities=modalities,
        stages=_OWN_STAGES,
        limits=limits,
    )


LLAVA_1_5 = _tree("LLaVA-1.5", "llava", "llava", _CLIP, _IMAGE)
LLAVA_NEXT = _tree("LLaVA-NeXT", "llava", "llava", _CLIP, _IMAGE)
LLAVA_ONEVISION = _tree("LLaVA-OneVision", "llava_onevision", "llava_onevision", _SIGLIP, _BOTH)
LLAVA_VIDEO = _tree("LLaVA-Video", "llava_video", "llava_vid", _SIGLIP, _BOTH)

LLAVA_1_5_HF = _native("LLaVA-1.5-HF", {"llava": "Llava"}, "llava:Llava", _CLIP, _IMAGE)
LLAVA_NEXT_HF = _native("LLaVA-NeXT-HF", {"llava_next": "LlavaNext"}, "llava:LlavaNext", _CLIP, _IMAGE)
LLAVA_NEXT_VIDEO_HF = _native(
    "LLaVA-NeXT-Video-HF", {"llava_next_video": "LlavaNextVideo"}, "llava_next_video:LlavaNextVideo", _CLIP, _BOTH
)
LLAVA_ONEVISION_HF = _native(
    "LLaVA-OneVision-HF", {"llava_onevision": "LlavaOnevision"}, "llava_onevision:LlavaOnevision", _SIGLIP, _BOTH
)
QWEN_VL = _native(
    "Qwen2/2.5/3-VL",
    {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"},
    *("qwen_vl:QwenVL", _SIGLIP | {"patch_pixels"}, _BOTH),
)
INTERNVL = _native(
    *("InternVL", {"internvl": "InternVL"}, "internvl:InternVL", _CLS | {"patch_pixels"}, _IMAGE),
    limits="The frames of a video reach an InternVL model as images, which it cannot tell from others.",
)

#: models of this project's llava package, those of transformers, then the trained architectures of the llava package
FAMILIES = (
    *(LLAVA_1_5, LLAVA_NEXT, LLAVA_ONEVISION, LLAVA_VIDEO),
    *(LLAVA_1_5_HF, LLAVA_NEXT_HF, LLAVA_NEXT_VIDEO_HF, LLAVA_ONEVISION_HF, QWEN_VL, INTERNVL),
    *ARCHITECTURES,
)
_added: list[ModelFamily] = []


def add(family: ModelFamily) -> None:
    """Add a family from outside; it is asked before those here, and one added later before it."""
    _added.insert(0, family)


def families() -> tuple[ModelFamily, ...]:
    """Those of this project, behind those from outside."""
    return (*_added, *FAMILIES)


def family_of_class(module: str, name: str) -> ModelFamily | None:
    """The family that the class ``name``, defined in ``module``, belongs to."""
    for family in families():
        modules = (family.module,) if isinstance(family.module, str) else family.module
        if module in modules and name in family.classes:
            return family
    return None


def keys() -> dict[str, list[ModelFamily]]:
    """Key -> its families, in the order of :data:`FAMILIES`."""
    found: dict[str, list[ModelFamily]] = {}
    for family in FAMILIES:
        found.setdefault(family.key, []).append(family)
    return found
