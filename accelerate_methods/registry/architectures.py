"""Trained architectures, each declared once: models of the llava package that were trained to use few visual tokens.

The tables of the README, the list and the facts on the pages of docs/architectures/, the ids and typed arguments of the
lmms-eval plugin, the scripts and ``python -m accelerate_methods`` are made from here (docs/adding_an_architecture.md).
What a model computes stands in ``llava/model/architectures/<file>.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from accelerate_methods.registry.model_family import LATER_STAGES, ModelFamily
from accelerate_methods.stages.errors import UnknownNameError
from accelerate_methods.stages.fields import Rule

_NONE: frozenset[str] = frozenset()
_IMAGE = frozenset({"image"})


@dataclasses.dataclass(frozen=True)
class Argument:
    """A number or word that a user chooses when a model runs: one of ``--model_args`` of lmms-eval.

    Attributes:
        rule: what it may be (``Rule("integer", low=1, high=256)``, ``Rule("flag")``, ``Rule("choice", options=...)``).
        default: None where the model then decides.
        meaning: a sentence for tables.
        call: whether ``forward`` and ``generate`` take it; the others go to the methods of the model that prepare
            prompts and media (``llava/model/inputs.py``).
    """

    name: str
    rule: Rule
    default: Any
    meaning: str
    call: bool = False

    def checked(self, model: str, value: Any) -> Any:
        """``value`` in its type; text as a command line gives it is read.

        Raises:
            MethodError: it is not allowed, with what is.
        """
        if isinstance(value, str):
            readers = {"integer": int, "number": float, "flag": {"true": True, "false": False}.__getitem__}
            with contextlib.suppress(ValueError, KeyError):
                value = readers.get(self.rule.kind, str)(value.strip().lower() if self.rule.kind == "flag" else value)
        return self.rule.checked(model, self.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture(ModelFamily):
    """A family of models with an architecture of their own.

    Attributes:
        file: name of the file in ``llava/model/architectures``, of the docs page, the tests and the golden folder.
        key: its model id in lmms-eval.
        paper: "arXiv 2405.19315"; venue: where it was published, with the year.
        code: repository and commit that ours follows, "owner/name@commit"; licence: of that code.
        checkpoints: hub names of released weights; the first is what scripts name. Empty: none were released.
        weights_licence: of the released weights; "" where nobody says.
        tokens: visual tokens that reach the language model, per image (per frame, per video), a phrase for tables.
        template: conversation of its prompts, a name in ``llava.conversation``.
        arguments: what a user chooses at run time.
        levels: values of run parameters that the paper's tables have, for scripts (``METHODS=levels``).
        frames: of a video, unless the user says otherwise (``max_frames_num``).
        bench: name of its shape in the bench (``bench/architecture_shapes.py``); "" without one.
    """

    file: str
    paper: str
    venue: str = ""
    code: str
    licence: str
    checkpoints: tuple[str, ...] = ()
    weights_licence: str = ""
    tokens: str
    template: str
    arguments: tuple[Argument, ...] = ()
    levels: tuple[dict[str, Any], ...] = ()
    frames: int = 32
    stock_model: str = "llava"
    chat: bool = False
    tasks: str = "gqa,mme,pope"
    bench: str = ""

    def argument(self, name: str) -> Argument:
        """The argument called ``name``; :class:`UnknownNameError` with the nearest match otherwise."""
        known = {argument.name: argument for argument in self.arguments}
        if name not in known:
            raise UnknownNameError(f"run parameter of {self.name}:", name, known)
        return known[name]

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every run parameter by name: as given, in its type, or its default.

        Raises:
            UnknownNameError: one that there is not. MethodError: a value that is not allowed.
        """
        own = {name: self.argument(name).checked(self.name, value) for name, value in given.items()}
        return {**{argument.name: argument.default for argument in self.arguments}, **own}

    def for_generate(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``values`` that ``forward`` and ``generate`` take; what is None is left to the model."""
        given = {argument.name: values.get(argument.name) for argument in self.arguments if argument.call}
        return {name: value for name, value in given.items() if value is not None}

    def for_inputs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``values`` that the steps of ``llava/model/inputs.py`` take, ``max_frames_num`` among them."""
        own = {argument.name: values[argument.name] for argument in self.arguments if not argument.call}
        count = values.get("max_frames_num")
        return own if count is None else {"max_frames_num": count, **own}


MQT = Architecture(
    name="MQT-LLaVA",
    file="mqt",
    key="mqt_llava",
    paper="arXiv 2405.19315",
    venue="NeurIPS 2024",
    code="gordonhu608/MQT-LLaVA@92c35d06",
    licence="Apache-2.0",
    checkpoints=("gordonhu/MQT-LLaVA-7b",),
    weights_licence="that of Vicuna-7B v1.5 (Llama 2 community licence)",
    tokens="1 to 256 per image or frame, as asked; 256 by default",
    template="vicuna_v1",
    bench="mqt-llava-7b",
    levels=tuple({"num_visual_tokens": count} for count in (2, 16, 36, 64, 144)),
    frames=8,  # at 256 tokens each they fill half of Vicuna's context
    # the tokens are those of queries: no patch has a place among them, so no signal over patches and no encode stage
    signals=_NONE,
    stages=LATER_STAGES,
    arguments=(
        Argument(
            "num_visual_tokens",
            Rule("integer", low=1, high=256),
            256,
            "Visual tokens per image or frame: the first so many of the 256 queries.",
            call=True,
        ),
    ),
)

FASTVLM = Architecture(
    name="FastVLM",
    file="fastvlm",
    key="fastvlm",
    paper="arXiv 2412.13303",
    venue="CVPR 2025",
    code="apple/ml-fastvlm@592b4add",
    licence="Apple's licence for the repository's code",
    checkpoints=("apple/FastVLM-7B", "apple/FastVLM-1.5B", "apple/FastVLM-0.5B"),
    weights_licence="Apple Machine Learning Research Model licence (apple-amlr): research only",
    tokens="256 per image of 1024 x 1024 pixels, (S / 64)^2 for another side S",
    template="qwen_2",
    frames=16,  # at 256 tokens each they fill half of the context
    # convolutions and attention over maps: no encoder layer like CLIP's to act in or to read signals from
    signals=_NONE,
    stages=LATER_STAGES | {"sample"},
    bench="fastvlm-7b",
)

LLAVA_MINI = Architecture(
    name="LLaVA-Mini",
    file="llava_mini",
    key="llava_mini",
    paper="arXiv 2501.03895",
    venue="ICLR 2025",
    code="ictnlp/LLaVA-Mini@47da1137",
    licence="Apache-2.0",
    checkpoints=("ICTNLP/llava-mini-llama-3.1-8b",),
    weights_licence="GPL-3.0, and the licence of Llama 3.1",
    tokens="1 per image or frame in the released model; the square of compressor_size in general",
    template="llava_llama_3_1",
    frames=1000,  # one per second, and no more than its authors look at
    # the tokens are those of queries, fused with the image: no patch has a place among them
    signals=_NONE,
    stages=LATER_STAGES,
    bench="llava-mini-8b",
)

LLAMA_VID = Architecture(
    name="LLaMA-VID",
    file="llama_vid",
    key="llama_vid",
    paper="arXiv 2311.17043",
    venue="ECCV 2024",
    code="dvlab-research/LLaMA-VID@b3d3ae2b",
    licence="Apache-2.0",
    checkpoints=(
        "YanweiLi/llama-vid-7b-full-224-video-fps-1",
        "YanweiLi/llama-vid-13b-full-224-video-fps-1",
        "YanweiLi/llama-vid-7b-full-224-long-video",
        "YanweiLi/llama-vid-7b-full-224",
        "YanweiLi/llama-vid-7b-full-336",
        "YanweiLi/llama-vid-13b-full-336",
    ),
    weights_licence="CC BY-NC 4.0, research only; and that of Vicuna v1.5 (Llama 2 community licence)",
    tokens="2 per frame (question and content) in the video models; 257 or 577 per image in the image models",
    template="vicuna_v1",
    frames=1900,  # one per second; more do not fit into the context of the short-video models
    # the tokens are those of queries and of pooled patches, made with the question: no signal over patches
    signals=_NONE,
    stages=LATER_STAGES,
    arguments=(
        Argument("fps", Rule("number", low=0, open_low=True), 1, "Frames per second of a video that are looked at."),
    ),
    tasks="videomme",
    bench="llama-vid-7b-video",
)

VIDEO_XL = Architecture(
    name="Video-XL",
    file="video_xl",
    key="video_xl",
    paper="arXiv 2409.14485",
    venue="CVPR 2025",
    code="VectorSpaceLab/Video-XL@6e3dc89",
    licence="Apache-2.0",
    checkpoints=("sy1998/Video_XL",),
    tokens="144 per frame are read, 144 / beacon_ratio stay in the KV cache",
    template="qwen_1_5",
    frames=128,
    # its decoder reads a prompt in windows of its own, in which no other method can act
    signals=_NONE,
    stages=frozenset({"sample", "compress"}),
    tasks="videomme",
    arguments=(
        Argument(
            "beacon_ratio",
            Rule("integer", low=1),
            None,
            "Visual tokens for each summary token; without it one of the checkpoint's ratios is drawn for each window.",
            call=True,
        ),
    ),
    bench="video-xl-7b",
)

FLASHSLOTH = Architecture(
    name="FlashSloth",
    file="flashsloth",
    key="flashsloth",
    paper="arXiv 2412.04317",
    venue="CVPR 2025",
    code="codefanw/FlashSloth@881445a",
    licence="Apache-2.0",
    checkpoints=("Tongbo/FlashSloth-3.2B", "Tongbo/FlashSloth_HD-3.2B"),
    weights_licence="",
    tokens="81 per image, 405 in high resolution; and 9 queries per turn",
    template="vicuna_v1",
    # the tokens are regions of patches: no signal over patches is one over them
    signals=_NONE,
    modalities=_IMAGE,
    limits="It was trained on images alone.",
    stages=LATER_STAGES,
    bench="flashsloth-3.2b",
)

HICOM = Architecture(
    name="HICom",
    file="hicom",
    key="hicom",
    paper="arXiv 2503.16036",
    venue="CVPR 2025",
    code="lntzm/HICom@df67ea1c",
    licence="Apache-2.0",
    checkpoints=("lntzm/HICom_7B_qwen25_directg_local43_global32",),
    weights_licence="not said; the repository is Apache-2.0, for non-commercial use",
    tokens="680 of 32 frames (81 for each four of them, and 32 in all); 113 per image",
    template="qwen_2_5",
    bench="hicom-7b",
    # blocks asked for by the question, and queries: no signal over patches is one over them
    signals=_NONE,
    stages=LATER_STAGES,
    tasks="videomme",
)

VOCO_LLAMA = Architecture(
    name="VoCo-LLaMA",
    file="voco_llama",
    key="voco_llama",
    paper="arXiv 2406.12275",
    venue="CVPR 2025",
    code="Yxxxb/VoCo-LLaMA@3b6e14d9",
    licence="Apache-2.0",
    tokens="576 per image or frame once, of which num_voco (2 by default) stay in the cache for the text",
    template="voco_v1",
    # its own two calls of the decoder take the place of the decoder loop: no method acts inside it or on its cache
    signals=frozenset({"cls_attention", "received_attention", "key_states"}),
    stages=frozenset({"sample", "encode", "compress"}),
    arguments=(
        Argument(
            "num_voco",
            Rule("integer", low=1),
            2,
            "``<voco>`` tokens behind the images of a prompt: as many as the checkpoint was trained with.",
        ),
    ),
    bench="voco-llama-7b",
)

TG_LLAVA = Architecture(
    name="TG-LLaVA",
    file="tg_llava",
    key="tg_llava",
    paper="arXiv 2409.09564",
    venue="AAAI 2025",
    code="AIDC-AI/TG-LLaVA@0009eb8",
    licence="Apache-2.0",
    tokens="640 per image: its 576 patches and 64 latents",
    template="mpt",
    bench="tg-llava-7b",
    # patches with the question in them, and latents behind them: no signal over patches is one over all of them
    signals=_NONE,
    modalities=_IMAGE,
    limits="It was trained on images alone.",
    stages=LATER_STAGES,
)

#: in the order in which a checkpoint's config is shown to them; no two may recognise the same one
ARCHITECTURES: tuple[Architecture, ...] = (
    MQT,
    FASTVLM,
    LLAVA_MINI,
    LLAMA_VID,
    VIDEO_XL,
    FLASHSLOTH,
    HICOM,
    VOCO_LLAMA,
    TG_LLAVA,
)


def architecture(file: str) -> Architecture:
    """The entry of ``llava/model/architectures/<file>.py``.

    Raises:
        UnknownNameError: there is none, with the nearest match.
    """
    known = {entry.file: entry for entry in ARCHITECTURES}
    if file not in known:
        raise UnknownNameError("architecture", file, known)
    return known[file]


def architecture_named(key: str) -> Architecture | None:
    """The entry whose model id in lmms-eval is ``key``, None where that is a family of another kind."""
    return next((entry for entry in ARCHITECTURES if entry.key == key), None)
