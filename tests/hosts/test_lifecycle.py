"""How methods come and go on one model object: attached twice, from two threads, under others' wrappers, and copied."""

import copy
import gc
import io
import logging
import pickle
import threading

import pytest
import torch

from accelerate_methods import MethodError, accelerate, detach
from tests.support.native_models import tree_model
from tests.support.native_questions import QUESTIONS, V15, inputs, native

IMAGE = -200
ASKED = inputs(V15, QUESTIONS[V15]["image"])
PIXELS = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _no_grad(no_grad, one_thread):
    pass


@pytest.fixture(params=["llava", "transformers"])
def model(request):
    """A tiny LLaVA-1.5 of the tree, and the same of transformers."""
    model = tree_model(V15) if request.param == "llava" else native(V15)
    yield model
    detach(model)


def answer(model):
    """The logits after an image and a question: every method changes them."""
    if hasattr(model, "get_vision_tower"):
        return model(input_ids=torch.tensor([[5, IMAGE, 7, 8]]), images=PIXELS).logits[:, -1]
    return model(**ASKED).logits[:, -1]


def under(model, method, **params):
    with accelerate(model, method, **params):
        return answer(model)


# -- attached twice ----------------------------------------------------------------------------------------------------


def test_a_cell_that_runs_twice(model):
    """The first handle is forgotten; detaching the second leaves nothing."""
    dense, fastv = answer(model), under(model, "fastv", r=0.9)
    assert not torch.equal(dense, fastv)
    for _ in range(3):
        a = accelerate(model, "fastv", r=0.9)
    gc.collect()
    assert torch.equal(answer(model), fastv)
    a.detach()
    assert torch.equal(answer(model), dense)


def test_a_block_over_what_nobody_holds(model):
    """A method that was attached for good, as load_pretrained_model does it, is there again after a block."""
    dense, fastv, uniform = answer(model), under(model, "fastv"), under(model, "uniform", retention_ratio=0.1)
    accelerate(model, "fastv")
    gc.collect()
    with accelerate(model, "uniform", retention_ratio=0.1):
        assert torch.equal(answer(model), uniform)
        inner = accelerate(model, "fastv")
        inner.detach()
        assert torch.equal(answer(model), uniform), "back to the block, not below it"
    assert torch.equal(answer(model), fastv)
    another = accelerate(model, "uniform", retention_ratio=0.1)
    another.detach()
    assert torch.equal(answer(model), dense), "replaced, not covered"


# -- two threads -------------------------------------------------------------------------------------------------------


def in_a_thread(work):
    """The error that ``work`` ends with in a thread of its own, or None."""
    errors = []

    def run():
        try:
            with torch.no_grad():
                work()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(120)
    return errors[0] if errors else None


def test_a_block_of_another_thread(model):
    dense, fastv = answer(model), under(model, "fastv")
    with accelerate(model, "fastv"):
        error = in_a_thread(lambda: under(model, "uniform", retention_ratio=0.5))
        assert isinstance(error, MethodError) and "another thread is inside" in str(error)
        assert torch.equal(answer(model), fastv), "the refused one has changed nothing"
    assert torch.equal(answer(model), dense)
    assert in_a_thread(lambda: under(model, "uniform", retention_ratio=0.5)) is None


def test_attached_between_making_and_entering(model):
    dense = answer(model)
    made = accelerate(model, "fastv")
    later = accelerate(model, "uniform", retention_ratio=0.5)
    with pytest.raises(MethodError, match="something else was attached after fastv"), made:
        pass
    later.detach()
    assert torch.equal(answer(model), dense), "the one that was refused does not come back"


def test_threads_under_one_attachment(model):
    """Attached once, outside of the threads: every thread gets it."""
    fastv = under(model, "fastv")
    attached, got = accelerate(model, "fastv"), []
    assert in_a_thread(lambda: got.append(answer(model))) is None
    attached.detach()
    assert torch.equal(got[0], fastv)


# -- others' wrappers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_detaching_leaves_what_others_put_on(order, caplog):
    model, calls = native(V15), []

    def trace(forward):
        def traced(*args, **kwargs):
            calls.append(1)
            return forward(*args, **kwargs)

        return traced

    dense, fastv = answer(model), under(model, "fastv", r=0.9)
    try:
        if order == "theirs first":
            model.forward = trace(model.forward)
        attached = accelerate(model, "fastv", r=0.9)
        if order == "ours first":
            model.forward = trace(model.forward)
        assert torch.equal(answer(model), fastv) and len(calls) == 1
        with caplog.at_level(logging.WARNING):
            attached.detach()
        assert ("forward was changed while a method was attached" in caplog.text) == (order == "ours first")
        assert torch.equal(answer(model), dense) and len(calls) == 2, "theirs still works, ours is off"
        assert torch.equal(under(model, "fastv", r=0.9), fastv) and len(calls) == 3
        assert torch.equal(answer(model), dense) and len(calls) == 4
    finally:
        del model.forward
    assert torch.equal(answer(model), dense)


# -- copies ------------------------------------------------------------------------------------------------------------


def test_deep_copies_are_models_of_their_own(model):
    dense = answer(model)
    attached = accelerate(model, "fastv", r=0.9)
    fastv = answer(model)
    twin = copy.deepcopy(model)
    inside = copy.deepcopy(torch.nn.ModuleList([model]))[0]
    detach(twin)
    detach(inside)
    assert torch.equal(answer(model), fastv), "the original keeps its method"
    attached.detach()
    for other in (twin, inside):
        assert torch.equal(answer(other), dense)
        for weight in other.parameters():
            weight.zero_()
        assert torch.equal(under(other, "fastv"), torch.zeros_like(fastv))
    assert torch.equal(answer(model), dense), "nothing is shared"


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickling(model, write):
    native_model = not hasattr(model, "get_vision_tower")
    with accelerate(model, "fastv"):
        if native_model:
            with pytest.raises(MethodError, match=r"fastv attached cannot be pickled; detach it first"):
                write(model)
        else:
            write(model)
        torch.save(model.state_dict(), io.BytesIO())
    if not native_model:  # transformers' own hooks cannot be pickled once a model has run
        write(model)
