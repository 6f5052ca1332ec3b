"""Prompt templates of LLaVA-NeXT, string by string (golden vectors `conversation_prompts` pin them)."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation_texts import (
    EXAMPLE_ANSWER,
    EXAMPLE_QUESTION,
    HUMAN,
    LANGUAGE_AND_VISION,
    LLAMA_2_CHAT,
    MMTAG,
    MMTAG_FORMAT,
    USER,
)

# What a chat page shows of an image, at most this many pixels on the short and the long edge. No model sees it.
_PREVIEW_SHORT, _PREVIEW_LONG = 448, 672
_PREVIEW_SQUARE = (336, 336)  # size of the "Resize" mode
_PREVIEW_PADDING = (122, 116, 104)  # CLIP's mean colour


class SeparatorStyle(Enum):
    """How system text, roles and messages are joined to one prompt."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    CHATML = auto()
    LLAMA_2 = auto()
    LLAMA_3 = auto()
    QWEN = auto()
    GEMMA = auto()


@functools.lru_cache(maxsize=4)
def _chat_tokenizer(tokenizer_id: str) -> Any:
    """Load (once per process) the tokenizer whose chat template renders a conversation."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_id)


@dataclass
class Conversation:
    """One dialogue and the rules to print it.

    messages: [role, text] lists; a None or empty text is an open turn, which prints the role only. A user's text may
    also be a tuple (text, image or list of images, image mode). offset: number of preset example messages, which no
    display shows.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    tokenizer_id: str = ""
    tokenizer: Any = None
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    skip_next: bool = False
    #: whether the chat template of LLAMA_3 opens the answer, or leaves that to what it says of itself
    opens_answer: bool = True

    def get_prompt(self) -> str:
        """Render the conversation.

        Raises:
            ValueError: the separator style has no format, a LLAMA_2 dialogue does not start with the user, or the
                tokenizer that LLAMA_3 needs cannot be loaded.
            TypeError: a PLAIN template without `sep2` was given a second message.
        """
        printer = _PRINTERS.get(self.sep_style)
        if printer is None:
            raise ValueError(f"separator style {self.sep_style} has no prompt format")
        return printer(self, self._text_messages())

    def _text_messages(self) -> list[tuple[str, str | None]]:
        """Messages with the image tuples reduced to text, the placeholders where the style wants them."""
        turns = [(role, message) for role, message in self.messages]
        if turns and isinstance(turns[0][1], tuple):
            role, text = turns[0][0], turns[0][1][0]
            bare = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            if "mmtag" in self.version:
                tag = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
                turns[:1] = [(self.roles[0], tag), (self.roles[1], "Received."), (role, bare)]
            elif self.sep_style not in _PLACEHOLDER_PER_IMAGE:
                turns[0] = (role, text if text.startswith(DEFAULT_IMAGE_TOKEN) else f"{DEFAULT_IMAGE_TOKEN}\n{bare}")
        return [(role, self._plain_text(message)) for role, message in turns]

    def _plain_text(self, message: Any) -> str | None:
        if not isinstance(message, tuple):
            return message
        text, images = message[0], message[1]
        if self.sep_style in _PLACEHOLDER_PER_IMAGE:
            return DEFAULT_IMAGE_TOKEN * len(_as_list(images)) + text
        return text

    def _render_chat_template(self, turns: list[tuple[str, str | None]]) -> str:
        if self.tokenizer is None:
            try:
                self.tokenizer = _chat_tokenizer(self.tokenizer_id)
            except Exception as error:  # offline, gated or missing: for the caller it is one and the same
                raise ValueError(
                    f"template '{self.version}' is printed by the chat template of tokenizer '{self.tokenizer_id}', "
                    "which cannot be loaded here; set conversation.tokenizer to a tokenizer that has it "
                    f"({type(error).__name__}: {error})"
                ) from error
        chat = [{"role": "system", "content": self.system}]
        chat += [{"role": role, "content": text} for role, text in turns if text]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=self.opens_answer)

    def append_message(self, role: str, message: Any) -> None:
        """Add a turn; message None leaves it open for the model."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """Independent conversation with the same settings; the tokenizer object is shared."""
        return replace(self, messages=[[role, message] for role, message in self.messages])

    def dict(self) -> dict[str, Any]:
        """What the web demo logs: plain JSON types, images left out."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, m[0] if isinstance(m, tuple) else m] for role, m in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }

    def process_image(
        self, image: Any, image_process_mode: str, return_pil: bool = False, image_format: str = "PNG"
    ) -> Image.Image | str:
        """Shape an image for display and shrink it to chat size.

        Args:
            image: PIL image or path.
            image_process_mode: "Pad" (to a square), "Resize" (to a fixed square), "Default" or "Crop" (shape
                unchanged).
        Returns:
            the PIL image, or its file bytes as base64 text.
        Raises:
            ValueError: unknown mode.
        """
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        image = image.convert("RGB")
        if image_process_mode == "Pad":
            from llava.mm_utils import expand2square  # here, because it brings torch and transformers along

            image = expand2square(image, _PREVIEW_PADDING)
        elif image_process_mode == "Resize":
            image = image.resize(_PREVIEW_SQUARE)
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(f"image mode {image_process_mode!r}: expected 'Pad', 'Resize', 'Default' or 'Crop'")
        scale = min(_PREVIEW_LONG / max(image.size), _PREVIEW_SHORT / min(image.size))
        if scale < 1:
            image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        return image if return_pil else _base64(image, image_format)

    def get_images(self, return_pil: bool = False, return_path: bool = False) -> list[Any]:
        """Images of the user's turns in order: base64 texts, PIL images, or (return_path) what the messages hold."""
        images = []
        for message in self._user_tuples():
            mode = message[2] if len(message) > 2 else "Default"
            for image in _as_list(message[1]):
                images.append(image if return_path else self.process_image(image, mode, return_pil=return_pil))
        return images

    def _user_tuples(self) -> list[tuple[Any, ...]]:
        return [message for _, message in self.messages[self.offset :: 2] if isinstance(message, tuple)]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """[user text, answer] pairs for a gradio chat box; images become inline HTML."""
        pairs: list[list[str | None]] = []
        for i, (_, message) in enumerate(self.messages[self.offset :]):
            if i % 2:
                pairs[-1][1] = message
                continue
            if isinstance(message, tuple):
                text, images = message[0], _as_list(message[1])
                shown = [self.process_image(image, "Default", image_format="JPEG") for image in images]
                html = "".join(f'<img src="data:image/jpeg;base64,{b64}" alt="user upload image" />' for b64 in shown)
                message = html + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            pairs.append([message, None])
        return pairs


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _base64(image: Image.Image, image_format: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format)
    return base64.b64encode(buffer.getvalue()).decode()


