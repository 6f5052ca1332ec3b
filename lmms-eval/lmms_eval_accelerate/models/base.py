"""Models of the LLaVA tree: how a document becomes a question of theirs, likelihoods, several rounds."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lmms_eval.api.instance import Instance
from torch import Tensor

from accelerate_methods import accelerate, record
from accelerate_methods.hosts.questions import plain_question
from accelerate_methods.registry.architectures import Architecture
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import KeywordsStoppingCriteria, tokenizer_image_token
from llava.model.architectures import check_architecture
from llava.model.builder import load_pretrained_model
from lmms_eval_accelerate.models.batching import is_padding
from lmms_eval_accelerate.models.engine import Accelerated
from lmms_eval_accelerate.models.failing import failing_loudly
from lmms_eval_accelerate.models.loading import Loaded
from lmms_eval_accelerate.models.question import Likelihood, Question, naming
from lmms_eval_accelerate.models.visuals import VisualError, document_visuals, names_of, reading, without_media


class LlavaAccelerated(Accelerated):
    """Base of the families; see ``families.py``."""

    is_simple = True
    #: of a trained architecture; None: the checkpoint has to be plain LLaVA
    entry: ClassVar[Architecture | None] = None

    # -- start -------------------------------------------------------------------------------------------------------

    def loading_key(self) -> dict[str, Any]:
        return {name: self.args.values[name] for name in ("model_base", "model_name")} | self.overwrite_config()

    def _load_weights(self, dtype: str, device_map: Any, max_memory: dict[int, int] | None) -> Loaded:
        args = self.args
        check_architecture(str(args.pretrained), self.entry)  # before gigabytes are read
        tokenizer, model, processor, max_length = load_pretrained_model(
            str(args.pretrained),
            args.model_base,
            args.model_name,
            device_map=device_map or self._placement.device,
            torch_dtype="float16" if dtype == "auto" else dtype,  # as the stock models
            attn_implementation=args.attn_implementation,
            overwrite_config=self.overwrite_config(),
            **({} if max_memory is None else {"max_memory": max_memory}),
        )
        more = {
            "max_length": max_length,
            "image_aspect_ratio": getattr(model.config, "image_aspect_ratio", None),
        }
        return Loaded(model, tokenizer, processor, more)

    def _prepare(self, loaded: Loaded) -> Any:
        self.image_processor, self.max_length = loaded.processor, loaded.more["max_length"]
        # a task of the run before may have set it where the checkpoint leaves it open
        self.config.image_aspect_ratio = loaded.more["image_aspect_ratio"]
        self.conv_template = self.args.conv_template or self.default_template()
        pipeline = self.args.pipeline
        return accelerate(self.model, pipeline, tokenizer=loaded.tokenizer) if pipeline.methods else None

    def normalisation(self) -> tuple[Any, Any]:
        return self.image_processor.image_mean, self.image_processor.image_std

    def more_settings(self) -> dict[str, Any]:
        return {"conv_template": self.conv_template}

    def more_shape(self) -> dict[str, Any]:
        return {"mm_vision_tower": getattr(self.config, "mm_vision_tower", None)}

    # -- what a family says ------------------------------------------------------------------------------------------

    def overwrite_config(self) -> dict[str, Any]:
        """Config keys to set before the model is built."""
        return {}

    @abstractmethod
    def default_template(self) -> str:
        """Conversation template if the arguments name none."""

    @abstractmethod
    def question(self, context: str, visuals: list[Any], gen_kwargs: dict, metadata: dict, where: str) -> Question:
        """Placeholders, text and tensors of one document."""

    # -- requests ----------------------------------------------------------------------------------------------------

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
        files, plain = names_of(visuals), plain_question(context)
        more = {"task": task, **self.choosing(self.task_dict[task][split], doc_id, plain)}
        with reading(where, files, "use") if visuals else contextlib.nullcontext():
            question = self.question(context, visuals, gen_kwargs, {**(metadata or {}), **more}, where)
        question.document, question.source = (task, doc_id), f"{where} ({files})"
        question.plain = self.model.asked_text(context)
        question.thinned = more["sampler"].thinned if "sampler" in more else []
        return question

    def _inputs(self, questions: list[Question]) -> tuple[Tensor, dict[str, Any]]:
        ids, mask = self._pad([self._ids(self.prompt(q.text)) for q in questions])
        kwargs: dict[str, Any] = {"attention_mask": mask}
        form = questions[0].form
        if form == "video":
            kwargs["stopping_criteria"] = [KeywordsStoppingCriteria([self._separator()], self.tokenizer, ids)]
        if "image" in form or form == "plain":
            kwargs["image_sizes"] = [size for q in questions for size in q.sizes]
        if form != "text":
            kwargs.update(self._images(questions), questions=[q.plain for q in questions])
        return ids, kwargs

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

    def _pad(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Right-padded ids and mask; the model pads on the left after the splice."""
        # from lengths, not from the pad id: some tokenizers pad with a token that prompts contain
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_id)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([[len(row)] for row in rows])
        return ids.to(self._device), mask.long().to(self._device)

    # -- likelihood --------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """(mean cross-entropy of the continuation, whether greedy decoding would have produced it).

        Lower is better, as lmms-eval's multiple-choice tasks expect. The continuation includes what the template puts
        behind it (``</s>``, ``<|im_end|>``), as in the stock models. Unlike theirs, the greedy check compares at the
        positions of the expanded sequence. A continuation that does not fit into the model's context has an infinite
        loss.
        """
        with failing_loudly():
            self._begin(requests)
            answers: list[Likelihood] = [Likelihood(0.0, False) for _ in requests]
            todo = [i for i, r in enumerate(requests) if not is_padding(r)]
            count = len(todo)
            journal, keys, todo = self._take_up(requests, todo, answers)
            bar = self._progress(count, count - len(todo))
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
            kwargs = {**self._images([question]), "image_sizes": question.sizes or None, "questions": [question.plain]}
        begin = self._clock()
        with torch.inference_mode(), record() as calls, naming([question]):
            # Counted from the end: visual tokens before it expand, and methods drop them; the continuation stays.
            logits = self.model(
                input_ids=ids[None].to(self._device), logits_to_keep=len(wanted) + 1, use_cache=False, **kwargs
            ).logits[0, :-1]
        elapsed = self._clock() - begin
        costs = None
        if calls and calls[0].samples:
            costs = self._costs_of(calls[0], [0], elapsed, [question.thinned])[0]
            self._provenance.save([question], calls[0])
            if calls[0].samples[0].cut:  # of the continuation, too: what stands at the end is something else
                return Likelihood(float("inf"), False, costs)
        logits = logits.float().to(wanted.device)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        return Likelihood(float(loss), bool((logits.argmax(-1) == wanted).all()), costs)

    # -- several rounds ----------------------------------------------------------------------------------------------

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answers of all rounds per document; the task's ``doc_to_text`` asks the next round or ends it."""
        with failing_loudly():
            self._begin(requests)
            bar = self._progress(len(requests))
            answers: list[list[str]] = []
            for request in requests:
                answers.append([] if is_padding(request) else self._rounds(request))
                bar.update()
            bar.close()
            return answers

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
                document = without_media(self.task_dict[task][split], doc_id)
            else:
                document = self.task_dict[task][split][doc_id]
            visuals, context, ends, outputs, state = doc_to_text(
                document, previous_output=answers, round_idx=len(answers), previous_round_info=state
            )
            answers = list(outputs)
            if ends:
                return answers
            doc_to_visual = _constant(visuals)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda document: value
