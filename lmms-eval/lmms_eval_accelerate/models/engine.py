"""The engine that all model classes share: grouping and batching of requests, generation, journal, costs."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from torch import Tensor

from accelerate_methods import record
from accelerate_methods.engine.recording import RequestRecord
from lmms_eval_accelerate import session
from lmms_eval_accelerate.models import generation, loading, prompts
from lmms_eval_accelerate.models.arguments import Arguments, defaults_of, parse_arguments
from lmms_eval_accelerate.models.batching import cut, generation_arguments, grouped, is_padding, until_end
from lmms_eval_accelerate.models.costs import (
    Costs,
    log_costs,
    of_all_ranks,
    sample_costs,
    skipped_costs,
)
from lmms_eval_accelerate.models.failing import failing_loudly
from lmms_eval_accelerate.models.first_token import FirstToken
from lmms_eval_accelerate.models.journal import Journal
from lmms_eval_accelerate.models.matching import MatchesBudgets
from lmms_eval_accelerate.models.placement import Placement, placement_of
from lmms_eval_accelerate.models.provenance import Provenance
from lmms_eval_accelerate.models.question import Question, asked_of, naming
from lmms_eval_accelerate.models.visuals import OF_THE_RUN, Choosing, VisualError, reason
from lmms_eval_accelerate.progress import Progress

_SHAPE = ("hidden_size", "num_hidden_layers", "vocab_size")


class RefusedQuestion(VisualError):
    """The model's processor refuses the media of a question."""

    def __init__(self, message: str, question: Question):
        super().__init__(message)
        self.question = question