# -- prompt formats: (conversation, turns) -> prompt -------------------------------------------------------------------

_Turns = list[tuple[str, str | None]]
# Styles whose image messages carry one placeholder per image rather than one in front of the first text.
_PLACEHOLDER_PER_IMAGE = (SeparatorStyle.CHATML, SeparatorStyle.LLAMA_3)


def _single(c: Conversation, turns: _Turns) -> str:
    return c.system + c.sep + "".join(f"{role}: {text}{c.sep}" if text else f"{role}:" for role, text in turns)


def _two(c: Conversation, turns: _Turns) -> str:
    ends = (c.sep, c.sep2)
    parts = [f"{role}: {text}{ends[i % 2]}" if text else f"{role}:" for i, (role, text) in enumerate(turns)]
    return c.system + c.sep + "".join(parts)


def _chatml(c: Conversation, turns: _Turns) -> str:
    head = f"{c.system}{c.sep}\n" if c.system else ""
    return head + "".join(f"{role}\n{text}{c.sep}\n" if text else f"{role}\n" for role, text in turns)


def _mpt(c: Conversation, turns: _Turns) -> str:
    return c.system + c.sep + _gemma(c, turns)


def _gemma(c: Conversation, turns: _Turns) -> str:
    return "".join(f"{role}{text}{c.sep}" if text else role for role, text in turns)


def _llama_2(c: Conversation, turns: _Turns) -> str:
    if turns and (not turns[0][1] or turns[0][0] != c.roles[0]):
        raise ValueError(f"a {c.version} prompt starts with a message of role {c.roles[0]!r}")
    prompt = ""
    for i, (_, text) in enumerate(turns):
        if not text:
            continue
        if i == 0 and c.system:
            text = f"<<SYS>>\n{c.system}\n<</SYS>>\n\n{text}"
        prompt += f" {text} {c.sep2}" if i % 2 else f"{c.sep}[INST] {text} [/INST]"
    # The tokenizer writes the first BOS itself. The official code strips the characters of `sep`, not the string.
    return prompt.lstrip(c.sep) if c.sep else prompt


def _plain(c: Conversation, turns: _Turns) -> str:
    prompt, ends = c.system, (c.sep, c.sep2)
    for i, (_, text) in enumerate(turns):
        if not text:
            continue
        if ends[i % 2] is None:
            raise TypeError(f"template '{c.version}' has no separator (sep2) to put after a second message")
        prompt += text + ends[i % 2]
    return prompt


_PRINTERS: dict[SeparatorStyle, Callable[[Conversation, _Turns], str]] = {
    SeparatorStyle.SINGLE: _single,
    SeparatorStyle.TWO: _two,
    SeparatorStyle.MPT: _mpt,
    SeparatorStyle.PLAIN: _plain,
    SeparatorStyle.CHATML: _chatml,
    SeparatorStyle.LLAMA_2: _llama_2,
    SeparatorStyle.LLAMA_3: Conversation._render_chat_template,
    SeparatorStyle.GEMMA: _gemma,
}


# -- templates ---------------------------------------------------------------------------------------------------------

