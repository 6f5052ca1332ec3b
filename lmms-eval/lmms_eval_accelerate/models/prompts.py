"""Task prompts under the name of the stock model.

A task may hold prompts per model name (``lmms_eval_specific_kwargs: {default: ..., llava_vid: ...}``) and picks its
block by the name typed after ``--model`` while it is built. For our ids that is always ``default``, although e.g.
VideoMME words its question differently for ``llava_vid``. lmms-eval builds the tasks without asking the model, so the
model puts it right when the requests arrive: a request carries a bound method of its task, and the task can build the
request again under the block of the stock model. Nothing in lmms-eval is patched, and it works however the run was
started (``lmms-eval``, our command, ``simple_evaluate``).
"""

from __future__ import annotations

from typing import Any

from lmms_eval.api.task import Task
from loguru import logger

_BLOCKS = ("lmms_eval_specific_kwargs", "model_specific_target_kwargs", "model_specific_generation_kwargs")


def align(requests: list[Any], stock: str | None) -> None:
    """Rewrite ``request.arguments`` to what the stock model would have been asked. ``stock=None`` leaves them alone."""
    if stock is None:
        return
    changed: dict[int, bool] = {}
    for request in requests:
        task = task_of(request)
        if task is None:
            continue
        if id(task) not in changed:
            changed[id(task)] = _use_blocks(task, stock)
        if changed[id(task)]:
            _rebuild(request, task)


def task_of(request: Any) -> Task | None:
    """The task that made a request (the owner of its ``doc_to_visual``), None if something else stands there."""
    owners = (getattr(argument, "__self__", None) for argument in request.arguments)
    return next((owner for owner in owners if isinstance(owner, Task)), None)


def _use_blocks(task: Any, stock: str) -> bool:
    """Let the task use the stock model's blocks; whether its requests have to be built again."""
    if getattr(task, "accelerate_prompt_model", None) == stock:
        return True  # a second call for the same task (another request type, another batch of requests)
    blocks = {name: (getattr(task.config, name, None) or {}).get(stock) for name in _BLOCKS}
    if all(block is None for block in blocks.values()) or task.model_name == stock:
        return False
    if task.OUTPUT_TYPE == "generate_until_agentic":
        logger.warning(f"task {task.config.task} has its own prompts for {stock}, but agentic tasks are not re-worded.")
        return False
    for name, block in blocks.items():
        if block is not None:
            setattr(task, name, block)
    # as ConfigurableTask does it when the name matches at once; --gen_kwargs of the command line go on top again
    task.config.generation_kwargs.update(blocks["model_specific_generation_kwargs"] or {})
    task.config.generation_kwargs.update(_cli_generation_kwargs(task))
    task.accelerate_prompt_model = stock
    logger.info(f"task {task.config.task}: using its prompts for {stock}")
    return True


def _rebuild(request: Any, task: Any) -> None:
    document = task.eval_docs_no_media[request.doc_id]
    options = getattr(task, "args", None)
    context = task.fewshot_context(
        document, task.config.num_fewshot or 0, getattr(options, "system_instruction", None), False, False, None
    )
    built = task.construct_requests(doc_id=request.doc_id, ctx=context, metadata=request.metadata)
    built = built if isinstance(built, list) else [built]
    same = [b for b in built if b.idx == request.idx and len(b.arguments) == len(request.arguments)]
    request.arguments = same[0].arguments


def _cli_generation_kwargs(task: Any) -> dict[str, Any]:
    from lmms_eval.utils import simple_parse_args_string

    return simple_parse_args_string(getattr(getattr(task, "args", None), "gen_kwargs", None) or "")
