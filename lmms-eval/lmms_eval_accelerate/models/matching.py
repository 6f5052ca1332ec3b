"""Solving a method's budget at the start of a run (``match=layer_tokens:0.25``), on the first questions of the run.

A few documents, evenly over all requests, are asked with values of the method's own budget until what is realised
equals the target (``accelerate_methods.bench.matching``); of their answers nothing is kept. All ranks measure their own
documents and take the same value. It is one value for all tasks of a run: where their pictures and clips are
of very different forms, give each task a run of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from loguru import logger

from accelerate_methods import accelerate, record
from accelerate_methods.bench.matching import Matched, Target, by_count, match, share_of
from accelerate_methods.engine.recording import RequestRecord
from accelerate_methods.registry.pipeline import Pipeline
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.method import Method
from accelerate_methods.stages.shapes import ItemShape
from lmms_eval_accelerate import session
from lmms_eval_accelerate.models.batching import is_padding
from lmms_eval_accelerate.models.costs import Costs, of_all_ranks, sample_costs
from lmms_eval_accelerate.models.question import naming
from lmms_eval_accelerate.models.visuals import VisualError

DOCUMENTS = 8  # of all ranks together, about


class MatchesBudgets:
    """The part of a model class that solves ``match=``."""

    def _match(self, requests: list[Instance]) -> None:
        """Solve the budget once, and go on with it.

        Raises:
            MethodError: see :func:`solved`; or requests that are no questions to be answered in words.
        """
        if self.args.match is None or "matched" in self.settings or not self.args.pipeline.methods:
            return
        if any(request.request_type != "generate_until" for request in requests):
            raise MethodError(f"match={self.args.match} needs tasks of output type generate_until.")
        target = Target.of(self.args.match)
        pipeline, found = solved(self.args.pipeline, target, requests, self._try, self._world_size)
        self._attach(pipeline)
        self.args = dataclasses.replace(self.args, pipeline=pipeline)
        self.settings |= {"methods": pipeline.to_dict(), "matched": found.to_dict()}
        session.current().settings |= {key: self.settings[key] for key in ("methods", "matched")}

    def _try(self, request: Instance, pipeline: Pipeline) -> tuple[Costs, RequestRecord] | None:
        """What one request costs under other methods; nothing else of it is kept."""
        self._attach(pipeline)
        try:
            question = self._read(*request.args, request.metadata)
        except VisualError:
            return None
        ids, inputs = self._prepared([question])
        more = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": self._pad_id, "use_cache": True}
        with torch.inference_mode(), record() as calls, naming([question]):
            self.model.generate(ids, **inputs, **more, temperature=None, top_p=None, top_k=None)
        calls[0].samples[0].count_left_out(question.thinned)
        (costs,) = sample_costs(calls[0], self.text_config, [1], 0.0, pipeline.name, True)
        return costs, calls[0]

    def _attach(self, pipeline: Pipeline) -> None:
        """Other methods on the model, in place of those that are there."""
        if self._acceleration is not None:
            self._acceleration.detach()
        self._acceleration = accelerate(self.model, pipeline, tokenizer=self.tokenizer)


#: asks one request under a pipeline: its costs and record; None where its picture cannot be read
Ask = Callable[[Instance, Pipeline], "tuple[Costs, RequestRecord] | None"]


def solved(
    pipeline: Pipeline, target: Target, requests: Sequence[Instance], ask: Ask, world_size: int
) -> tuple[Pipeline, Matched]:
    """The pipeline with the budget that realises the target on the documents of ``requests``.

    Raises:
        MethodError: several methods, none with a free budget, or no document that the method acts on.
    """
    if len(pipeline.methods) != 1:
        raise MethodError(
            f"match={target} solves the budget of one method, not of {pipeline.name}: give a combination its budgets."
        )
    (method,) = pipeline.methods
    chosen = spread([r for r in requests if not is_padding(r)], max(1, DOCUMENTS // world_size))
    asked = [request for request in chosen if _acts_on(method, ask(request, Pipeline()))]
    if not _everywhere(asked, world_size):
        raise MethodError(f"match={target}: {method.name} acts on none of the {len(chosen)} documents that were tried.")

    def measure(trial: Method) -> float:
        made = [ask(request, Pipeline((trial,))) for request in asked]
        own = [_share(target.kind, costs.extra) for costs, _ in filter(None, made)]
        found = _everywhere(own, world_size)
        return sum(found) / len(found)

    shapes = _shapes([ask(request, Pipeline()) for request in asked]) if world_size == 1 else {}
    found = match(method, target, measure, by_count(target.kind, shapes))
    logger.info(
        f"{method.name}: {found.parameter}={found.value:g} realises {target.kind}={found.realised:.4f} "
        f"({found.trials} trials on {len(asked)} documents, wanted {target.value:g})"
    )
    return Pipeline((found.method,), pipeline.models), found


def spread(requests: Sequence[Instance], count: int) -> list[Instance]:
    """About ``count`` of the requests, evenly over all of them, so that every task has its share."""
    step = max(1, len(requests) // count)
    return list(requests[step // 2 :: step][:count])


def _acts_on(method: Method, made: tuple[Costs, RequestRecord] | None) -> bool:
    return made is not None and bool(method.modalities & {item.modality for item in made[1].samples[0].items})


def _share(kind: str, costs: dict[str, Any]) -> float:
    work = (costs["llm_tflops"], costs["llm_tflops_dense"])
    return share_of(kind, costs["visual_tokens_before"], costs["visual_tokens_by_layer"], work)


def _shapes(made: Sequence[tuple[Costs, RequestRecord] | None]) -> dict[str, list[ItemShape]]:
    """The items of dense requests by modality."""
    shapes: dict[str, list[ItemShape]] = {}
    for _, call in filter(None, made):
        for item in call.samples[0].items:
            frames, tokens = item.owner.shape
            shape = ItemShape(frames, tokens, item.grid, item.full_length)
            shapes.setdefault(item.modality, []).append(shape)
    return shapes


def _everywhere(values: list[Any], world_size: int) -> list[Any]:
    """Those of all ranks, in the same order on each."""
    return of_all_ranks(values, world_size)
