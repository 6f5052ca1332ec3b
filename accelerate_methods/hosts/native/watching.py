"""How the features of a prompt's images and videos came about: noted while transformers' vision side runs.

It runs inside the model's ``forward``, or ahead of it: ``generate`` of newer releases encodes first and hands the
outputs on (``mm_encoder_outputs``). In the second case the note travels in the output.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from accelerate_methods.engine import recording
from accelerate_methods.engine.loop import DecoderOutput
from accelerate_methods.engine.output_rows import OutputRows, real_rows
from accelerate_methods.hosts.native.family import Family, Seen
from accelerate_methods.hosts.native.prompt import CutPrompt
from accelerate_methods.hosts.native.wrapping import Wrappers
from accelerate_methods.stages.encode import EncodeMethod

_SEEN = "accelerate_seen"  # key in the vision side's output, which may be copied: how it came about
_KINDS = ("image", "video")


class Forward:
    """What is remembered of one ``forward`` of the model between its wrappers."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments
        self.request: recording.RequestRecord | None = None
        #: one text per prompt, for methods that look at it
        self.questions: Any = None
        #: what the vision side did for this prompt, now or ahead of it
        self.seen: dict[str, Seen] = {}
        #: kinds of item whose features come from somewhere else
        self.unseen: list[str] = []
        for kind, output in (arguments.get("mm_encoder_outputs") or {}).items():
            if getattr(output, _SEEN, None) is not None:
                self.seen[kind] = getattr(output, _SEEN)
            elif output is not None:
                self.unseen.append(kind)
        self.cut: CutPrompt | None = None
        self.output: DecoderOutput | None = None
        #: where the rows of ``output`` go, None: where they are
        self.rows: OutputRows | None = None
        #: whether ``generate`` is the caller, which reads the last row
        self.generates = False

    @property
    def real(self) -> Tensor:
        """[B, K] which rows of ``output`` are real, padding on the left."""
        return real_rows(self.output, self.cut.valid)

    def in_rows(self, labels: Tensor) -> Tensor:
        """[B, K] labels of the rows of ``output`` -> of those that the caller gets."""
        return labels if self.rows is None else self.rows.of_labels(labels)


class VisionWatch:
    """Watches ``get_image_features`` and ``get_video_features`` of one model.

    Args:
        now: the ``forward`` around, None outside of one.
        method: acts inside the vision encoder.
    """

    def __init__(
        self, model: nn.Module, family: Family, now: ContextVar[Forward | None], method: EncodeMethod | None = None
    ):
        self._model, self._family, self._now, self._method = model, family, now, method
        self._seeing: ContextVar[Seen | None] = ContextVar("accelerate_seeing", default=None)
        #: record of a request whose images were encoded ahead of its forward
        self._ahead: ContextVar[recording.RequestRecord | None] = ContextVar("accelerate_ahead", default=None)

    def install(self, wrappers: Wrappers) -> None:
        for kind in _KINDS:
            if hasattr(self._model.model, f"get_{kind}_features"):
                self._watch(kind, wrappers)
        if self._method is None:
            wrappers.keep(self._family.watch(self._encoded))
        else:
            self._family.take_over(self._method, wrappers, self._encoded, self._seeing.get)

    def take_request(self) -> recording.RequestRecord | None:
        """The record of the request whose images were encoded ahead, for the forward that has now begun."""
        request = self._ahead.get()
        self._ahead.set(None)
        return request

    def _watch(self, kind: str, wrappers: Wrappers) -> None:
        name = f"get_{kind}_features"
        signature = inspect.signature(getattr(self._model.model, name))

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._seeing.get() is not None:  # videos of a family whose videos are encoded as images
                return before(*args, **kwargs)
            arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
            seen = Seen({**arguments, **arguments.pop("kwargs", {})}, kind=kind)
            now = self._now.get()
            request = self._request_ahead() if now is None else now.request
            token = self._seeing.set(seen)
            try:
                with recording.stage(request, "vision", self._model.device):
                    output = before(*args, **kwargs)
            finally:
                self._seeing.reset(token)
            if now is not None:
                now.seen[kind] = seen
            elif isinstance(output, ModelOutput):
                output[_SEEN] = seen
            return output

        before = wrappers.wrap(self._model.model, name, watched)

    def _request_ahead(self) -> recording.RequestRecord | None:
        """The record of the request whose images and videos are being encoded before its forward."""
        request = self._ahead.get()
        if not recording.listens_to(request):  # none yet, or left behind by a request that came to nothing
            request = recording.new_request()
            self._ahead.set(request)
        return request

    def _encoded(self, encoded: Any) -> None:
        seen = self._seeing.get()
        if seen is not None:
            seen.encoded.append(encoded)
