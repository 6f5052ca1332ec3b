"""Shared fixtures: offline, few threads, every tiny model loaded once in float32."""

import collections
import contextlib
import gc
import os

from tests.support.paths import GOLDEN
from tests.support.shares import left_out, pytest_addoption, pytest_configure  # noqa: F401 (pytest finds them here)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # process groups of two workers must not meet on one port
    os.environ.setdefault("PET_MASTER_PORT", str(29600 + 10 * int(worker.removeprefix("gw"))))

import PIL
import pytest

with contextlib.suppress(ImportError):  # machines that run some tests only
    from hypothesis import settings

    # the same examples in every run; `--hypothesis-profile=default` looks for new ones
    settings.register_profile("same", derandomize=True, print_blob=True)
    settings.load_profile("same")

CHECKPOINTS = GOLDEN / "checkpoints"


def pytest_collection_modifyitems(config, items):
    """Without ``--thorough`` products are run in part. In several processes (scripts/test.sh) the files that take long
    come first, so that none is left for the end."""
    gone = set() if config.getoption("--thorough") else left_out(items)
    if gone:
        config.hook.pytest_deselected(items=list(gone))
        items[:] = [item for item in items if item not in gone]
    if not hasattr(config, "workerinput"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], str(item.path)))


def pytest_collection_finish():
    """What imports and collected tests hold stays until the end. The garbage collector, which transformers, accelerate
    and lmms-eval call at every load and unload of a model, would look through its millions of objects each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # what would otherwise be called a leak when the process ends


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module")
def one_thread():
    """For modules with many tiny operations: waiting for a second thread takes longer than the work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_grad():
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def siglip_tower(monkeypatch):
    """The pooling head that native OneVision models take from outside their checkpoint is the tiny tower's."""
    from accelerate_methods.hosts.native.llava_onevision import TOWER_VARIABLE

    monkeypatch.setenv(TOWER_VARIABLE, str(CHECKPOINTS / "tiny-llava-onevision" / "vision_tower"))


@pytest.fixture(scope="session")
def loaded():
    """load(name): (tokenizer, model, image_processor, context_len) of a tiny checkpoint, float32, loaded once."""
    from llava.model.builder import load_pretrained_model

    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = load_pretrained_model(
                str(CHECKPOINTS / name), device_map="cpu", torch_dtype="float32", attn_implementation="sdpa"
            )
        return cache[name]

    return load


@pytest.fixture
def tiny(loaded):
    """tiny(name, **config): the shared model; config changes are undone and everything detached afterwards."""
    import accelerate_methods

    touched = {}

    def get(name, **config):
        model = loaded(name)[1]
        touched.setdefault(name, (model, dict(model.config.__dict__)))
        for key, value in config.items():
            setattr(model.config, key, value)
        return model

    yield get
    for model, saved in touched.values():
        accelerate_methods.detach(model)
        model.config.__dict__.clear()
        model.config.__dict__.update(saved)


#: recorded with Pillow 13, which resizes vertically first where that is cheaper; older versions never do
PILLOW_13 = {"process_anyres_siglip_range"}


def skip_without_pillow_13(path):
    """Skip a golden file that older Pillow versions resize in another order than the recording one."""
    if path.stem in PILLOW_13 and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip(f"Pillow {PIL.__version__} resizes this image in another order than the recording one")
