"""MQT-LLaVA: its checkpoints, the number of tokens, and methods on it."""

import shutil

import pytest
import torch

from accelerate_methods import MethodError, accelerate, record
from llava.model.architectures import architecture_of
from llava.model.architectures.mqt import MqtLlavaForCausalLM
from llava.model.checkpoint import CheckpointError
from tests.support.architectures import from_checkpoint
from tests.support.paths import GOLDEN

FOLDER, TOWER = GOLDEN / "checkpoints/tiny-mqt-llava", GOLDEN / "checkpoints/tiny-llava-1.5/vision_tower"
IMAGE = -200
pytestmark = pytest.mark.usefixtures("no_grad")


def load(folder=FOLDER, **keys):
    return from_checkpoint(MqtLlavaForCausalLM, folder, **{"mm_vision_tower": str(TOWER), **keys})


@pytest.fixture(scope="module")
def model():
    return load()


def pictures(count, seed=0):
    return torch.randn(count, 3, 336, 336, generator=torch.Generator().manual_seed(seed))


def test_checkpoints_are_told_by_their_config():
    assert architecture_of({"query_abstractor_type": "matry_query"}) is MqtLlavaForCausalLM
    assert architecture_of({"architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}) is None


def test_fewer_tokens_are_the_first_of_more(model):
    features = model.get_vision_tower()(pictures(2))
    projector = model.get_model().mm_projector
    most = projector(features, 256)
    for count in (1, 7, 100):
        torch.testing.assert_close(projector(features, count), most[:, :count])


def test_256_unless_told_otherwise_whatever_the_config_says(model):
    assert model.config.num_visual_tokens == "second_stage"
    spliced = model.prepare_multimodal(torch.tensor([[1, IMAGE, 5]]), None, None, pictures(1))
    assert spliced.lengths == [258]


@pytest.mark.parametrize("count", [0, 257, -1, 2.0, True, "second_stage"])
def test_other_numbers_are_refused(model, count):
    with pytest.raises(ValueError, match="whole number from 1 to 256"):
        model.generate(torch.tensor([[1, IMAGE, 5]]), images=pictures(1), num_visual_tokens=count, max_new_tokens=1)


def test_a_batch_gives_the_answers_of_its_samples(model):
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [0, 0, 1, IMAGE, 9]])
    images = pictures(2)
    asked = {"num_visual_tokens": 9, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    both = model.generate(ids, images=images, attention_mask=(ids != 0).long(), **asked)
    first = model.generate(ids[:1], images=images[:1], **asked)
    second = model.generate(ids[1:, 2:], images=images[1:], **asked)
    assert torch.equal(both, torch.cat([first, second]))


def test_the_number_is_that_of_the_call_alone(model):
    ids, images = torch.tensor([[1, IMAGE, 5]]), pictures(1)
    with record() as requests:
        for count in (3, None):
            model.generate(ids, images=images, num_visual_tokens=count, max_new_tokens=1, pad_token_id=0)
    assert [request.samples[0].visual_tokens_after for request in requests] == [3, 256]


def test_frames_of_a_video_follow_each_other(model):
    asked = {"images": [pictures(3)], "modalities": ["video"], "num_visual_tokens": 4}
    (item,) = model.prepare_multimodal(torch.tensor([[1, IMAGE, 5]]), None, None, **asked).spans[0]
    assert (item.length, item.frames, item.frame_rows) == (12, 3, 4)


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    shutil.copy(FOLDER / "generation_config.json", tmp_path)
    again = load(tmp_path)
    features = model.get_vision_tower()(pictures(1))
    assert torch.equal(again.project(features), model.project(features))


def test_methods_inside_the_llm_and_on_tokens(model):
    ids, images = torch.tensor([[1, IMAGE, 5, 6]]), pictures(1)
    asked = {"images": images, "num_visual_tokens": 40, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    dense = model.generate(ids, **asked)
    with accelerate(model, "fastv", k=1, retention_ratio=1.0):
        assert torch.equal(model.generate(ids, **asked), dense)
    both = {"random.retention_ratio": 0.5, "fastv.k": 1, "fastv.r": 0.5}
    with accelerate(model, "random+fastv", **both), record() as requests:
        model.generate(ids, **asked)
    assert requests[0].samples[0].visual_tokens_after == 20 and requests[0].layer_lengths(0) == [23, 13, 13, 13]


@pytest.mark.parametrize(("method", "says"), [("fastervlm", "cls_attention"), ("downsample", "sample stage")])
def test_methods_that_read_patches_are_refused(model, method, says):
    with pytest.raises(MethodError, match=f"{says}.*MQT-LLaVA|MQT-LLaVA.*{says}"):
        accelerate(model, method)


def test_a_grid_in_the_config_is_refused():
    with pytest.raises(CheckpointError, match="queries have no grid"):
        load(mm_patch_merge_type="spatial_unpad")
