"""The stock functions of MMBench-CN, and the scoring of the stock English static task with them."""

from __future__ import annotations

import json
from typing import Any

from lmms_eval.tasks._task_utils.file_utils import generate_submission_file
from lmms_eval.tasks.mmbench.cn_utils import (  # noqa: F401 - the task file takes them from here
    mmbench_aggregate_dev_results,
    mmbench_doc_to_text,
    mmbench_doc_to_visual,
    mmbench_evaluator,
    mmbench_process_results,
)


def aggregate_static(results: list[dict[str, Any]], args: Any) -> float:
    """Share of questions that are right in every rotation of their options, in per cent; no judge is asked."""
    overall, by_category, by_ability = mmbench_evaluator.eval_result(results, eval_method="static")
    details = {"overall_acc": overall, "category_acc": by_category, "l2_category_acc": by_ability}
    with open(generate_submission_file("mmbench_cn_dev_static_results.json", args), "w") as file:
        json.dump(details, file)
    return overall * 100
