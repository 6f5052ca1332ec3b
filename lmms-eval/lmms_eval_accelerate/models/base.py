"""The engine that all model classes share: loading, grouping and batching of requests, generation, costs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from accelerate_methods import record
from accelerate_methods.errors import MethodError, UnknownNameError
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import KeywordsStoppingCriteria, tokenizer_image_token
from lmms_eval_accelerate import prompts, session
from lmms_eval_accelerate.arguments import COMMON, Arguments, parse_arguments
from lmms_eval_accelerate.costs import Costs, sample_costs, skipped_costs, summarise
from lmms_eval_accelerate.failing import failing_loudly
from lmms_eval_accelerate.first_token import FirstToken
from lmms_eval_accelerate.journal import Journal
from lmms_eval_accelerate.manifest import FAMILIES
from lmms_eval_accelerate.models import loading
from lmms_eval_accelerate.models.batching import cut, grouped, is_padding, until_end
from lmms_eval_accelerate.models.question import Likelihood, Question
from lmms_eval_accelerate.placement import Placement, place_process
from lmms_eval_accelerate.provenance import Provenance
from lmms_eval_accelerate.visuals import VisualError, document_visuals

_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "mm_vision_tower")


class LlavaAccelerated(lmms):
    """Base of the families; see ``families.py``. Constructor arguments are those of ``--model_args``."""

    is_simple = True
    model_id: ClassVar[str] = ""
    family: ClassVar[str] = ""
    default_method: ClassVar[str | None] = None
    defaults: ClassVar[dict[str, Any]] = {}
    #: settings of the model made last, for the run's summary
    last_settings: ClassVar[dict[str, Any]] = {}
    #: what its weights look like
    last_checkpoint: ClassVar[dict[str, Any]] = {}

    # -- start -------------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, **given: Any) -> Arguments:
        """Check model arguments without loading anything."""
        defaults = {**COMMON, "prompt_model": FAMILIES[cls.family], **cls.defaults}
        if isinstance(given.get("prompt_model"), str) and given["prompt_model"].lower() == "none":
            defaults["prompt_model"] = None
        return parse_arguments(cls.model_id or cls.__name__, cls.family, cls.default_method, defaults, given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> LlavaAccelerated:
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
        self._load()
        self._provenance = Provenance(
            self.args.save_provenance, self._rank, self.args.pipeline.name, self.image_processor
        )
        self.settings = {**self.args.to_dict(), "dtype": str(self.model.dtype), "device": _device_name(self._device)}
        self.settings["conv_template"] = self.conv_template
        self.settings["adaptations"] = dict(getattr(self.model.acceleration, "adaptations", {}))
        LlavaAccelerated.last_settings = {**self.settings, "world_size": self._world_size}
        LlavaAccelerated.last_checkpoint = {k: getattr(self.config, k, None) for k in _SHAPE}
        logger.info(f"{self.model_id}: {self.args.pipeline.describe()} on {self.settings['device']}")

    def _set_ranks(self) -> None:
        # The harness made the process group already; this only reads it (and makes one for library use).
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def _place(self) -> Placement:
        """Where this process computes; several GPUs if a copy of the model is spread over them."""
        wanted, spread = self.args.device, self.args.gpus_per_model
        local = int(os.environ.get("LOCAL_RANK", self.accelerator.local_process_index))
        if wanted in ("auto", "cuda") or (str(wanted).startswith("cuda") and self._world_size > 1):
            # a --device for all ranks would put them on one GPU
            placement = place_process(local, int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), spread)
        elif spread > 1:
            raise MethodError(f"gpus_per_model={spread} chooses the GPUs itself; leave device={wanted} out.")
        else:
            placement = Placement(str(wanted))
        if placement.device.startswith("cuda"):
            torch.cuda.set_device(placement.device)
        return placement

    def _load(self) -> None:
        loaded = loading.load(self.args, self._placement, self.overwrite_config())
        self._tokenizer, self._model, self.image_processor = loaded.tokenizer, loaded.model, loaded.image_processor
        self.max_length = loaded.max_length
        self._acceleration = loading.attach(loaded, self.args)
        self.conv_template = self.args.conv_template or self.default_template()
        if self.conv_template not in conv_templates:
            raise UnknownNameError("conv_template", self.conv_template, conv_templates)

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
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self.args.batch_size

    # -- what a family says ------------------------------------------------------------------------------------------

    def overwrite_config(self) -> dict[str, Any]:
        """Config keys to set before the model is built."""
        return {}

    def default_template(self) -> str:
        """Conversation template if the arguments name none."""
        raise NotImplementedError

    def question(self, context: str, visuals: list[Any], gen_kwargs: dict, metadata: dict, where: str) -> Question:
        """Placeholders, text and tensors of one document."""
        raise NotImplementedError

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
            prompts.align(requests, self.args.prompt_model)
            self._provenance.choose(requests)
            answers: list[GenerationResult] = [GenerationResult("") for _ in requests]
            todo = [i for i, r in enumerate(requests) if not is_padding(r)]
            bar = tqdm(total=len(todo), disable=self._rank != 0, desc=self.model_id or "generating")
            journal, keys, todo = self._take_up(requests, todo, answers)
            bar.update(bar.total - len(todo))
            for group in grouped(requests, todo):
                for batch in self._answer_group([(i, requests[i]) for i in group]):
                    journal.add((keys[index], answer) for index, answer in batch)
                    for index, answer in batch:
                        answers[index] = answer
                    bar.update(len(batch))
            bar.close()
            return answers

    def _take_up(
        self, requests: list[Instance], todo: list[int], answers: list[Any]
    ) -> tuple[Journal, list[str | None], list[int]]:
        """Fill in the answers that an interrupted run gave; the journal, the requests' names in it, what is left."""
        journal = Journal(session.current().journal, self._rank)
        keys = journal.keys(requests)
        left = []
        for index in todo:
            known = journal.find(keys[index])
            if known is None:
                left.append(index)
                continue
            answers[index] = known
            if known.token_counts is not None:
                self._costs.append(known.token_counts.to_dict())
        journal.report(len(todo) - len(left), len(todo))
        return journal, keys, left

    def _answer_group(self, group: list[tuple[int, Instance]]) -> Iterator[list[tuple[int, GenerationResult]]]:
        """Answer requests of one task with equal generation arguments, batch by batch of one form."""
        gen_kwargs = group[0][1].args[1]
        waiting: dict[str, list[tuple[int, Question]]] = {}
        for number, (index, request) in enumerate(group, 1):
            try:
                question = self._read(*request.args, request.metadata)
                waiting.setdefault(question.form, []).append((index, question))
            except VisualError as error:
                yield [(index, GenerationResult("", self._skip(error)))]
            for form in list(waiting):
                if len(waiting[form]) == self.batch_size or number == len(group):
                    batch = waiting.pop(form)
                    results = self._generate([question for _, question in batch], gen_kwargs)
                    yield [(i, result) for (i, _), result in zip(batch, results, strict=True)]

    def _read(
        self,
        context: str,
        gen_kwargs: dict,
        doc_to_visual: Callable,
        doc_id: Any,
        task: str,
        split: str,
        metadata: dict,
    ) -> Question:
        where = f"task {task}, split {split}, doc {doc_id}"
        visuals = document_visuals(doc_to_visual, self.task_dict[task][split], doc_id, where)
        question = self.question(context, visuals, gen_kwargs, {**(metadata or {}), "task": task}, where)
        question.document = (task, doc_id)
        return question

    def _skip(self, error: VisualError) -> Costs:
        if self.args.on_error == "stop":
            raise error
        logger.warning(f"skipped: {error}")
        costs = skipped_costs(error, self.args.pipeline.name)
        self._costs.append(costs.to_dict())
        return costs

    def _generate(self, questions: list[Question], gen_kwargs: dict[str, Any]) -> list[GenerationResult]:
        """One ``generate`` call."""
        ids, mask = self._pad([self._ids(self.prompt(q.text)) for q in questions])
        kwargs = self.sampling(gen_kwargs)
        if questions[0].form == "video":
            kwargs["stopping_criteria"] = [KeywordsStoppingCriteria([self._separator()], self.tokenizer, ids)]
        if not kwargs.get("do_sample"):  # a checkpoint's generation_config may hold them, and transformers would warn
            kwargs.update(temperature=None, top_p=None, top_k=None)
        if "image" in questions[0].form or questions[0].form == "plain":
            kwargs["image_sizes"] = [size for q in questions for size in q.sizes]
        if questions[0].form != "text":
            kwargs.update(self._images(questions))
        first_token = FirstToken([q.document for q in questions])
        kwargs.update(logits_processor=[first_token], pad_token_id=self._pad_id, use_cache=self.args.use_cache)
        begin = self._clock()
        with torch.inference_mode(), record() as calls:
            output = self.model.generate(ids, attention_mask=mask, **kwargs)
        elapsed = self._clock() - begin
        answers = [until_end(row, self._end_ids()) for row in output.tolist()]
        texts = self.tokenizer.batch_decode([a for a in answers], skip_special_tokens=True)
        costs = sample_costs(
            calls[0], self.config, [len(a) for a in answers], elapsed, self.args.pipeline.name, not self._warm
        )
        self._warm = True
        self._costs.extend(c.to_dict() for c in costs)
        for cost, distribution in zip(costs, first_token.packed(), strict=True):
            cost.extra["first_token"] = distribution
        self._provenance.save(questions, calls[0])
        stops = gen_kwargs.get("until") or [] if self.args.until == "apply" else []
        stops = [stops] if isinstance(stops, str) else stops
        return [GenerationResult(cut(text, stops), c) for text, c in zip(texts, costs, strict=True)]

    def _images(self, questions: list[Question]) -> dict[str, Any]:
        if questions[0].form == "plain":
            return {"images": torch.cat([q.visuals for q in questions])}
        images = [visual for q in questions for visual in q.visuals]
        return {"images": images, "modalities": [questions[0].form] * len(images)}

    def prompt(self, text: str | list[str], answer: str | None = None) -> str:
        """The conversation in the model's template, open for the assistant or closed with ``answer``."""
        conversation = conv_templates[self.conv_template].copy()
        turns = [text] if isinstance(text, str) else text
        for number, turn in enumerate(turns):
            conversation.append_message(conversation.roles[number % 2], turn)
        conversation.append_message(conversation.roles[1], answer)
        if conversation.sep_style is SeparatorStyle.LLAMA_3 and conversation.tokenizer is None:
            conversation.tokenizer = self.tokenizer
        return conversation.get_prompt()

    def _separator(self) -> str:
        template = conv_templates[self.conv_template]
        return template.sep2 if template.sep_style is SeparatorStyle.TWO else template.sep

    def _ids(self, prompt: str) -> Tensor:
        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _end_ids(self) -> set[int]:
        end = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}

    def _pad(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Right-padded ids and mask; the model pads on the left after the splice."""
        # from lengths, not from the pad id: some tokenizers pad with a token that prompts contain
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_id)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([[len(row)] for row in rows])
        return ids.to(self._device), mask.long().to(self._device)

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return 1000.0 * time.perf_counter()

    # -- likelihood --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """(mean cross-entropy of the continuation, whether greedy decoding would have produced it).

        Lower is better, as lmms-eval's multiple-choice tasks expect. The continuation includes what the template puts
        behind it (``</s>``, ``<|im_end|>``), as in the stock models. Unlike theirs, the greedy check compares at the
        positions of the expanded sequence.
        """
        with failing_loudly():
            prompts.align(requests, self.args.prompt_model)
            self._provenance.choose(requests)
            answers: list[Likelihood] = [Likelihood(0.0, False) for _ in requests]
            todo = [i for i, r in enumerate(requests) if not is_padding(r)]
            bar = tqdm(total=len(todo), disable=self._rank != 0, desc=self.model_id or "loglikelihood")
            journal, keys, todo = self._take_up(requests, todo, answers)
            bar.update(bar.total - len(todo))
            for index in todo:
                answers[index] = self._likelihood(requests[index])
                journal.add([(keys[index], answers[index])])
                bar.update()
            bar.close()
            return answers

    def _likelihood(self, request: Instance) -> Likelihood:
        if len(request.args) == 2:  # the text alone (acc_mutual_info)
            question, continuation = Question(request.args[0]), request.args[1]
        else:
            context, target, doc_to_visual, doc_id, task, split = request.args
            try:
                question = self._read(context, {}, doc_to_visual, doc_id, task, split, request.metadata)
            except VisualError as error:
                return Likelihood(float("inf"), False, self._skip(error))
            continuation = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        start = len(self._ids(self.prompt(question.text)))
        ids = self._ids(self.prompt(question.text, continuation))
        wanted = ids[start:].to(self._device)
        if len(wanted) == 0:
            raise ValueError(f"the continuation {continuation!r} has no tokens.")
        kwargs: dict[str, Any] = {}
        if question.form != "text":
            kwargs = {**self._images([question]), "image_sizes": question.sizes or None}
        begin = self._clock()
        with torch.inference_mode(), record() as calls:
            # Counted from the end: visual tokens before it expand, and methods drop them; the continuation stays.
            logits = self.model(
                input_ids=ids[None].to(self._device), logits_to_keep=len(wanted) + 1, use_cache=False, **kwargs
            ).logits[0, :-1]
        elapsed = self._clock() - begin
        costs = None
        if calls and calls[0].samples:
            costs = sample_costs(calls[0], self.config, [0], elapsed, self.args.pipeline.name, not self._warm)[0]
            self._costs.append(costs.to_dict())
            self._provenance.save([question], calls[0])
            self._warm = True
        logits = logits.float().to(wanted.device)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        return Likelihood(float(loss), bool((logits.argmax(-1) == wanted).all()), costs)

    # -- several rounds ----------------------------------------------------------------------------------------------

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers of all rounds per document; the task's ``doc_to_text`` asks the next round or ends it."""
        with failing_loudly():
            prompts.align(requests, self.args.prompt_model)
            self._provenance.choose(requests)
            return [[] if is_padding(request) else self._rounds(request) for request in requests]

    def _rounds(self, request: Instance) -> list[str]:
        context, gen_kwargs, doc_to_visual, doc_to_text, doc_id, task, split = request.args
        answers: list[str] = []
        state = None
        while True:
            try:
                question = self._read(context, gen_kwargs, doc_to_visual, doc_id, task, split, request.metadata)
                answers.append(self._generate([question], gen_kwargs)[0].text)
            except VisualError as error:
                self._skip(error)
                answers.append("")
            visuals, context, ends, outputs, state = doc_to_text(
                self.task_dict[task][split][doc_id],
                previous_output=answers,
                round_idx=len(answers),
                previous_round_info=state,
            )
            answers = list(outputs)
            if ends:
                return answers
            doc_to_visual = _constant(visuals)

    # -- end ---------------------------------------------------------------------------------------------------------

    def clean(self) -> None:
        """Called once on every rank when all requests are answered: log the costs of all ranks, free the model."""
        with failing_loudly():
            costs = self._costs
            if self._world_size > 1 and torch.distributed.is_initialized():
                everyone: list[Any] = [None] * self._world_size
                torch.distributed.all_gather_object(everyone, costs)
                costs = [c for part in everyone for c in part]
            if self._rank == 0 and costs:
                self._log(costs)
            self._costs = []
            if self._acceleration is not None:
                self._acceleration.detach()  # the next run may use the same weights
        super().clean()

    @staticmethod
    def _log(costs: list[dict[str, Any]]) -> None:
        seconds = sum(c.get("generate_ms", 0.0) for c in costs) / 1000.0
        tokens = sum(c.get("generated_tokens", 0) for c in costs)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"total_requests": len(costs), **summarise(costs)},
        )


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda document: value


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
