"""Family ``hf``: models of transformers itself, asked in messages through their own processors and chat templates.

Images, videos, defaults and prompts are those of the stock chat class for the checkpoint (``stock.py``). Those classes
cannot be subclassed: each loads, asks and generates in one piece.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatImageContent, ChatMessages
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from accelerate_methods import accelerate
from accelerate_methods.hosts.checkpoint_files import CheckpointError, check_files, check_loaded, read_config, reading
from accelerate_methods.hosts.native.host import class_names, family_of
from accelerate_methods.hosts.questions import plain_question
from accelerate_methods.registry import compatibility, plugins
from accelerate_methods.stages.errors import MethodError, one_line
from llava.media_kind import kind_of
from lmms_eval_accelerate.models.arguments import HF
from lmms_eval_accelerate.models.batching import is_padding
from lmms_eval_accelerate.models.clips import Clip, fitted_image, read_clip
from lmms_eval_accelerate.models.engine import Accelerated
from lmms_eval_accelerate.models.failing import failing_loudly
from lmms_eval_accelerate.models.loading import Loaded
from lmms_eval_accelerate.models.question import Question
from lmms_eval_accelerate.models.stock import QWEN_MAX_PIXELS, QWEN_MIN_PIXELS, sampling_of, stock_of
from lmms_eval_accelerate.models.visuals import (
    UnsupportedVisual,
    VisualError,
    from_document,
    from_file,
    names_of,
    read_image,
    without_media,
)


@dataclasses.dataclass
class ChatQuestion(Question):
    """``text`` is the chat in the model's template; ``visuals`` are RGB images and :class:`Clip`, in its order."""

    @property
    def images(self) -> list[Any]:
        return [visual for visual in self.visuals if not isinstance(visual, Clip)]

    @property
    def clips(self) -> list[Clip]:
        return [visual for visual in self.visuals if isinstance(visual, Clip)]

    @property
    def pictures(self) -> list[Tensor]:
        return [(v.frames if isinstance(v, Clip) else pil_to_tensor(v)[None]) / 255 for v in self.visuals]


