"""Every registered method under every gradient mode, on features that are no numbers; what it reads from the device.

Methods come from the registry and models from the compatibility table; a method added later is tested by itself.
"""

import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import accelerate_methods
from accelerate_methods import accelerate, detach
from accelerate_methods.engine.sequences import assemble
from accelerate_methods.ops.select import on_device
from accelerate_methods.registry import method_class
from accelerate_methods.stages import compress as compress_stage
from accelerate_methods.stages import contract
from accelerate_methods.stages.compress import CompressMethod, ViewCompressMethod
from accelerate_methods.stages.errors import MethodError
from tests.methods.test_every_method import OV, PAIRS, V15, inputs, small
from tests.support import host_reads, native_questions
from tests.support.configured import SHARING, configured
from tests.support.host_reads import HostReads
from tests.support.items import LAYOUTS, acts_on, make_item, make_views

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = accelerate_methods.available()
COMPRESSING = [n for n in NAMES if issubclass(method_class(n), CompressMethod)]
each_pair = pytest.mark.parametrize(("method", "name"), PAIRS)
#: the transformers models that these tests use, and what FastVID lacks there: SigLIP's pooling head
NATIVE = [(m, n) for m, n in PAIRS if n in (V15, OV) and not (m == "fastvid" or m == "downsample")]


@pytest.fixture
def model(name, tiny):
    model = tiny(name)
    yield model
    detach(model)


# -- gradients ---------------------------------------------------------------------------------------------------------


@each_pair
def test_forward_under_every_gradient_mode(method, name, model):
    asked = inputs(model, small(method, name))
    with accelerate(model, configured(method)):
        with torch.no_grad():
            expected = model(**asked).logits
        with torch.inference_mode():
            assert torch.equal(model(**asked).logits, expected)
        with torch.enable_grad():
            logits = model(**asked).logits
    assert logits.requires_grad and torch.equal(logits, expected)


@pytest.mark.share(2, each=("method",))
@each_pair
def test_training_mode_and_backward(method, name, model):
    """The loss reaches the projector through what stays; nothing that only chooses is in its graph."""
    asked = inputs(model, small(method, name))
    labels = asked["input_ids"].where(asked["input_ids"] >= 0, -100)
    model.train()
    with accelerate(model, configured(method)), torch.enable_grad():
        loss = model(**asked, labels=labels).loss
        loss.backward()
    weight = next(model.get_model().mm_projector.parameters())
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all() and weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize(("method", "name"), NATIVE)
def test_native_models_under_every_gradient_mode(method, name):
    model, question = native_questions.native(name), native_questions.MAIN[name]
    asked = native_questions.inputs(name, native_questions.QUESTIONS[name][question])
    with accelerate(model, configured(method)):
        with torch.no_grad():
            expected = model(**asked).logits
        with torch.inference_mode():
            assert torch.equal(model(**asked).logits, expected)
        with torch.enable_grad():
            logits = model(**asked).logits
            assert logits.requires_grad and torch.equal(logits, expected)
            logits.float().logsumexp(-1).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)
    model.zero_grad()


# -- what is not a number ----------------------------------------------------------------------------------------------

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def spoilt(values, bad, where):
    """A copy with one token (of the first frame or view), or everything, replaced."""
    values = values.clone()
    flat = values.flatten(0, 1) if values.dim() > 2 else values.flatten()
    flat[slice(None) if where == "all" else slice(2, 3)] = bad
    return flat.view(values.shape)


def check_compressed(compressed, shape):
    kept = len(compressed.tokens)
    assert compressed.owner.shape == shape and compressed.owner.min() >= -1 and compressed.owner.max() < kept
    assert kept > 0


