"""The unmodified stock classes of lmms-eval run on our ``llava`` package, and our classes answer as they do."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("decord")

from tests.support.lmms_tasks import answers, evaluate, standard_tasks
from tests.support.paths import CHECKPOINTS

# device_map=auto is the stock classes' only path to a CPU
STOCK = {
    "llava-1.5": ("llava", "tiny-llava-1.5", ["image", "images", "text"]),
    "llava-1.6": ("llava", "tiny-llava-1.6", ["image", "text"]),
    "onevision": ("llava_onevision", "tiny-llava-onevision", ["image", "images", "video", "text"]),
    "video": ("llava_vid", "tiny-llava-video", ["video"]),
}
OURS = {
    "llava": "llava_accelerated",
    "llava_onevision": "llava_onevision_accelerated",
    "llava_vid": "llava_video_accelerated",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standard_tasks(tmp_path_factory.mktemp("tasks"))


def stock_model(name: str, checkpoint: str):
    from lmms_eval.models import get_model

    frames = "" if name == "llava" else ",max_frames_num=4"
    # the stock llava_vid defaults to Vicuna's template whatever the checkpoint is
    template = ",conv_template=qwen_1_5" if name == "llava_vid" else ""
    arguments = f"pretrained={CHECKPOINTS / checkpoint},device_map=auto{frames}{template}"
    return get_model(name).create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})


def our_arguments(name: str, checkpoint: str, dtype: str = "float16") -> str:
    return f"pretrained={CHECKPOINTS / checkpoint},dtype={dtype}" + ("" if name == "llava" else ",max_frames_num=4")


@pytest.mark.parametrize("case", STOCK)
def test_same_answers_and_prompts_as_stock(case: str, folder) -> None:
    name, checkpoint, tasks = STOCK[case]
    stock = evaluate(stock_model(name, checkpoint), tasks, folder, model_name=name)
    ours = evaluate(OURS[name], tasks, folder, model_args=our_arguments(name, checkpoint))
    for task in tasks:
        assert answers(ours, task) == answers(stock, task)
        # the task's prompt as it was asked (llava_vid has one of its own)
        assert [s["arguments"][0] for s in ours["samples"][task]] == [s["arguments"][0] for s in stock["samples"][task]]


@pytest.mark.parametrize("case", ["llava-1.5", "onevision", "video"])
def test_same_likelihoods_as_stock(case: str, folder) -> None:
    name, checkpoint, _ = STOCK[case]
    task = "choice_video" if case == "video" else "choice_image"
    stock, ours = (likelihoods(m, task, folder) for m in (stock_model(name, checkpoint), our_model(name, checkpoint)))
    # float16 on CPU; ours takes the logits of the continuation only
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in stock], abs=2e-2)


def our_model(name: str, checkpoint: str):
    from lmms_eval.models import get_model

    return get_model(OURS[name]).create_from_arg_string(our_arguments(name, checkpoint), {"device": "cpu"})


def likelihoods(model, task: str, folder) -> list[tuple[float, bool]]:
    """Straight from the model: the harness turns the stock classes' tuples into text and fails on it."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="llava_vid")
    task_object = get_task_dict([task], manager, "simple")[task]
    task_object.set_config(key="num_fewshot", value=0)
    task_object.build_all_requests()
    model.task_dict[task] = task_object.dataset
    model.metadata = {}  # the stock llava_onevision reads an attribute that nobody sets
    return [tuple(result) for result in model.loglikelihood(task_object.instances)]