class HfAccelerated(Accelerated):
    """Any checkpoint of a class that has a host; see ``accelerate_methods/hosts/native``."""

    is_simple = False
    family = "hf"
    prompt_in_output = True
    defaults: ClassVar[dict[str, Any]] = HF

    # -- start -------------------------------------------------------------------------------------------------------

    def _load_weights(self, dtype: str, device_map: Any, max_memory: dict[int, int] | None) -> Loaded:
        name = str(self.args.pretrained)
        model_class = self._class_of(name)
        compatibility.check(self.args.pipeline, self.family, model_class.__name__)  # before the weights are read
        processor = _processor(name)
        with reading(name):
            model, info = model_class.from_pretrained(
                name,
                dtype=dtype,
                attn_implementation=self.args.attn_implementation,
                device_map=device_map or self._placement.device,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_loaded refuses them, with their names
                **({} if max_memory is None else {"max_memory": max_memory}),
            )
        check_loaded(info, name)
        return Loaded(model, processor.tokenizer, processor)

    @staticmethod
    def _class_of(name: str) -> type:
        read_config(name)  # says what is wrong with a checkpoint that cannot be reached or read
        check_files(name)
        config = _config(name)
        model_class = AutoModelForImageTextToText._model_mapping.get(type(config), None)
        plugins.import_named()
        built = config.architectures or []
        # the LLaVA-NeXT repository's checkpoints have model types of transformers
        fits = model_class is not None and model_class.__name__ in (built or [model_class.__name__])
        if not fits or family_of(model_class) is None:
            built = ", ".join(built) or config.model_type
            raise MethodError(
                f"{name} is a {built}; no host is known for it. The family hf runs {', '.join(class_names())}. "
                "Checkpoints of the LLaVA-NeXT repository run as llava, llava_onevision or llava_video."
            )
        return model_class

    def _prepare(self, loaded: Loaded) -> Any:
        self.processor, args = loaded.processor, self.args
        name = type(self.model).__name__
        compatibility.check(args.pipeline, self.family, name)
        self._stock = stock_of(name)
        if self.prompt_model == "auto":
            self.prompt_model = self._stock.model
        self._system = self._stock.system_prompt if args.system_prompt == "auto" else args.system_prompt
        vision = getattr(self.config, "vision_config", None)
        self._image_sampling, self._clip_sampling = sampling_of(args, self._stock, getattr(vision, "patch_size", None))
        self._template = None if args.chat_template is None else _template(args.chat_template)
        if self._template is None and not (self.processor.chat_template or self.tokenizer.chat_template):
            raise MethodError(f"{args.pretrained} has no chat template; give one with chat_template=FILE.")
        # a dense run too: what it costs is measured there
        return accelerate(self.model, args.pipeline, tokenizer=loaded.tokenizer)

    def normalisation(self) -> tuple[Any, Any]:
        return [0.0] * 3, [1.0] * 3

    def more_settings(self) -> dict[str, Any]:
        used = {"class": type(self.model).__name__, "prompt_model": self.prompt_model, "system_prompt": self._system}
        return {**used, "clips": dataclasses.asdict(self._clip_sampling)}

    def sampling(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        chosen = super().sampling({"max_new_tokens": self._stock.max_new_tokens, **gen_kwargs})
        if chosen["do_sample"]:
            chosen["top_k"] = gen_kwargs.get("top_k")
        return chosen

    # -- questions ---------------------------------------------------------------------------------------------------

    def _read(
        self,
        context: str,
        doc_to_messages: Callable,
        gen_kwargs: dict,
        doc_id: Any,
        task: str,
        split: str,
        metadata: dict | None,
    ) -> ChatQuestion:
        where = f"task {task}, split {split}, doc {doc_id}"
        messages, files = from_document(doc_to_messages, self.task_dict[task][split], doc_id, where)
        return self._question(messages, (task, doc_id, split), where, files)

    def _question(
        self, messages: list[dict[str, Any]], document: tuple[str, Any, str], where: str, files: str = ""
    ) -> ChatQuestion:
        """
        Args:
            document: (task, document number, split).
            files: media files that the document mentions, for messages about pictures that do not know theirs.
        """
        chat = _pictures_as_images(ChatMessages(messages=messages))
        visuals: list[Any] = []
        plain = _asked(chat)
        task, doc_id, split = document
        choosing = self.choosing(self.task_dict[task][split], doc_id, plain)
        for content in [part for message in chat.messages for part in message.content]:
            if content.type == "image":
                visuals.append(self._image(content.url, files, where))
            elif content.type == "video":
                visuals.append(self._clip(content, where, choosing))
            elif content.type != "text":
                raise UnsupportedVisual(f"{where}: the family hf reads images and videos, not {content.type}.")
        turns = chat.to_hf_messages()
        if self._system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system}]})
        more = {} if self._template is None else {"chat_template": self._template}
        text = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)
        kinds = {"video" if isinstance(visual, Clip) else "image" for visual in visuals}
        source = f"{where} ({names_of(visuals)})"
        form = "+".join(sorted(kinds)) or "text"
        thinned = choosing["sampler"].thinned if choosing else []
        of = {"document": (task, doc_id), "plain": plain, "source": source, "thinned": thinned}
        return ChatQuestion(text, visuals, form, **of)

    def _image(self, image: Any, files: str, where: str) -> Any:
        image = read_image(from_file(image, files) if isinstance(image, Image.Image) else image, where)
        return fitted_image(image, self._image_sampling, where) if self._stock.qwen else image

    def _clip(self, content: Any, where: str, choosing: dict[str, Any]) -> Clip:
        if not self._stock.videos:
            raise UnsupportedVisual(f"{where}: {type(self.model).__name__} reads images, not videos.")
        video, span = content.url, {"video_start": content.start_time, "video_end": content.end_time}
        if any(value is not None for value in span.values()):
            video = {"path": video, **span}
        return read_clip(video, self._clip_sampling, where, choosing)

    def _inputs(self, questions: list[Question]) -> tuple[Tensor, dict[str, Any]]:
        kwargs: dict[str, Any] = {"text": [q.text for q in questions]}
        if questions[0].images:
            kwargs["images"] = [q.images for q in questions]  # nested: a processor may treat several images otherwise
            kwargs["images_kwargs"] = self._image_options()
        clips = [clip for q in questions for clip in q.clips]
        if clips:
            kwargs["videos"] = [clip.frames for clip in clips]
            kwargs["videos_kwargs"] = {
                "do_sample_frames": False,
                "video_metadata": [clip.metadata for clip in clips],
                **({"do_resize": False} if self._stock.qwen else {}),
            }
        text = {"padding": True, "padding_side": "left"}
        made = dict(self.processor(**kwargs, text_kwargs=text, return_tensors="pt"))
        ids = made.pop("input_ids").to(self._device)
        inputs = {name: value.to(self._device) if isinstance(value, Tensor) else value for name, value in made.items()}
        if questions[0].visuals:
            inputs["questions"] = [q.plain for q in questions]
        for name in [name for name in inputs if name.startswith("pixel_values")]:
            inputs[name] = inputs[name].to(self.model.dtype)
        return ids, inputs

    def _image_options(self) -> dict[str, Any]:
        if not self._stock.qwen:
            return {}
        if not self._stock.limited_images:
            return {"do_resize": False}
        least = QWEN_MIN_PIXELS if self.args.min_pixels is None else int(self.args.min_pixels)
        most = QWEN_MAX_PIXELS if self.args.max_pixels is None else int(self.args.max_pixels)
        return {"size": {"shortest_edge": least, "longest_edge": most}}

    # -- other requests ----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        with failing_loudly():
            raise MethodError("the family hf answers in chats; it runs tasks of output type generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers of all rounds per document; the task's ``doc_to_messages`` asks the next round or ends it."""
        with failing_loudly():
            self._begin(requests)
            return [[] if is_padding(request) else self._rounds(request) for request in requests]

    def _rounds(self, request: Instance) -> list[str]:
        _, doc_to_messages, gen_kwargs, doc_id, task, split = request.args
        where = f"task {task}, split {split}, doc {doc_id}"
        documents = self.task_dict[task][split]
        answers: list[str] = []
        messages, state, files = None, None, ""
        while True:
            try:
                if messages is None:
                    messages, files = from_document(doc_to_messages, documents, doc_id, where)
                question = self._question(messages, (task, doc_id, split), where, files)
                answers.append(self._generate([question], gen_kwargs)[0].text)
            except VisualError as error:
                self._skip(error)
                answers.append("")
                document = without_media(documents, doc_id)
            else:
                document = documents[doc_id]
            so_far = {"round_idx": len(answers), "previous_output": answers, "previous_round_info": state}
            messages, ends, outputs, state = doc_to_messages(document, **so_far)
            answers = list(outputs)
            if ends:
                return answers


def _asked(chat: ChatMessages) -> str:
    """What the user asks in the last of its messages."""
    users = [message for message in chat.messages if message.role == "user"] or chat.messages
    return plain_question("\n".join(part.text for part in users[-1].content if part.type == "text"))


def _pictures_as_images(chat: ChatMessages) -> ChatMessages:
    """A task may call a picture a video: its content decides, and the placeholder in the prompt with it."""
    for message in chat.messages:
        message.content = [
            ChatImageContent(url=content.url)
            if content.type == "video"
            and isinstance(content.url, (str, os.PathLike))
            and kind_of(content.url) == "picture"
            else content
            for content in message.content
        ]
    return chat


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # every release of transformers checks values in its own way
        raise CheckpointError(f"cannot use the config of {name!r}: {one_line(error)}") from error


def _processor(name: str) -> Any:
    try:
        with reading(name):
            processor = AutoProcessor.from_pretrained(name)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise MethodError(f"{name}: its processor cannot be loaded ({one_line(error)}).") from error
    if getattr(processor, "tokenizer", None) is None:
        raise MethodError(f"{name} has no processor (only a {type(processor).__name__}); its files are incomplete.")
    return processor


def _template(path: Any) -> str:
    try:
        return Path(str(path)).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise MethodError(f"chat_template={path}: {one_line(error)}") from error
