"""The model class of HICom: what happens between pixels and embeddings."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from accelerate_methods.engine import recording
from accelerate_methods.engine.flops import projector_macs
from accelerate_methods.engine.recording import SampleRecord
from accelerate_methods.hosts.checkpoint_files import weight_names
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry.architectures import architecture
from accelerate_methods.stages.compress import VisualItem
from accelerate_methods.stages.errors import MethodError
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import expand2square, process_images
from llava.model.architectures.asked import Place, places_of
from llava.model.architectures.hicom.compressors import HIComProjector
from llava.model.architectures.hicom.encode import items_of, macs, seen_as
from llava.model.architectures.hicom.grammar import branches, is_compressor, with_mode
from llava.model.architectures.hicom.instruction import instruction_in
from llava.model.architectures.hicom.tower import GuidedSigLipTower
from llava.model.architectures.text_towers import text_macs
from llava.model.checkpoint import CheckpointError, check_whole_tower, load_config
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM, LlavaQwenModel
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import Prompts, Spliced
from llava.model.vision import gather_visuals, has_images

#: the official id of a video's placeholder; an image's is that of LLaVA
VIDEO_TOKEN_INDEX = -201
#: channels of an attention head; configs of released models do not say
HEAD_WIDTH = 128
_CLASS = "HIComQwen2ForCausalLM"


class HIComConfig(LlavaQwenConfig):
    model_type = "hicom_qwen2"


class HIComModel(LlavaQwenModel):
    """The decoder with tower and projector. It has a newline only for images of any resolution."""

    config_class = HIComConfig

    def __init__(self, config: HIComConfig):
        super().__init__(config)
        tiled = "anyres" in (getattr(config, "image_aspect_ratio", None) or "")
        if tiled and not hasattr(self, "image_newline"):
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)
        elif not tiled and hasattr(self, "image_newline"):
            del self.image_newline
        self._no_split_modules = {*(self._no_split_modules or ()), HIComProjector.__name__}

    @staticmethod
    def build_tower(config: Any, **how: Any) -> nn.Module:
        return GuidedSigLipTower(config.mm_vision_tower, config, **how)

    @staticmethod
    def build_projector(config: Any) -> nn.Module:
        kind = getattr(config, "mm_projector_type", "linear")
        if not is_compressor(kind):
            return build_vision_projector(config)
        guide = getattr(config, "use_guide", None)
        local, whole = branches(kind, guide)
        guided = guide not in (None, "", "off")
        if not guided and any(branch is not None and branch.mode != "off" for branch in (local, whole)):
            raise CheckpointError(
                f"mm_projector_type {kind!r} wants an instruction, and use_guide {guide!r} switches its reader off."
            )
        scales = set((getattr(config, "use_clip_scale", None) or "").split(",")) & {"local", "global"}
        width = config.mm_hidden_size
        head_width = getattr(config, "hicom_head_dim", HEAD_WIDTH)
        return HIComProjector(local, whole, (width, width, config.hidden_size), head_width, frozenset(scales))


class HIComQwen2ForCausalLM(LlavaQwenForCausalLM):
    """``questions``: the bare question of each prompt, read out of it where nobody says.

    The official arguments are understood, too: ``guided_input``, ids [n, 64] of the instructions (or a dict with them
    as ``input_ids``), for each prompt or each image and video; ``guide_instruct``, their texts, which are taken as they
    are; ``images`` as a list of (views, size, "image" or "video"); placeholders of videos with the id -201.

    Raises:
        CheckpointError: another decoder than Qwen2, or a projector that nothing is known of.
    """

    config_class = HIComConfig
    about = architecture("hicom")
    visual_arguments = ("guided_input", "guide_instruct")
    tokens_have_places: ClassVar[bool] = False
    weight_names: ClassVar[Mapping[str, str]] = {
        r"^model\.vision_tower\.guide_encoder\.text_model\.": "model.vision_tower.guide_encoder."
    }

    def __init__(self, config: HIComConfig):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.build(config, HIComModel)
        self._work: dict[tuple[str, int], int] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As for every model of the tree; how the instruction is injected is what the weights are for."""
        path, config, state = pretrained_model_name_or_path, kwargs.get("config"), kwargs.get("state_dict")
        config = load_config(cls.config_class, path) if config is None else config
        named = getattr(config, "architectures", None) or [_CLASS]
        if _CLASS not in named:
            raise CheckpointError(f"{str(path)!r}: its decoder is {', '.join(named)}; released are models on Qwen2.")
        _follow_weights(config, weight_names(path) if state is None else set(state))
        want_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *args, **{**kwargs, "config": config, "output_loading_info": True})
        check_whole_tower(info, path, "its tower")
        return (model, info) if want_info else model

    def made_up(self) -> None:
        if self.get_vision_tower().guided:
            self.get_vision_tower().tokens.make_up()

    # -- what callers give -------------------------------------------------------------------------------------------

    @functools.wraps(LlavaQwenForCausalLM.forward)
    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any):
        if input_ids is not None and input_ids.shape[1] > 1 and not has_images(kwargs.get("images")):
            input_ids = _one_placeholder(input_ids)  # for the error that says what is missing
        return super().forward(input_ids, *args, **kwargs)

    def _text_only(self, inputs: Tensor, *args: Any) -> Spliced:
        return super()._text_only(_one_placeholder(inputs), *args)

    def prepare_multimodal(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        images: Any,
        modalities: str | list[str] = ("image",),
        image_sizes: Any = None,
        request: recording.RequestRecord | None = None,
        **how: Any,
    ) -> Spliced:
        if isinstance(images, (list, tuple)) and all(isinstance(image, (list, tuple)) for image in images):
            images, image_sizes, modalities = _official(images)
        kinds = _kinds(input_ids, modalities, len(images))
        return super().prepare_multimodal(
            _one_placeholder(input_ids), attention_mask, labels, images, kinds, image_sizes, request, **how
        )

    def image_inputs(self, images: Sequence[Image.Image], image_processor: Any, **arguments: Any) -> Any:
        """Pictures; several are padded to squares, also in a model of any resolution."""
        if len(images) == 1:
            return process_images(images, image_processor, self.config)
        return _squares(images, image_processor)

    def video_inputs(self, frames: np.ndarray, image_processor: Any, **arguments: Any) -> Tensor:
        """Frames of a video, padded to squares unless the model's images are of any resolution."""
        pictures = [Image.fromarray(frame) for frame in frames]
        if getattr(self.config, "image_aspect_ratio", "pad") == "pad":
            return _squares(pictures, image_processor)
        return image_processor.preprocess(pictures, return_tensors="pt")["pixel_values"]

    def frame_indices(self, total: int, rate: float, **arguments: Any) -> list[int]:
        """The middle of each of so many equal parts of the video; those of a short one repeat frames."""
        count = arguments.get("max_frames_num") or getattr(self.config, "num_frames", None) or self.about.frames
        edges = np.arange(count + 1) * (float(total - 1) / count)
        return np.round((edges[:-1] + edges[1:]) / 2 + 1e-6).astype(int).tolist()

    def own_macs(self, sample: SampleRecord, **call: Any) -> int:
        """Of the text model and both branches; tokens of tiles count as those of one view.

        A record does not say how many frames there were: as many as their blocks hold.
        """
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        if not isinstance(projector, HIComProjector):
            return projector_macs(sample.visual_tokens_before, projector)
        text = text_macs(tower.guide_encoder.config, tower.tokens.limit) if tower.guided else 0
        words = tower.tokens.limit if tower.guided and projector.reads_words else 1
        total = 0
        for item in sample.items:
            key = (item.modality, item.tokens_before)
            if key not in self._work:
                form = (self.config.mm_hidden_size, item.tokens_before, item.modality, tower.num_patches, words)
                with torch.device("meta"):
                    twin = self.model.build_projector(self.config).requires_grad_(False)
                self._work[key] = text + macs(twin, *form)
            total += self._work[key]
        return total

    # -- encode ------------------------------------------------------------------------------------------------------

    def encode_for(
        self, prompts: Prompts, images: Any, modalities: list[str], image_sizes: Any,
        request: recording.RequestRecord | None = None,
    ) -> list[VisualItem]:  # fmt: skip
        """The tokens of every image and video, asked with the instruction at each of its placeholders."""
        tower, projector = self.get_vision_tower(), self.get_model().mm_projector
        tower.check_loaded()
        pixels, visuals = gather_visuals(images, modalities, image_sizes, tower.device)
        with recording.stage(request, "vision", tower.device):
            places, guide = self._asked(prompts, len(visuals))
            dtype = next(projector.parameters()).dtype
            states = tuple(None if part is None else part.to(dtype) for part in tower.see(pixels))
            guide = None if guide is None else guide.to(dtype)
            seen = [seen_as(visual, states, tower.image_size, self.config) for visual in visuals]
            newline = self._newline(states[0])
            return items_of([seen[place.item] for place in places], guide, projector, newline, self.config)

    def _asked(self, prompts: Prompts, count: int) -> tuple[list[Place], Tensor | None]:
        """What is shown at each placeholder, and the instruction there [n, L, K]; None without instruction."""
        tower, who = self.get_vision_tower(), self.about.name
        ids, texts = prompts.own.get("guided_input"), prompts.own.get("guide_instruct")
        if not tower.guided:
            return places_of(prompts, count, None, who, asked=False), None
        if ids is not None:
            places = places_of(prompts, count, None, who, asked=False)
            rows, order = _given_ids(ids, places, len(prompts.input_ids), tower.tokens.limit)
        else:
            tokenizer = self.prompt_tokenizer or getattr(self.acceleration, "tokenizer", None)
            places = places_of(prompts, count, tokenizer, who, given=texts)
            asked = [place.question if texts is not None else instruction_in(place.question) for place in places]
            different = list(dict.fromkeys(asked))
            rows, order = tower.tokens.padded(different), [different.index(text) for text in asked]
        guide = tower.read(rows, self.get_model().mm_projector.reads_words)
        return places, guide if order == list(range(len(guide))) else guide[on_device(order, guide.device)]

    def project(self, features: Tensor) -> Tensor:
        if isinstance(self.get_model().mm_projector, HIComProjector):
            raise MethodError("HICom's tokens depend on the instruction: ask generate or forward, which know it.")
        return super().project(features)


