"""A model behind an OpenAI-compatible server: ``vllm serve`` with this project's plugin (docs/serving.md).

lmms-eval's own ``openai`` model sends a video as so many pictures and scores the text of an error as if it were an
answer. Here videos are named by file, for the server to read; a request that fails ends the run; and each answer
carries what it cost: tokens of the prompt, time to its first token and to its last.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import time
import urllib.request
from typing import Any

import openai
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from accelerate_methods.hosts.vllm.spec import KEY, method_of
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError, UnknownNameError, one_line
from lmms_eval_accelerate import session
from lmms_eval_accelerate.model_args import meant
from lmms_eval_accelerate.models import generation, prompts
from lmms_eval_accelerate.models.batching import generation_arguments, is_padding
from lmms_eval_accelerate.models.costs import Costs, log_costs
from lmms_eval_accelerate.models.failing import failing_loudly
from lmms_eval_accelerate.models.journal import Journal
from lmms_eval_accelerate.models.visuals import from_document
from lmms_eval_accelerate.progress import Progress

#: how a server with the plugin begins its refusal of a method that there is not
_REFUSAL = "unknown method"
#: arguments that lmms-eval hands over with those of the user
_OF_LMMS_EVAL = ("max_batch_size", "device")
#: a grey picture
_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAJklEQVR42u3NMQ0AAAwDoEqv9KrYsQQMkB6LQCAQCAQCgUAg"
    "+BIMLd4AWwUPN68AAAAASUVORK5CYII="
)


@dataclasses.dataclass(frozen=True)
class ServedArguments:
    """``--model_args`` of the model ``served``; names that stand not here are parameters of the method.

    Attributes:
        base_url: of the server, with ``/v1``.
        model: its name there; None: the first that the server names.
        method: of every request, whatever the server is configured with; None: none.
        frames: of a video, chosen by the server.
        concurrent: requests that are sent at a time. Times are comparable between runs with the same number.
        timeout: of a request, in seconds.
        prompt_model: whose prompts of a task are used; None: those of the task itself.
        max_new_tokens: where a task does not say.
        batch_size: handed over by lmms-eval; the server makes batches itself.
    """

    base_url: str
    model: str | None = None
    method: str | None = None
    frames: int = 16
    concurrent: int = 1
    timeout: float = 600.0
    prompt_model: str | None = None
    max_new_tokens: int = 128
    batch_size: int = 1


class Served(lmms):
    """Asks a server; the arguments are those of :class:`ServedArguments`.

    Raises:
        UnknownNameError, MethodError: a wrong argument or method, a server that is not there or does not compress.
    """

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Served:
        with failing_loudly():
            return super().create_from_arg_string(arg_string, additional_config)

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.args, self._specification, methods = parse(given)
        self._client = openai.OpenAI(
            base_url=self.args.base_url, api_key="EMPTY", timeout=self.args.timeout, max_retries=0
        )
        served = self._served_models()
        if self.args.model not in (None, *served):
            raise UnknownNameError(f"model of {self.args.base_url}:", self.args.model, served)
        self._model = self.args.model or served[0]
        if self._specification != "none":
            self._check_plugin()
        here = session.current()
        here.settings = {
            "family": "served",
            "pretrained": self._model,
            "methods": methods,
            "method": methods[0]["method"] if methods else None,
            **{name: getattr(self.args, name) for name in ("frames", "concurrent", "prompt_model", "max_new_tokens")},
            "server": f"vllm {self._version()}",
        }

    # -- the server --------------------------------------------------------------------------------------------------

    def _served_models(self) -> list[str]:
        try:
            return [model.id for model in self._client.models.list().data]
        except openai.OpenAIError as error:
            raise MethodError(f"no answer from {self.args.base_url}: {one_line(error)}") from error

    def _version(self) -> str:
        address = self.args.base_url.rstrip("/").removesuffix("/v1") + "/version"
        try:
            with urllib.request.urlopen(address, timeout=self.args.timeout) as answer:
                return json.load(answer)["version"]
        except (OSError, ValueError, KeyError):
            return "of unknown release"

    def _check_plugin(self) -> None:
        """A server without the plugin, or one that ignores what requests say, would answer dense and say nothing."""
        part = {"type": "image_url", "image_url": {"url": _PICTURE}}
        try:
            self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": [part]}],
                max_tokens=1,
                extra_body={"mm_processor_kwargs": {KEY: "no such method"}},
            )
        except openai.BadRequestError as error:
            if _REFUSAL not in str(error):
                raise MethodError(f"{self.args.base_url} takes no method: {one_line(error)}") from error
            return
        except openai.OpenAIError as error:
            raise MethodError(f"{self.args.base_url} cannot be asked: {one_line(error)}") from error
        raise MethodError(
            f"{self.args.base_url} does not compress: it answers whatever method is named. Is the plugin loaded "
            "(docs/serving.md)?"
        )

    # -- requests ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, with their costs.

        Raises:
            MethodError: a request that came to nothing.
        """
        with failing_loudly():
            prompts.align(requests, self.args.prompt_model)
            generation.check_requests(requests)
            answers = [GenerationResult("") for _ in requests]
            asked = [index for index, request in enumerate(requests) if not is_padding(request)]
            journal = Journal(session.current().journal, self.rank)
            keys = journal.keys(requests)
            left = journal.fill(keys, asked, answers)
            bar = Progress(len(asked), "served", len(asked) - len(left), shown=self.rank == 0)
            with concurrent.futures.ThreadPoolExecutor(self.args.concurrent) as pool:
                waiting = {pool.submit(self._ask, requests[i], warmup=i == left[0]): i for i in left}
                try:
                    for done in concurrent.futures.as_completed(waiting):
                        index = waiting[done]
                        answers[index] = done.result()
                        journal.add([(keys[index], answers[index])])
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            bar.close()
            log_costs([answer.token_counts.to_dict() for answer in answers if answer.token_counts is not None])
            return answers

    def _payload(self, request: Instance) -> dict[str, Any]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        values = generation_arguments(request)
        messages, _ = from_document(doc_to_messages, self.task_dict[task][split], doc_id, _name(request))
        chat = ChatMessages(messages=messages)
        for part in (part for message in chat.messages for part in message.content):
            if part.type == "audio" or (part.type == "video" and (part.start_time or part.end_time) is not None):
                raise MethodError(f"{_name(request)}: a server is asked about pictures and whole videos only.")
        temperature = values.get("temperature") or 0
        return {
            "model": self._model,
            "messages": chat.to_openai_messages(pass_video_url=True),
            "max_tokens": values.get("max_new_tokens", self.args.max_new_tokens),
            "temperature": temperature if values.get("do_sample", True) else 0,
            **({"top_p": values["top_p"]} if temperature and values.get("top_p") is not None else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": {
                "mm_processor_kwargs": {KEY: self._specification},
                "media_io_kwargs": {"video": {"num_frames": self.args.frames}},
            },
        }

    def _ask(self, request: Instance, warmup: bool) -> GenerationResult:
        payload, name = self._payload(request), _name(request)
        begun, first, text, usage = time.perf_counter(), None, "", None
        try:
            for part in self._client.chat.completions.create(**payload):
                if part.choices:
                    first = time.perf_counter() if first is None else first
                    text += part.choices[0].delta.content or ""
                usage = part.usage or usage
        except openai.OpenAIError as error:
            raise MethodError(f"{name}: the server did not answer: {one_line(error)}") from error
        if usage is None or first is None:
            raise MethodError(f"{name}: the server's answer broke off.")
        ended = time.perf_counter()
        extra = {
            "prompt_tokens": usage.prompt_tokens,
            "generated_tokens": usage.completion_tokens,
            "first_token_ms": (first - begun) * 1000,
            "decode_ms": (ended - first) * 1000,
            "generate_ms": (ended - begun) * 1000,
            "method": self.args.method,
            "warmup": warmup,
        }
        return GenerationResult(text.strip(), Costs(usage.prompt_tokens, usage.completion_tokens, extra=extra))

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("a server gives answers, not the likelihoods of given ones; choose another task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("tasks of several rounds are not asked of a server.")


def parse(given: dict[str, Any]) -> tuple[ServedArguments, Any, list[dict[str, Any]]]:
    """Checked arguments, what requests say of compression, and the method as a run's summary has it.

    Raises:
        UnknownNameError, MethodError: with what is allowed.
    """
    known = {field.name: field for field in dataclasses.fields(ServedArguments)}
    own = {name: meant(value) for name, value in given.items() if name in known}
    parameters = {name: meant(value) for name, value in given.items() if name not in (*known, *_OF_LMMS_EVAL)}
    if not own.get("base_url"):
        raise MethodError("model argument base_url= is needed: the server's address, as http://127.0.0.1:8000/v1.")
    args = ServedArguments(**own)
    for name, least in (("frames", 1), ("concurrent", 1), ("timeout", 0), ("max_new_tokens", 1)):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise MethodError(f"model argument {name} must be a number from {least}, not {value!r}.")
    if args.method is None:
        if parameters:
            raise UnknownNameError("argument of model 'served' without a method:", next(iter(parameters)), known)
        return args, "none", []
    specification = {"method": args.method, **parameters}
    method = method_of(specification)
    return args, specification, Pipeline((method.inner,)).to_dict()


def _name(request: Instance) -> str:
    *_, doc_id, task, split = request.args
    return f"task {task}, split {split}, doc {doc_id}"