def _human_template(
    system: str = HUMAN, version: str = "v0", examples: Sequence[tuple[str, str]] = ()
) -> Conversation:
    roles = ("Human", "Assistant")
    messages = [list(example) for example in examples]
    return Conversation(system, roles, messages, len(messages), SeparatorStyle.SINGLE, "###", version=version)


def _vicuna_template(system: str, version: str = "v1") -> Conversation:
    style = SeparatorStyle.TWO
    return Conversation(system, ("USER", "ASSISTANT"), sep_style=style, sep=" ", sep2="</s>", version=version)


def _llama_2_template(system: str, version: str = "llama_v2", sep: str = "<s>") -> Conversation:
    style = SeparatorStyle.LLAMA_2
    return Conversation(system, ("USER", "ASSISTANT"), sep_style=style, sep=sep, sep2="</s>", version=version)


def _im_template(system: str, style: SeparatorStyle = SeparatorStyle.MPT, version: str = "mpt") -> Conversation:
    """Dialogues in <|im_start|> ... <|im_end|>; in the MPT style the line break belongs to the role."""
    line = "\n" if style is SeparatorStyle.MPT else ""
    roles = (f"<|im_start|>user{line}", f"<|im_start|>assistant{line}")
    return Conversation(f"<|im_start|>system\n{system}", roles, sep_style=style, sep="<|im_end|>", version=version)


def _plain_template() -> Conversation:
    return Conversation("", ("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n", version="plain")


_vicuna_v0 = _human_template(examples=[("Human", EXAMPLE_QUESTION), ("Assistant", EXAMPLE_ANSWER)])
_vicuna_v1 = _vicuna_template(USER)
_mistral_instruct = _llama_2_template("", sep="")
_chatml_direct = _im_template("Answer the questions.")
_qwen = _im_template("You are a helpful assistant.", SeparatorStyle.CHATML, "qwen")

conv_templates: dict[str, Conversation] = {
    "default": _vicuna_v0,
    "v0": _vicuna_v0,
    "v1": _vicuna_v1,
    "vicuna_v1": _vicuna_v1,
    "llama_2": _llama_2_template(LLAMA_2_CHAT),
    "mistral_instruct": _mistral_instruct,
    "mistral_orca": _im_template(
        "You are MistralOrca, a large language model trained by Alignment Lab AI. "
        "Write out your reasoning step-by-step to be sure you get the right answers!"
    ),
    "mistral_zephyr": Conversation(
        "<|system|>\nYou are a helpful AI assistant.", ("<|user|>\n", "<|assistant|>\n"),
        sep_style=SeparatorStyle.MPT, sep="</s>", version="mpt",
    ),
    "mistral_direct": _chatml_direct,
    "voco_v1": _vicuna_template(USER.replace("assistant.", "assistant of the image.", 1)),  # VoCo-LLaMA
    "plain": _plain_template(),
    "v0_plain": _plain_template(),
    "chatml_direct": _chatml_direct,
    "llava_v0": _human_template(),
    "llava_v0_mmtag": _human_template(MMTAG, "v0_mmtag"),
    "llava_v1": _vicuna_template(HUMAN),
    "llava_v1_mmtag": _vicuna_template(MMTAG, "v1_mmtag"),
    "llava_llama_2": _llama_2_template(LANGUAGE_AND_VISION),
    "llava_llama_3": Conversation(
        LANGUAGE_AND_VISION,
        ("user", "assistant"),
        sep_style=SeparatorStyle.LLAMA_3,
        sep="<|eot_id|>",
        version="llama_v3",
        tokenizer_id="meta-llama/Meta-Llama-3-8B-Instruct",
        stop_token_ids=[128009],  # <|eot_id|>
    ),
    "llava_llama_3_1": Conversation(  # LLaVA-Mini
        LANGUAGE_AND_VISION,
        ("user", "assistant"),
        sep_style=SeparatorStyle.LLAMA_3,
        sep="<|eot_id|>",
        version="llama_v3_1",
        tokenizer_id="ICTNLP/llava-mini-llama-3.1-8b",
        stop_token_ids=[128009],  # <|eot_id|>
        opens_answer=False,
    ),
    "llava_llama_2_simple": _llama_2_template("Answer the questions about the visual content that the user provides."),
    "llava_llama_2_mmtag": _llama_2_template(
        "Answer the questions about the visual content that the user provides." + MMTAG_FORMAT, "llama_v2_mmtag"
    ),
    "llava_mistral_instruct": _mistral_instruct,
    "mpt": _im_template(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "qwen_1_5": _qwen,
    "qwen_2": _qwen,
    "qwen_2_5": _im_template(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", SeparatorStyle.CHATML, "qwen"
    ),
    "gemma_instruct": Conversation(
        "", ("<start_of_turn>user\n", "<start_of_turn>model\n"),
        sep_style=SeparatorStyle.GEMMA, sep="<end_of_turn>\n", version="gemma",
    ),
}
default_conversation = _vicuna_v1