def _follow_weights(config: HIComConfig, names: set[str]) -> None:
    """Inject the instruction as the weights say: released scripts name a mode that the grammar does not understand."""
    kind = config.mm_projector_type
    if not is_compressor(kind):
        return
    parsed = dict(zip(("local", "global"), branches(kind, getattr(config, "use_guide", None)), strict=True))
    for branch, setting in parsed.items():
        for mode in ("coarse", "fine"):
            start = f"model.mm_projector.{branch}_compressor.guide_injector.{mode}_proj."
            if setting is None or setting.mode == mode or not any(name.startswith(start) for name in names):
                continue
            config.mm_projector_type = with_mode(config.mm_projector_type, branch, mode)
            warnings.warn(
                f"mm_projector_type {kind!r} says {setting.mode!r} for the {branch} branch, and its weights are for "
                f"{mode!r}; the weights are followed ({config.mm_projector_type!r}).",
                stacklevel=3,
            )


def _official(images: Sequence[Any]) -> tuple[list[Tensor], list[Any], list[str]]:
    """Views, sizes and kinds of the official form of ``images``; a size may be a list of one."""
    views, sizes, kinds = (list(part) for part in zip(*images, strict=True))
    return views, [size[0] if isinstance(size, list) and len(size) == 1 else size for size in sizes], kinds


