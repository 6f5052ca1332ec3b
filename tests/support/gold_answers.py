"""Runs stock tasks with a model that knows the answers, and with one that is always wrong: no checkpoint, two passes.

    HF_HOME=... python tests/support/gold_answers.py RESULTS.json TASK... (in the working directory of the data)

Shows that the made-up documents have the right schema down to the scoring: the metrics must come out at their best and
at their worst. A process of its own since several tasks read HF_HOME when they are imported.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import lmms_eval
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval_accelerate import TASKS

STOCK = Path(lmms_eval.__file__).parent / "tasks"
#: folders of the tasks, so that not all two thousand are looked through
FOLDERS = (
    "mme mmbench pope scienceqa textvqa gqa vqav2 vizwiz_vqa seedbench videomme mvbench longvideobench mlvu egoschema "
    "nextqa ai2d chartqa docvqa ocrbench mmstar realworldqa"
)


def gold(document: dict[str, Any]) -> str:
    """The right answer of a document of any of the benchmarks, as its prompt asks for it."""
    if "gt_answer" in document:  # HallusionBench
        return "yes" if document["gt_answer"] == "1" else "no"
    if "options" in document and document["answer"].isdigit():  # AI2D
        return "ABCDE"[int(document["answer"])]
    if "question_type" in document and isinstance(document.get("answer"), list):  # OCRBench
        return document["answer"][0]
    if "correct_choice" in document:  # LongVideoBench
        return "ABCDE"[document["correct_choice"]]
    if "video" in document and "candidates" in document:  # MVBench
        return "ABCDE"[document["candidates"].index(document["answer"])]
    if "choices" in document or "a0" in document:  # ScienceQA, NExT-QA
        return "ABCDE"[document["answer"]]
    if "video_idx" in document:  # EgoSchema
        return "ABCDE"[int(document["answer"])]
    if "multiple_choice_answer" in document:  # VQAv2
        return document["multiple_choice_answer"]
    if "answers" in document:  # TextVQA, VizWiz
        return statistics.mode(document["answers"])
    return document["answer"]


def wrong(answer: str) -> str:
    """A readable answer that is not the right one."""
    if answer in ("A", "B", "C", "D", "E"):
        return "B" if answer == "A" else "A"
    return {"yes": "No", "no": "Yes"}.get(answer.lower(), "elephant")


class Answers(lmms):
    """Answers what ``answer`` makes of the document."""

    is_simple = True

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.visuals: dict[str, int] = {}

    def generate_until(self, requests):
        answers = []
        for request in requests:
            _, _, visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            self.visuals[task] = self.visuals.get(task, 0) + len(visual(document))
            answers.append(self.answer(document))
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


def main(target: str, *tasks: str) -> None:
    found = {}
    for name, answer in (("right", gold), ("wrong", lambda document: wrong(gold(document)))):
        model = Answers(answer)
        manager = TaskManager(
            "ERROR", include_path=[str(TASKS), *(str(STOCK / f) for f in FOLDERS.split())], include_defaults=False
        )
        results = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, verbosity="ERROR", log_samples=True
        )
        numbers = {
            task: {
                k.removesuffix(",none"): v for k, v in values.items() if "," in k and isinstance(v, float | int)
            }
            for task, values in results["results"].items()
        }
        found[name] = {"tasks": numbers, "visuals": model.visuals}
    Path(target).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
