"""Engines of vLLM, one per model family, and transformers beside them. Skipped where vLLM is not installed."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.support.served_engines import SETTINGS, Reference, clip, described, engine, picture

#: what stands in a prompt for an image and a video
_LLAVA = {"image": "<image>"}
_QWEN = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
MARKS = {
    "llava_1_5": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": {"image": "<image>", "video": "<video>"},
    "internvl": {"image": "<IMG_CONTEXT>", "video": "<video>"},
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
}
#: families whose engines start with ``--thorough`` only: their code is that of another family
ON_DEMAND = {"llava_next", "qwen2_vl"}
#: families that want to know the frame rate of a video
DESCRIBED = {"qwen2_5_vl", "qwen3_vl"}
#: more than one run of the tower, and of the language model, for every prompt
SMALL_STEPS = {"max_num_batched_tokens": 96}
#: few blocks for keys and values, so that requests put each other off; what happened is counted
FEW_BLOCKS = {"max_model_len": 640, "num_gpu_blocks_override": 21, "disable_log_stats": False}
FEW_VIEWS = "3"
#: families whose engines have to be told that methods may come
ASKED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


def pytest_collection_modifyitems(config, items):
    families = {item: getattr(item, "callspec", None) and item.callspec.params.get("checkpoint") for item in items}
    gone = [] if config.getoption("--thorough") else [item for item, family in families.items() if family in ON_DEMAND]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in set(gone)]
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM is not installed here: scripts/test.sh runs these in an environment of their own"
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    """Folder of the family's checkpoint."""
    from tests.support.served_models import CHECKPOINTS

    return CHECKPOINTS[request.param](tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(checkpoint):
    """The checkpoint in an engine that does everything in small steps."""
    with pytest.MonkeyPatch.context() as patch:
        # what vLLM has found out about its own classes is kept beside it: that takes a process of its own each time
        settings = {**SETTINGS, "VLLM_CACHE_ROOT": str(Path(sys.prefix, "vllm-cache"))}
        for name, value in {**settings, "ACCELERATE_METHODS_VLLM_VIEWS": FEW_VIEWS}.items():
            patch.setenv(name, value)
        more = {"hf_overrides": {"visual_compression": "none"}} if checkpoint.name in ASKED else {}
        yield from engine(checkpoint, MARKS[checkpoint.name], **SMALL_STEPS, **FEW_BLOCKS, **more)


@pytest.fixture(scope="module")
def media(checkpoint):
    """Kind of item -> function that makes one for this family."""
    videos = (lambda *args, **kwargs: described(clip(*args, **kwargs))) if checkpoint.name in DESCRIBED else clip
    return {kind: {"image": picture, "video": videos}[kind] for kind in MARKS[checkpoint.name]}


@pytest.fixture(scope="module")
def reference(checkpoint):
    """The checkpoint in transformers, under this project's host."""
    return Reference(checkpoint)
