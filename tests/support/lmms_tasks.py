"""Made-up lmms-eval tasks for the plugin's tests: three task files over one set of documents, written into a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

_UTILS = """
from PIL import Image

def doc_to_visual(doc):
    if doc["video"]:
        return [doc["video"]]
    return [Image.open(path).convert("RGB") for path in doc["images"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    extra = lmms_eval_specific_kwargs or {}
    return extra.get("pre_prompt", "") + doc["question"] + extra.get("post_prompt", "")

def process_results(doc, results):
    return {"exact_match": float(results[0].strip() == doc["answer"])}
"""

_TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
task: {name}
test_split: test
output_type: {output_type}
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: "{target}"
{more}
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
  llava_vid:
    pre_prompt: ""
    post_prompt: "\\nThe best answer is:"
metadata:
  - version: 1.0
"""

_GENERATE = """
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  do_sample: false
process_results: !function utils.process_results
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_CHOICE = """
doc_to_choice: ["left", "right side"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

WORDS = (
    "What is shown?",
    "Which side is it on, left or right?",
    "How many?",
    "Is there a red square in it? Say yes or no.",
)


def write_video(path: Path, frames: int = 24, side: int = 64, seed: int = 0) -> Path:
    """A clip of moving noise at 8 frames per second."""
    import av

    generator = np.random.default_rng(seed)
    scene = generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for t in range(frames):
            frame = np.roll(scene, 3 * t, axis=1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.BILINEAR).save(path)
    return path


def document(number: int, images: tuple = (), video: Path | str = "", answer: str = "left") -> dict:
    question = WORDS[number % len(WORDS)]
    return {"question": question, "answer": answer, "images": [str(p) for p in images], "video": str(video)}


def write_tasks(folder: Path, **tasks: list[dict]) -> Path:
    """Task files for lists of documents; a name that starts with "choice" becomes a multiple-choice task."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(_UTILS)
    for name, documents in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(d) + "\n" for d in documents))
        choice = name.startswith("choice")
        text = _TASK.format(
            data=data,
            name=name,
            output_type="multiple_choice" if choice else "generate_until",
            target="answer" if not choice else "{{['left', 'right side'].index(answer)}}",
            more=_CHOICE if choice else _GENERATE,
        )
        (folder / f"{name}.yaml").write_text(text)
    return folder


def standard_tasks(folder: Path) -> Path:
    """Tasks text, image, images, video, mixed, choice_image, choice_video."""
    folder.mkdir(parents=True, exist_ok=True)
    wide, tall, small = (
        write_image(folder / name, size, seed)
        for seed, (name, size) in enumerate({"w.png": (500, 300), "t.png": (200, 640), "s.png": (90, 90)}.items())
    )
    clips = [write_video(folder / f"{n}.mp4", frames=16 + 8 * n, seed=n) for n in range(3)]
    text = [document(n) for n in range(3)]
    image = [document(n, (p,)) for n, p in enumerate((wide, tall, small))]
    images = [document(n, (wide, small)) for n in range(2)]
    video = [document(n, video=clip) for n, clip in enumerate(clips)]
    return write_tasks(
        folder,
        text=text,
        image=image,
        images=images,
        video=video,
        mixed=[*video[:2], *image, *images[:1], *text[:2]],
        choice_image=image[:2],
        choice_video=video[:2],
    )


def evaluate(model, tasks: list[str], folder: Path, model_name: str | None = None, **kwargs) -> dict:
    """``simple_evaluate`` on these tasks only, without the 20 s of the built-in task list."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    name = model if isinstance(model, str) else model_name
    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name=name)
    return simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **kwargs
    )


def answers(results: dict, task: str) -> list[str]:
    ordered = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [
        s["filtered_resps"][0].strip() if isinstance(s["filtered_resps"][0], str) else s["filtered_resps"]
        for s in ordered
    ]


def lines(results: dict, task: str) -> list[dict]:
    """The costs that each document's log line carries."""
    return [s["token_counts"][0] for s in sorted(results["samples"][task], key=lambda s: s["doc_id"])]
