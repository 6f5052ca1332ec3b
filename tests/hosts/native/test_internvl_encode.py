"""Encode methods in InternVL's tower: a unit is the four patches of a token, tile by tile."""

import pytest
import torch

from accelerate_methods import accelerate, record
from tests.hosts.native.test_internvl import BATCH, IMAGE, PER_TILE, QUESTIONS, greedy, inputs, internvl, tiles_of
from tests.support.hand_cut import Cut, dense_inputs, language_model

VARIANTS = ("plain", "6b", "middle")
pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_variant
@pytest.mark.parametrize("method", ["tome", "tome+visionzip"])
def test_where_nothing_is_merged_every_number_is_that_of_the_model(variant, method):
    """The blocks run apart, patches in the order of their tokens."""
    model = internvl(variant)
    params = {"r": 0} if method == "tome" else {"tome.r": 0, "visionzip.retention_ratio": 1.0}
    for name in QUESTIONS:
        asked = inputs(name)
        dense = model(**asked).logits
        with accelerate(model, method, **params):
            torch.testing.assert_close(model(**asked).logits, dense, atol=1e-4, rtol=1e-4)


@each_variant
@pytest.mark.parametrize("name", ["image", "tiled image", "frames"])
def test_dropping_after_the_last_block_is_choosing_among_the_models_own_features(variant, name):
    model, asked = internvl(variant), inputs(name)
    dense = dense_inputs(model, asked)
    last = len(model.model.vision_tower.encoder.layer) + model.config.vision_feature_layer
    with accelerate(model, "evit", blocks=[last], tokens=[7], fuse_token=False), record() as requests:
        logits = model(**asked).logits[:, -1]
    kept = torch.cat([item.kept for item in requests[0].samples[0].items])
    assert (kept.sum(1) == 7).all() and len(kept) == sum(tiles_of(name))
    left = torch.ones(asked["input_ids"].shape[1], dtype=torch.bool)
    left[(asked["input_ids"][0] == IMAGE).nonzero().flatten()[~kept.flatten()]] = False
    rows = int(left.sum())
    expected, _ = language_model(
        model,
        Cut(
            embeds=dense.embeds[0, left], positions=torch.arange(rows)[None], source=left.nonzero().flatten(),
            added=[], following=rows,
        ),
        1,
    )  # fmt: skip
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("tome", {"retention_ratio": 0.5}),
        ("tome", {"retention_ratio": 0.5, "unmerge": True}),
        ("evit", {"keep_rate": 0.6, "fuse_token": True, "token_order": "raster"}),
        ("tome+fastv", {"tome.retention_ratio": 0.5, "fastv.k": 1}),
        ("tome+visionzip", {"tome.retention_ratio": 0.6, "visionzip.retention_ratio": 0.2}),
    ],
)
def test_a_batch_is_its_samples_and_every_token_has_one_holder(method, params):
    model = internvl()
    asked = inputs(*BATCH)
    dense = model(**asked).logits[:, -1]
    used = 0
    with accelerate(model, method, **params):
        with record() as requests:
            together, answers = model(**asked).logits[:, -1], greedy(model, asked)
        for row, name in enumerate(BATCH):
            real, tiles = asked["attention_mask"][row].bool(), sum(tiles_of(name))
            one = {"input_ids": asked["input_ids"][row : row + 1, real]}
            if tiles:
                one["pixel_values"] = asked["pixel_values"][used : used + tiles]
            used += tiles
            torch.testing.assert_close(model(**one).logits[0, -1], together[row], atol=1e-4, rtol=1e-4)
            assert torch.equal(greedy(model, one)[0], answers[row])
            assert torch.allclose(dense[row], together[row], atol=1e-4) == (name == "text")
    for sample, name in zip(requests[0].samples, BATCH, strict=True):
        assert [item.owner.shape for item in sample.items] == [(tiles, PER_TILE) for tiles in tiles_of(name)]
        for item in sample.items:
            held = item.owner[item.kept]
            assert (held >= 0).all() and len(held.unique()) == len(held)