@pytest.mark.share(3, each=("method",))
@pytest.mark.parametrize("where", ["token", "all"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", COMPRESSING)
def test_features_and_signals_that_are_not_finite(method, dtype, bad, where):
    """What stays is always one of the tokens, and the same in every call: no index comes out of unwritten memory."""
    method = configured(method)
    for layout in LAYOUTS:
        item = make_item(layout, 8, 5, "random", dtype, 0)
        if not acts_on(method, item):
            continue
        item.features = spoilt(item.features, BAD[bad], where)
        item.signals = {
            name: spoilt(signal, float("nan"), where) if signal.dim() == 2 or name == "key_states" else signal
            for name, signal in item.signals.items()
        }
        first, again = method.compress(item), method.compress(item)
        check_compressed(first, item.positions.shape)
        assert torch.equal(first.positions, again.positions) and torch.equal(first.owner, again.owner)
        assert first.positions.min() >= 0 and first.positions.max() < item.length
        assert method.name in SHARING or len(first.positions.unique()) == len(first.positions)
        assemble(item, first)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", [n for n in COMPRESSING if issubclass(method_class(n), ViewCompressMethod)])
def test_views_that_are_not_finite(method, bad):
    method = configured(method)
    for where in ("token", "all"):
        views, _ = make_views((2, 1), 5, True, "random", torch.float32, 0)
        views.features = spoilt(views.features, BAD[bad], where)
        views.signals = {name: spoilt(signal, BAD[bad], where) for name, signal in views.signals.items()}
        first, again = method.compress_views(views), method.compress_views(views)
        check_compressed(first, views.features.shape[:2])
        assert torch.equal(first.patch, again.patch) and torch.equal(first.owner, again.owner)
        assert first.patch.min() >= -1 and first.patch.max() < views.tokens_per_view


@pytest.mark.share(2, each=("method",))
@each_pair
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_pixels_that_are_not_finite(method, name, bad, model):
    """An answer to nothing, as the model alone gives, or an error that says so; never a crash in an index."""
    asked = inputs(model, small(method, name))
    asked["images"] = [image * BAD[bad] for image in asked["images"]]
    with accelerate(model, configured(method)), torch.no_grad():
        try:
            ids = [model.generate(**asked, max_new_tokens=3, do_sample=False, eos_token_id=None) for _ in range(2)]
        except MethodError as error:
            assert "finite" in str(error)
            return
    assert torch.equal(*ids)


# -- host reads and launches -------------------------------------------------------------------------------------------


VIEWS = {
    "view", "expand", "as_strided", "slice", "select", "permute", "transpose", "unsqueeze", "squeeze", "empty",
    "detach", "alias", "t", "_unsafe_view", "split", "split_with_sizes", "unbind", "diagonal", "new_empty",
    "empty_strided", "unfold", "empty_like", "_reshape_alias", "lift_fresh", "scalar_tensor",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would launch a kernel for (some launch several)."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.split("::")[1] not in VIEWS
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Values that a method gives back are looked at on the CPU only."""
    for name in ("_indices", "check_kept"):
        monkeypatch.setattr(contract, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(compress_stage, "check_kept", lambda *args: None)


def work(method, layout, frames=32, side=6):
    item = make_item(layout, frames, side, "random", torch.float32, 0)
    # a few scenes, as a video has
    item.features = item.features[torch.arange(frames) // 5 * 5] + 0.01 * item.features
    item.signals["frame_features"] = item.features.mean(1)
    return lambda: assemble(item, method.compress(item))


UNREAD = (
    *("dycoke", "visionzip", "fastervlm", "fastv", "pdrop", "dart", "v2drop"),
    *("random", "uniform", "pool", "downsample"),
)
#: reads of a prompt, of methods held to them: how many tokens there are depends on these (with several newlines also on
#: which survive: one more). A method that is not named here may read what it needs.
READS = {"fastvid": ["cpu"], "prunevid": ["tolist", "tolist"], **{name: [] for name in UNREAD}}
#: of every decode step: how many keys it sees, all or a share of them, depends on its attention
STEPS = {"dycoke": ["nonzero"]}


@pytest.mark.parametrize("layout", ["one_token", "grid"])
@pytest.mark.parametrize("method", [n for n in COMPRESSING if n in READS])
def test_host_reads_of_a_video(method, layout, as_on_a_gpu):
    run = work(configured(method), layout)
    with torch.no_grad(), HostReads() as reads:
        run()
    closing = ["nonzero"] if layout == "grid" and "nonzero" in reads.names[-1:] else []
    assert reads.names == READS[method] + closing


def test_what_makes_the_host_wait_is_noticed():
    """The means of the tests here: each of these waits for a GPU, and nothing else in the function."""
    code = """
    def work(values, mask):
        values.tolist()
        bool(mask.any())
        values[mask]
        values[mask] = 0.0
        values[mask] = values[mask] + 1
        mask.nonzero()
        known = values.cpu()
        known.tolist(), known[0].item(), bool((known > 0).all()), known[known > 0]
        values[torch.tensor([0, 1])], values[[1, 0]]
        torch.tensor([1.0], device=values.device)
        on_device([1.0], values.device).tolist()
        on_device(torch.arange(3), values.device)
        torch.arange(3).to(values.device)
    """
    path = Path(host_reads.OURS[0]) / "made_up.py"
    names = {"torch": torch, "on_device": on_device}
    exec(compile(textwrap.dedent(code), str(path), "exec"), names)
    values, mask = torch.randn(3), torch.tensor([True, False, True])
    with HostReads() as reads:
        names["work"](values, mask)
    waits = ["tolist", "__bool__", "mask", "mask", "mask", "nonzero", "cpu", "upload", "upload", "upload", "tolist"]
    assert reads.names == [*waits, "upload"]


def check_reads(model, asked, method):
    """Two answers, one of a single token: the second reads for its steps what it reads for each."""
    with accelerate(model, configured(method)), torch.no_grad():
        model(**asked)  # checks of shapes that are done once
        with HostReads() as forward:
            model(**asked)
        with HostReads() as first:
            model.generate(**asked, max_new_tokens=1, do_sample=False, eos_token_id=None)
        with HostReads() as longer:
            model.generate(**asked, max_new_tokens=4, do_sample=False, eos_token_id=None)
    left = list(forward.names)
    for known in ["cpu", *READS[method]]:  # "cpu": where the images stand, once for the batch
        left.remove(known)
    assert left in ([], ["nonzero"]), forward.seen  # newlines that survive
    assert [read for read in first.seen if read[1] != "prompt.py:goes_on"] == forward.seen
    assert longer.seen[: len(first.seen)] == first.seen
    assert longer.names[len(first.seen) :] == 3 * STEPS.get(method, [])


@pytest.mark.parametrize(("method", "name"), [pair for pair in PAIRS if pair[0] in READS])
def test_host_reads_of_a_request(method, name, model):
    check_reads(model, inputs(model, small(method, name)), method)


@pytest.mark.parametrize(("method", "name"), [pair for pair in NATIVE if pair[0] in READS])
def test_host_reads_of_a_native_request(method, name):
    """Before the images are encoded ``generate`` also looks at the positions that it has made."""
    model, question = native_questions.native(name), native_questions.MAIN[name]
    asked = native_questions.inputs(name, native_questions.QUESTIONS[name][question])
    check_reads(model, asked, method)


#: operations of a compression and of laying out what it leaves
BOUNDS = {"fastvid": 150, "prunevid": 160, "dycoke": 50, "visionzip": 80, "fastervlm": 40}


@pytest.mark.parametrize("method", BOUNDS)
def test_launches_of_a_video(method, as_on_a_gpu):
    run = work(configured(method), "one_token")
    with torch.no_grad(), Launches() as launches:
        run()
    assert launches.count <= BOUNDS[method], launches.count
