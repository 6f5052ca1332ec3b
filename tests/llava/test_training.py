"""Training through the LLaVA tree, with and without a method: dummy images, losses, padding sides, the Trainer."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, pad

from accelerate_methods import accelerate, detach
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.methods.test_every_method import IMAGE, OV, V15, Item, Question, inputs, pixels
from tests.support.configured import configured
from tests.support.native_models import tree_model

pytestmark = pytest.mark.usefixtures("one_thread", "siglip_tower")
METHODS = [None, "visionzip", "fastv"]
SIDE = 336


@pytest.fixture
def model():
    model = copy.deepcopy(tree_model(V15))
    yield model
    detach(model)


def batch(*rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def labels_of(asked):
    ids = asked["input_ids"]
    return ids.masked_fill((ids < 0) | (asked["attention_mask"] == 0), IGNORE_INDEX)


# -- dummy images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [[(1, 5, 6), (1, IMAGE, 7)], [(1, 5, 6)]], ids=["mixed", "text alone"])
def test_a_text_only_sample_may_bring_a_dummy_image_in_training(method, rows, model):
    """It is skipped. In training mode or with labels this is meant; at inference it is an error."""
    asked = batch(*rows)
    wanted = sum(IMAGE in row for row in rows)
    dummies = {"images": pixels(len(rows), SIDE, 0)}
    plain = {"images": dummies["images"][len(rows) - wanted :]} if wanted else {}
    labels = labels_of(asked)
    with torch.no_grad(), accelerate(model, method if method is None else configured(method, 1.0)):
        with pytest.raises(ValueError, match=f"hold {wanted} <image> placeholders but {len(rows)} images"):
            model(**asked, **dummies)
        with pytest.raises(ValueError, match="placeholders but"):
            model.generate(asked["input_ids"], attention_mask=asked["attention_mask"], **dummies, max_new_tokens=1)
        expected = model(**asked, **plain, labels=labels)
        with_labels = model(**asked, **dummies, labels=labels)
        model.train()
        without = model(**asked, **dummies)
    real = asked["attention_mask"].bool() if not wanted else ...
    for output in (with_labels, without):
        torch.testing.assert_close(output.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_labels.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_the_official_interface_follows(model):
    ids = torch.tensor([[1, 5, 6]])
    dummy = pixels(1, SIDE, 0)
    prepare = model.prepare_inputs_labels_for_multimodal
    with torch.no_grad():
        with pytest.raises(ValueError, match="0 <image> placeholders but 1"):
            prepare(ids, None, None, None, None, dummy)
        assert prepare(ids, None, None, None, ids, dummy)[4].shape[1] == 3
        model.train()
        assert prepare(ids, None, None, None, None, dummy)[4].shape[1] == 3
        model.eval()
        alone = prepare(torch.tensor([[IMAGE_TOKEN_INDEX]]), None, None, None, None, dummy)[4]
    assert alone.shape[1] == model.get_vision_tower().num_patches


def test_a_dummy_image_gets_no_gradient(model):
    """Every parameter of the projector has a gradient, as distributed training needs; that of a dummy is zero."""
    asked = batch((1, 5, 6))
    loss = model(**asked, images=pixels(1, SIDE, 0), labels=labels_of(asked)).loss
    loss.backward()
    grads = [p.grad for p in model.get_model().mm_projector.parameters()]
    assert all(g is None or not g.any() for g in grads)
    assert model.lm_head.weight.grad.abs().sum() > 0


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_loss_is_that_of_logits_and_labels(method, side, model):
    """``dpo_forward`` gives both; they stand on the side of the config, and so do the logits of ``forward``."""
    model.config.tokenizer_padding_side = side
    asked = batch((5, IMAGE, 7, 8, 9), (9, IMAGE, 4))
    asked |= {"images": pixels(2, SIDE, 0), "labels": labels_of(asked)}
    with torch.no_grad(), accelerate(model, method):
        logits, labels = model(**asked, dpo_forward=True)
        output = model(**asked, num_items_in_batch=10)
    assert torch.equal(output.logits, logits)
    behind = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    total = cross_entropy(logits.flatten(0, 1), behind.flatten(), reduction="sum")
    torch.testing.assert_close(output.loss, total / 10)
    assert [row[row >= 0].tolist() for row in labels] == [[5, 7, 8, 9], [9, 4]]
    assert (labels[1, 0] == 9) == (side == "right") and (labels[1, -1] == 4) == (side == "left")


@pytest.mark.parametrize("method", ["visionzip", "fastv"])
def test_gradients_at_a_real_budget_reach_what_was_kept(method, model):
    asked = batch((5, IMAGE, 7, 8, 9), (9, IMAGE, 4))
    asked |= {"images": pixels(2, SIDE, 0), "labels": labels_of(asked)}
    model.train()
    with accelerate(model, configured(method, 0.2)):
        model(**asked).loss.backward()
    for parameter in model.get_model().mm_projector.parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["visionzip", "fastv", "fastvid"])
def test_the_trainer_at_a_full_budget_is_the_trainer(method, tmp_path):
    """Gradient accumulation over micro batches with unequal numbers of labels: losses and weights as without."""
    from transformers import Trainer, TrainingArguments

    name = OV if method == "fastvid" else V15
    item = Item("video", 2) if method == "fastvid" else Item()
    questions = [Question((5, IMAGE, 7, 8, 9, 11), (item,)), Question((6, IMAGE, 9), (item,))]

    def collate(rows):
        asked = {k: v for k, v in inputs(tree_model(name), *rows).items() if v is not None}
        if "attention_mask" not in asked:
            asked["attention_mask"] = torch.ones_like(asked["input_ids"])
        labels = labels_of(asked)
        labels[:, 0] = IGNORE_INDEX
        return {**asked, "labels": labels}

    def train(attached):
        model = copy.deepcopy(tree_model(name))
        if attached:
            accelerate(model, configured(method, 1.0))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-3, seed=3,
            remove_unused_columns=False, lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=questions * 2)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, model.lm_head.weight.detach().clone()

    losses, weights = train(attached=True)
    wanted, wanted_weights = train(attached=False)
    assert len(losses) == 2 and losses == pytest.approx(wanted, abs=1e-3)
    torch.testing.assert_close(weights, wanted_weights, atol=1e-4, rtol=1e-3)
