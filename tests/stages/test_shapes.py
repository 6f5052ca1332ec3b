"""What a method says of its count before anything is encoded, against what it then gives back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import accelerate_methods
from accelerate_methods.registry import method_class
from accelerate_methods.stages.compress import CompressMethod, ViewCompressMethod
from accelerate_methods.stages.shapes import ItemShape
from tests.support.configured import configured
from tests.support.items import acts_on, each_variant, examples, items, make_item, make_views, ratios, view_items

pytestmark = pytest.mark.usefixtures("one_thread")
#: ratios of :mod:`tests.support.items`, and budgets of all there is
shares = st.one_of(ratios, st.just(1.0))


@each_variant(CompressMethod)
@examples
@given(item=items, ratio=shares)
def test_count_of_items(name, params, item, ratio):
    method = configured(name, ratio, **params)
    if "compress" in method.stages and acts_on(method, item):
        said, compressed = method.count(item.shape), method.compress(item)
        assert said is None or said == len(compressed.tokens)
        assert compressed.frame_marks == (method.frame_marks or said == item.num_tokens)


@each_variant(ViewCompressMethod)
@examples
@given(image=view_items, ratio=shares)
def test_count_of_views(name, params, image, ratio):
    method, (views, item) = configured(name, ratio, **params), image
    count, patches = views.num_views, views.tokens_per_view
    said = method.count(ItemShape(count, patches, views.grid, item.length, on_views=True, dense=item.num_tokens))
    compressed = method.compress_views(views)
    assert said is None or said == (item.num_tokens if compressed is None else len(compressed.tokens))


def test_shapes_of_items_and_views():
    item = make_item("grid", 3, 4, "random", torch.float32, 0)
    assert item.shape == ItemShape(3, 16, (4, 4), length=60) and item.shape.num_tokens == item.shape.dense == 48
    views, _ = make_views((2, 1), 3, True, "random", torch.float32, 0)
    assert views.shape == ItemShape(3, 9, (3, 3), on_views=True) and views.shape.length == 27


@pytest.mark.parametrize("name", accelerate_methods.available())
def test_methods_with_a_count_of_their_own_say_it(name):
    """A budget in tokens of a pure selection is known before anything is encoded."""
    if not issubclass(method_class(name), CompressMethod) or "tokens_per_view" not in method_class(name).parameters():
        pytest.skip("no budget in tokens of a view")
    method = accelerate_methods.get(name, tokens_per_view=7)
    assert method.count(ItemShape(5, 576, (24, 24), on_views=True)) == 35