class Accelerated(MatchesBudgets, lmms):
    """Base of :class:`.base.LlavaAccelerated` and :class:`.native.HfAccelerated`.

    They say how a document becomes a question, and a batch of questions the arguments of ``generate``. Constructor
    arguments are those of ``--model_args``.
    """

    model_id: ClassVar[str] = ""
    family: ClassVar[str] = ""
    default_method: ClassVar[str | None] = None
    defaults: ClassVar[dict[str, Any]] = {}
    #: whether ``generate`` returns the prompt in front of the answer
    prompt_in_output: ClassVar[bool] = False

    # -- start -------------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, **given: Any) -> Arguments:
        """Check model arguments without loading anything."""
        defaults = {**defaults_of(cls.family), **cls.defaults}
        if isinstance(given.get("prompt_model"), str) and given["prompt_model"].lower() == "none":
            defaults["prompt_model"] = None
        return parse_arguments(cls.model_id or cls.__name__, cls.family, cls.default_method, defaults, given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Accelerated:
        with failing_loudly():
            return super().create_from_arg_string(arg_string, additional_config)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.args = self.parse(**kwargs)
        self._costs: list[dict[str, Any]] = []
        self._warm = False
        self._set_ranks()
        self._placement = self._place()
        self._device = torch.device(self._placement.device)
        loaded = loading.load(self.args, self._placement, self._load_weights, self.loading_key())
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self.prompt_model = self.args.prompt_model
        self.config.on_long_prompt = self.args.on_long_prompt  # of the run before, with the same weights
        self._acceleration = self._prepare(loaded)
        mean, std = self.normalisation()
        self._provenance = Provenance(self.args.save_provenance, self.args.pipeline.name, mean, std)
        self.settings = {**self.args.to_dict(), "dtype": str(self.model.dtype), "device": _device_name(self._device)}
        self.settings |= self.more_settings()
        self.settings["adaptations"] = dict(getattr(self._acceleration, "adaptations", {}))
        here = session.current()
        here.settings = {**self.settings, "world_size": self._world_size}
        shape = {key: getattr(self.text_config, key, None) for key in _SHAPE}
        here.checkpoint = {"model_type": self.config.model_type, **shape, **self.more_shape()}
        logger.info(f"{self.model_id}: {self.args.pipeline.describe()} on {self.settings['device']}")

    def _set_ranks(self) -> None:
        # The harness made the process group already; this only reads it (and makes one for library use).
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def _place(self) -> Placement:
        """Where this process computes; several GPUs if a copy of the model is spread over them."""
        local = int(os.environ.get("LOCAL_RANK", self.accelerator.local_process_index))
        size = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        placement = placement_of(self.args.device, self.args.gpus_per_model, local, size, self._world_size > 1)
        if placement.device.startswith("cuda"):
            torch.cuda.set_device(placement.device)
        return placement

    @property
    def model(self) -> Any:
        return self._model

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def config(self) -> Any:
        return self._model.config

    @property
    def text_config(self) -> Any:
        """Config of the language model."""
        return self._model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self.args.batch_size

    # -- what the two ways of asking say -----------------------------------------------------------------------------

    @abstractmethod
    def _load_weights(self, dtype: str, device_map: Any, max_memory: dict[int, int] | None) -> loading.Loaded:
        """The model of the arguments without any method; ``device_map`` None: on the placement's device."""

    def loading_key(self) -> dict[str, Any]:
        """What the loaded weights depend on beside the common arguments."""
        return {}

    @abstractmethod
    def _prepare(self, loaded: loading.Loaded) -> Any:
        """Take over what was loaded and attach the methods; returns the acceleration, None if there is none."""

    def choosing(self, documents: Any, doc_id: Any, text: str) -> dict[str, Any]:
        """How the frames of a document's videos are chosen, for ``load_video``; empty where no method does.

        Args:
            text: what the prompt asks.
        """
        sampler = getattr(self._acceleration, "frame_sampler", None)
        return {} if sampler is None else {"sampler": Choosing(sampler), "question": asked_of(documents, doc_id, text)}

    @abstractmethod
    def normalisation(self) -> tuple[Any, Any]:
        """Mean and standard deviation per colour of a question's pictures."""

    def more_settings(self) -> dict[str, Any]:
        """Further settings for the summary."""
        return {}

    def more_shape(self) -> dict[str, Any]:
        """Further facts of the checkpoint."""
        return {}

    @abstractmethod
    def _read(self, *request: Any) -> Question:
        """The question of a request's arguments and its metadata.

        Raises:
            VisualError: an image or video cannot be read.
        """

    @abstractmethod
    def _inputs(self, questions: list[Question]) -> tuple[Tensor, dict[str, Any]]:
        """Ids [B, L] of the prompts, and the other arguments of ``generate``."""

    def sampling(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` out of a task's generation arguments, as the stock model reads them."""
        temperature = gen_kwargs.get("temperature", 0)
        chosen = {
            "do_sample": temperature > 0,
            "num_beams": gen_kwargs.get("num_beams", 1),
            "max_new_tokens": gen_kwargs.get("max_new_tokens", 1024),
        }
        if temperature > 0:
            chosen.update(temperature=temperature, top_p=gen_kwargs.get("top_p"))
        return chosen

    # -- requests ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, with their costs."""
        with failing_loudly():
            self._begin(requests)
            answers: list[GenerationResult] = [GenerationResult("") for _ in requests]
            todo = [i for i, r in enumerate(requests) if not is_padding(r)]
            count = len(todo)
            journal, keys, todo = self._take_up(requests, todo, answers)
            bar = self._progress(count, count - len(todo))
            for group in grouped(requests, todo):
                for batch in self._answer_group([(i, requests[i]) for i in group]):
                    journal.add((keys[index], answer) for index, answer in batch)
                    for index, answer in batch:
                        answers[index] = answer
                    bar.update(len(batch))
            bar.close()
            return answers

    def _progress(self, total: int, done: int = 0) -> Progress:
        return Progress(total, self.model_id or self.family, done, shown=self._rank == 0)

    def _begin(self, requests: list[Instance]) -> None:
        prompts.align(requests, self.prompt_model)
        generation.check_requests(requests)
        self._provenance.choose(requests)
        self._match(requests)

    def _take_up(
        self, requests: list[Instance], todo: list[int], answers: list[Any]
    ) -> tuple[Journal, list[str | None], list[int]]:
        """Fill in the answers that an interrupted run gave; the journal, the requests' names in it, what is left."""
        journal = Journal(session.current().journal, self._rank)
        keys = journal.keys(requests)
        left = journal.fill(keys, todo, answers)
        found = [answers[index].token_counts for index in todo if index not in set(left)]
        self._costs.extend(counts.to_dict() for counts in found if counts is not None)
        return journal, keys, left

    def _answer_group(self, group: list[tuple[int, Instance]]) -> Iterator[list[tuple[int, GenerationResult]]]:
        """Answer requests of one task with equal generation arguments, batch by batch of one form."""
        gen_kwargs = generation_arguments(group[0][1])
        waiting: dict[str, list[tuple[int, Question]]] = {}
        for number, (index, request) in enumerate(group, 1):
            try:
                question = self._read(*request.args, request.metadata)
                waiting.setdefault(question.form, []).append((index, question))
            except VisualError as error:
                yield [(index, GenerationResult("", self._skip(error)))]
            for form in list(waiting):
                if len(waiting[form]) == self.batch_size or number == len(group):
                    yield from self._answer_batch(waiting.pop(form), gen_kwargs)

    def _answer_batch(
        self, batch: list[tuple[int, Question]], gen_kwargs: dict[str, Any]
    ) -> Iterator[list[tuple[int, GenerationResult]]]:
        """Answer questions of one form; where the processor refuses the media of one, it is skipped alone."""
        while batch:
            try:
                results = self._generate([question for _, question in batch], gen_kwargs)
            except RefusedQuestion as error:
                yield [(i, GenerationResult("", self._skip(error))) for i, q in batch if q is error.question]
                batch = [(i, question) for i, question in batch if question is not error.question]
            else:
                yield [(i, result) for (i, _), result in zip(batch, results, strict=True)]
                return

    def _skip(self, error: VisualError) -> Costs:
        if self.args.on_error == "stop":
            raise error
        logger.warning(f"skipped: {error}")
        costs = skipped_costs(error, self.args.pipeline.name)
        self._costs.append(costs.to_dict())
        return costs

    def _generate(self, questions: list[Question], gen_kwargs: dict[str, Any]) -> list[GenerationResult]:
        """One ``generate`` call."""
        ids, inputs = self._prepared(questions)
        kwargs = {**self.sampling(gen_kwargs), **inputs}
        if not kwargs.get("do_sample"):  # a checkpoint's generation_config may hold them, and transformers would warn
            kwargs.update(temperature=None, top_p=None, top_k=None)
        first_token = FirstToken([q.document for q in questions])
        kwargs.update(logits_processor=[first_token], pad_token_id=self._pad_id, use_cache=self.args.use_cache)
        begin = self._clock()
        with torch.inference_mode(), record() as calls, naming(questions):
            output = self.model.generate(ids, **kwargs)
        elapsed = self._clock() - begin
        if self.prompt_in_output:
            output = output[:, ids.shape[1] :]
        answers = [until_end(row, self._end_ids()) for row in output.tolist()]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        generated = [len(answer) for answer in answers]
        costs = self._costs_of(calls[0], generated, elapsed, [q.thinned for q in questions])
        for cost, distribution in zip(costs, first_token.packed(), strict=True):
            cost.extra["first_token"] = distribution
        self._provenance.save(questions, calls[0])
        stops = gen_kwargs.get("until") or [] if self.args.until == "apply" else []
        stops = [stops] if isinstance(stops, str) else stops
        return [GenerationResult(cut(text, stops), c) for text, c in zip(texts, costs, strict=True)]

    def _prepared(self, questions: list[Question]) -> tuple[Tensor, dict[str, Any]]:
        """:meth:`_inputs`; where they cannot be made of all together, the question at fault is found.

        Raises:
            RefusedQuestion: the inputs of one cannot be made.
        """
        try:
            return self._inputs(questions)
        except OF_THE_RUN:
            raise
        except Exception:
            for question in (q for q in questions if q.form != "text"):
                try:
                    self._inputs([question])
                except Exception as error:
                    if isinstance(error, OF_THE_RUN):
                        raise
                    message = f"{question.source}: cannot use its images or videos: {reason(error)}"
                    raise RefusedQuestion(message, question) from error
            raise

    def _costs_of(
        self, call: RequestRecord, generated: list[int], elapsed: float, thinned: list[list[tuple[int, int]]]
    ) -> list[Costs]:
        """Costs of a call's samples, counted in; ``thinned``: of each sample's videos, see :class:`Question`."""
        for number, frames in enumerate(thinned):
            call.samples[number * (len(call.samples) // len(thinned))].count_left_out(frames)
        costs = sample_costs(call, self.text_config, generated, elapsed, self.args.pipeline.name, not self._warm)
        self._warm = True
        self._costs.extend(c.to_dict() for c in costs)
        return costs

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _end_ids(self) -> set[int]:
        end = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return 1000.0 * time.perf_counter()

    # -- end ---------------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Called once on every rank when all requests are answered: log the costs of all ranks, free the model."""
        with failing_loudly():
            costs = of_all_ranks(self._costs, self._world_size)
            if self._rank == 0 and costs:
                log_costs(costs)
            self._costs = []
            if self._acceleration is not None:
                self._acceleration.detach()  # the next run may use the same weights
        super().clean()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