def _kinds(ids: Tensor, modalities: str | Sequence[str], count: int) -> list[str]:
    """The modality of each image or video: what is said, or that of its placeholder."""
    kinds = [modalities] * count if isinstance(modalities, str) else [*modalities, *["image"] * count][:count]
    marks = ids[ids < 0].tolist()
    if len(marks) != count and VIDEO_TOKEN_INDEX in marks and IMAGE_TOKEN_INDEX not in marks:
        return ["video"] * count
    if len(marks) != count:
        return kinds
    return ["video" if mark == VIDEO_TOKEN_INDEX else kind for mark, kind in zip(marks, kinds, strict=True)]


def _one_placeholder(ids: Tensor) -> Tensor:
    return ids.masked_fill(ids == VIDEO_TOKEN_INDEX, IMAGE_TOKEN_INDEX)


def _given_ids(ids: Any, places: Sequence[Place], prompts: int, limit: int) -> tuple[Tensor, list[int]]:
    """Ids [n, L] of instructions as a caller gave them, and which of them each placeholder has.

    Raises:
        MethodError: not one for all, one for each prompt or one for each placeholder, or longer than the positions.
    """
    ids = torch.as_tensor(ids if isinstance(ids, (Tensor, list, tuple)) else ids["input_ids"])
    ids = ids[None] if ids.ndim == 1 else ids
    orders = {1: [0] * len(places), prompts: [place.sample for place in places], len(places): [*range(len(places))]}
    if ids.ndim != 2 or len(ids) not in orders or not 0 < ids.shape[1] <= limit:
        raise MethodError(
            f"guided_input must be ids [n, {limit}] with n 1, the prompts ({prompts}) or the images and videos "
            f"({len(places)}), got {list(ids.shape)}."
        )
    return ids, orders[len(ids)]


def _squares(pictures: Sequence[Image.Image], image_processor: Any) -> Tensor:
    """[N, 3, S, S] of pictures padded to squares in the processor's mean colour."""
    background = tuple(int(mean * 255) for mean in image_processor.image_mean)
    padded = [expand2square(picture.convert("RGB"), background) for picture in pictures]
    return image_processor.preprocess(padded, return_tensors="pt")["pixel_values"]


AutoConfig.register("hicom_qwen2", HIComConfig, exist_ok=True)
AutoModelForCausalLM.register(HIComConfig, HIComQwen2ForCausalLM, exist_ok=True)
