"""LLaVA-Mini: its checkpoints, pre-fusion in two halves, kept images, the forms of images and videos, methods on it."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from accelerate_methods import MethodError, accelerate, available, record
from accelerate_methods.registry.compatibility import runs_on
from llava.conversation import conv_templates
from llava.eval.asking import Assistant
from llava.model.architectures import architecture_of
from llava.model.architectures.llava_mini import LlavaMiniForCausalLM, prefusion
from llava.model.architectures.llava_mini.compressor import QueryCompressor, position_table, stitched
from llava.model.architectures.llava_mini.media import sample_frames
from llava.model.checkpoint import CheckpointError
from llava.model.splice import Prompts
from tests.support.architectures import from_checkpoint, tiny_checkpoint
from tests.support.configured import configured
from tests.support.paths import GOLDEN
from tests.support.several_devices import SeveralDevices

CHECKPOINTS = GOLDEN / "checkpoints"
TOWER = CHECKPOINTS / "tiny-llava-1.5/vision_tower"
IMAGE = -200
ASKED = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
pytestmark = pytest.mark.usefixtures("no_grad")


def load(folder=CHECKPOINTS / "tiny-llava-mini", dtype=torch.float32, **how):
    return from_checkpoint(LlavaMiniForCausalLM, folder, dtype, how, mm_vision_tower=str(TOWER))


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def sharp():
    return load(CHECKPOINTS / "tiny-llava-mini-hd")


def pixels(*shape, seed=0):
    return torch.randn(*shape, 3, 336, 336, generator=torch.Generator().manual_seed(seed))


def spliced(model, ids, images, mask=None, **how):
    return model.prepare_multimodal(torch.tensor(ids), mask, None, images, **how)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_config():
    for config in ({"compressor_size": 1, "prefusion_layer_num": 4}, {"architectures": ["LlavaMiniLlamaForCausalLM"]}):
        assert architecture_of(config) is LlavaMiniForCausalLM
    assert architecture_of({"architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}) is None


def broken(tmp_path, change=lambda weights: weights, **config_keys):
    folder = tmp_path / "broken"
    shutil.copytree(CHECKPOINTS / "tiny-llava-mini", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **config_keys}))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if name not in key}


@pytest.mark.parametrize("name", ["compressor.query", "prefusion_layers.3."])
def test_half_a_checkpoint_is_an_error(tmp_path, name):
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(broken(tmp_path, without(name)))


def test_layers_that_the_config_does_not_count_are_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="prefusion_layers"):
        load(broken(tmp_path, prefusion_layer_num=3))


@pytest.mark.parametrize("size", [None, 0, "1"])
def test_a_config_without_a_number_of_tokens_is_an_error(tmp_path, size):
    with pytest.raises(CheckpointError, match="compressor_size must be"):
        load(broken(tmp_path, compressor_size=size))


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, images = load(tmp_path), pixels(1)
    assert torch.equal(spliced(again, [[1, IMAGE, 5]], images).inputs_embeds,
                       spliced(model, [[1, IMAGE, 5]], images).inputs_embeds)  # fmt: skip


def test_a_copy_answers_alike(model):
    ids, images = torch.tensor([[1, IMAGE, 5, 6]]), pixels(1)
    assert torch.equal(copy.deepcopy(model).generate(ids, images=images, **ASKED),
                       model.generate(ids, images=images, **ASKED))  # fmt: skip


def test_weights_may_lie_elsewhere(model, tmp_path):
    places = {f"model.{name}": "disk" for name, _ in model.get_model().named_children()} | {"lm_head": "cpu"}
    offloaded = load(device_map=places | {"model.norm": "cpu"}, offload_folder=str(tmp_path))
    ids, images = torch.tensor([[1, IMAGE, 5, 6]]), pixels(1)
    expected = model.generate(ids, images=images, **ASKED)
    assert torch.equal(offloaded.generate(ids, images=images, **ASKED), expected)
    assert torch.equal(offloaded.generate(ids, images=offloaded.prefuse(images), **ASKED), expected)
    features = torch.randn(1, 36, 32)
    own, other = (each.get_model().compressor.attention(features) for each in (model, offloaded))
    assert torch.equal(own, other)


def test_spread_over_devices(model):
    spread = load()
    places = {f"model.layers.{layer}": f"cuda:{layer // 2}" for layer in range(4)}
    places |= {f"model.prefusion_layers.{layer}": f"cuda:{2 - layer // 2}" for layer in range(4)}
    places |= {"model.embed_tokens": "cuda:0", "model.norm": "cuda:1", "model.rotary_emb": "cuda:0"}
    places |= {"model.vision_tower": "cuda:2", "model.mm_projector": "cuda:1", "model.compressor": "cuda:0"}
    ids, mask = torch.tensor([[1, IMAGE, 5, 6], [0, 1, IMAGE, 5]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    asked = {"images": [pixels(2), pixels(3, seed=1)], "modalities": ["video"] * 2, "attention_mask": mask}
    expected = model.generate(ids, **asked, **ASKED)
    with SeveralDevices():
        dispatch_model(spread, places | {"lm_head": "cuda:1"}, main_device="cuda:0", skip_keys="past_key_values")
        new = spread.generate(ids, **asked, **ASKED)
        kept = spread.generate(ids, **asked | {"images": spread.prefuse(asked["images"], ["video"] * 2)}, **ASKED)
    assert torch.equal(new.as_subclass(torch.Tensor), expected)
    assert torch.equal(kept.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_full(model, dtype):
    half, ids, images = load(dtype=dtype), torch.tensor([[1, IMAGE, 5, 6]]), pixels(1)
    logits = half(input_ids=ids, images=images.to(dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), model(input_ids=ids, images=images).logits, atol=0.15, rtol=0.1)
    assert half.generate(ids, images=images.to(dtype), **ASKED).shape == (1, 4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_backends_agree(model, attention):
    other, ids, images = load(attn_implementation=attention), torch.tensor([[1, IMAGE, 5, 0, 6]]), pixels(1)
    torch.testing.assert_close(
        other(input_ids=ids, images=images).logits, model(input_ids=ids, images=images).logits, atol=1e-4, rtol=1e-4
    )


# -- compressor --------------------------------------------------------------------------------------------------------


def test_attention_of_the_compressor_is_what_it_uses(sharp):
    compressor, features = sharp.get_model().compressor, torch.randn(2, 36, 32)
    query, key, value = compressor._heads(features)
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(compressor.attention(features), weights.mean(1))
    out = compressor.attn.out_proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(compressor(features), out, atol=1e-5, rtol=1e-4)


def test_a_map_must_be_square(model):
    with pytest.raises(ValueError, match=r"square map.*575"):
        model.get_model().compressor(torch.zeros(1, 575, 32))


def test_heads_must_divide_the_width():
    with pytest.raises(CheckpointError, match="width 30 cannot be divided among 8"):
        QueryCompressor(30, 1, 8)


def test_new_position_tables_hold_columns_then_rows():
    table = position_table(8, 3)
    assert torch.equal(table[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    assert torch.equal(table[1, 4:], table[0, 4:]) and torch.equal(table[3, :4], table[0, :4])
    torch.testing.assert_close(table[5, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(table[5, 4], torch.tensor(1.0).sin())


def test_sub_images_become_rows_of_the_whole_map():
    whole = torch.arange(36.0).view(1, 6, 6)
    tiles = torch.stack([whole[:, r : r + 3, c : c + 3].flatten(1) for r in (0, 3) for c in (0, 3)], 1)
    assert torch.equal(stitched(tiles[..., None])[..., 0], whole.flatten(1))


# -- pre-fusion --------------------------------------------------------------------------------------------------------


def test_visual_tokens_do_not_depend_on_the_prompt(model):
    images = pixels(1)
    short, long = (spliced(model, [ids], images).inputs_embeds for ids in ([1, IMAGE, 5], [IMAGE, 7, 8, 9, 10]))
    assert torch.equal(short[0, 1], long[0, 0])


def test_text_in_front_of_the_image_has_seen_it_too(model):
    ids = [[1, 4, IMAGE, 5]]
    one, other = (spliced(model, ids, pixels(1, seed=seed)).inputs_embeds for seed in (0, 1))
    assert not torch.equal(one[0, :2], other[0, :2])


def test_two_halves_are_one_pass(model):
    generator = torch.Generator().manual_seed(0)
    image, compressed, embeds = (torch.randn(3, rows, 64, generator=generator) for rows in (36, 4, 7))
    ignored = torch.tensor([[0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()
    decoder = model.get_model()
    tokens, cache = prefusion.see(decoder, image, compressed)
    text = prefusion.read(decoder, cache, embeds, ignored)
    whole_tokens, whole_text = prefusion.see_and_read(decoder, image, compressed, embeds, ignored)
    torch.testing.assert_close(tokens, whole_tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, whole_text, atol=1e-5, rtol=1e-4)
    assert torch.equal(text[ignored], embeds[ignored])


def test_rows_of_id_0_keep_their_embedding(model):
    out = spliced(model, [[1, IMAGE, 5, 0, 6]], pixels(1)).inputs_embeds[0]
    plain = model.get_model().embed_tokens(torch.tensor([1, 0, 6]))
    assert torch.equal(out[3], plain[1])
    assert not torch.equal(out[0], plain[0]) and not torch.equal(out[4], plain[2])


def test_equal_frames_give_the_text_of_the_image(model):
    image, ids = pixels(1), [[1, IMAGE, 5, 6]]
    one = spliced(model, ids, image).inputs_embeds[0]
    many = spliced(model, ids, [image.expand(3, -1, -1, -1)], modalities=["video"]).inputs_embeds[0]
    assert many.shape[0] == 6
    torch.testing.assert_close(many[[0, 4, 5]], one[[0, 2, 3]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(many[1:4], one[[1, 1, 1]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 700, 1300])
def test_how_many_frames_go_together_changes_nothing(model, monkeypatch, rows):
    video, ids = pixels(4), [[1, IMAGE, 5, 6]]
    expected = spliced(model, ids, [video], modalities=["video"]).inputs_embeds
    monkeypatch.setattr(prefusion, "ROWS_AT_ONCE", rows)
    got = spliced(model, ids, [video], modalities=["video"]).inputs_embeds
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    (fused,) = model.prefuse([video], ["video"])
    torch.testing.assert_close(spliced(model, ids, [fused]).inputs_embeds, expected, atol=1e-5, rtol=1e-4)


def test_frames_in_both_forms_are_one_video(model):
    video, ids = pixels(2), [[1, IMAGE, 5]]
    ours = spliced(model, ids, [video], modalities=["video"]).inputs_embeds
    for official in (video[None, :, None], [video[:, None]]):
        assert torch.equal(spliced(model, ids, official).inputs_embeds, ours)


def test_without_layers_the_text_is_as_it_is(tmp_path):
    bare = load(broken(tmp_path, without("prefusion_layers"), prefusion_layer_num=0))
    ids, image = [[1, IMAGE, 5]], pixels(1)
    out = spliced(bare, ids, image).inputs_embeds[0]
    torch.testing.assert_close(out[[0, 2]], bare.get_model().embed_tokens(torch.tensor([1, 5])))
    torch.testing.assert_close(out, spliced(bare, ids, bare.prefuse(image)).inputs_embeds[0])


# -- kept images -------------------------------------------------------------------------------------------------------


def test_kept_images_answer_as_new_ones(model):
    image = pixels(1)
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [0, 0, 1, IMAGE, 9], [0, IMAGE, 0, 3, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    (fused,) = model.prefuse(image)
    before = [keys.clone() for keys in fused.keys]
    tower = model.get_vision_tower()
    looked = []
    handle = tower.vision_tower.register_forward_pre_hook(lambda *_: looked.append(1))
    try:
        kept = model.generate(ids, attention_mask=mask, images=[fused] * 3, **ASKED)
    finally:
        handle.remove()
    assert not looked and all(map(torch.equal, before, fused.keys))
    assert torch.equal(kept, model.generate(ids, attention_mask=mask, images=image.expand(3, -1, -1, -1), **ASKED))


def test_kept_and_new_images_in_one_batch(sharp):
    plain, cut = pixels(1, seed=1), pixels(5, seed=2)
    ids = torch.tensor([[1, IMAGE, 5, 6], [1, IMAGE, 7, 8]])
    (fused,) = sharp.prefuse([cut])
    together = sharp.generate(ids, images=[fused, plain], **ASKED)
    apart = [sharp.generate(ids[:1], images=[cut], **ASKED), sharp.generate(ids[1:], images=[plain], **ASKED)]
    assert torch.equal(together, torch.cat(apart))


# -- prompts and batches -----------------------------------------------------------------------------------------------


def test_a_batch_gives_the_answers_of_its_samples(model):
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [3, 3, 1, IMAGE, 9]])
    mask, images = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]), pixels(2)
    both = model.generate(ids, images=images, attention_mask=mask, **ASKED)
    first = model.generate(ids[:1], images=images[:1], **ASKED)
    second = model.generate(ids[1:, 2:], images=images[1:], **ASKED)
    assert torch.equal(both, torch.cat([first, second]))
    beams = model.generate(ids, images=images, attention_mask=mask, num_beams=2, **ASKED)
    assert torch.equal(beams[:1], model.generate(ids[:1], images=images[:1], num_beams=2, **ASKED))


def test_text_alone_is_not_fused(model):
    ids = torch.tensor([[1, 4, 5, 6]])
    plain = model.get_model().embed_tokens(ids)
    assert torch.equal(model(input_ids=ids).logits, model(inputs_embeds=plain).logits)
    mixed = spliced(model, [[1, IMAGE, 5, 6], [1, 4, 5, 6]], pixels(1))
    assert torch.equal(mixed.inputs_embeds[1], plain[0])


def test_text_with_several_images_is_the_mean_of_it_with_each(model):
    images = pixels(2)
    both = spliced(model, [[1, IMAGE, 4, IMAGE, 5]], images).inputs_embeds[0]
    each = [spliced(model, [[1, 4, IMAGE, 5]], image[None]).inputs_embeds[0] for image in images]
    torch.testing.assert_close(both[[0, 2, 4]], (each[0] + each[1])[[0, 1, 3]] / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[[1, 3]], torch.stack([each[0][2], each[1][2]]), atol=1e-5, rtol=1e-4)


def test_in_training_a_dummy_image_is_dropped(model):
    ids, labels = torch.tensor([[1, IMAGE, 5, 6], [1, 4, 5, 6]]), torch.tensor([[1, 2, 5, 6], [1, 4, 5, 6]])
    out = model(input_ids=ids, labels=labels, images=pixels(2))
    assert out.logits.shape == (2, 4, 1000) and torch.isfinite(out.loss)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_compressor(checkpointing):
    trained = load()
    if checkpointing:
        trained.gradient_checkpointing_enable()
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    with torch.enable_grad():
        trained.train()(input_ids=ids, labels=ids.clamp(min=-100), images=pixels(1)).loss.backward()
    assert trained.get_model().compressor.query.grad.abs().sum() > 0


@pytest.mark.parametrize("views", [2, 4, 6])
def test_numbers_of_views_that_no_image_has_are_refused(model, views):
    with pytest.raises(ValueError, match=rf"got {views}\. Frames of a video need"):
        model.generate(torch.tensor([[1, IMAGE, 5]]), images=[pixels(views)], max_new_tokens=1)


def test_pictures_and_frames_are_cut_as_the_config_says(model, sharp):
    processor = model.get_vision_tower().image_processor
    picture, frames = Image.new("RGB", (50, 40)), np.zeros((2, 30, 20, 3), dtype=np.uint8)
    assert model.image_inputs([picture], processor).shape == (1, 3, 336, 336)
    assert [part.shape[0] for part in sharp.image_inputs([picture] * 2, processor)] == [5, 5]
    assert model.video_inputs(frames, processor).shape == (2, 3, 336, 336)
    assert sharp.video_inputs(frames, processor).shape == (2, 5, 3, 336, 336)


def test_one_frame_per_second_and_at_least_one(model):
    assert sample_frames(10, 30.0) == [4] and len(sample_frames(9000, 30.0)) == 300
    assert model.frame_indices(9000, 30.0, max_frames_num=7) == sample_frames(9000, 30.0, 7)


def test_the_template_leaves_opening_the_answer_to_the_tokenizer():
    told = {}
    conversation = conv_templates["llava_llama_3_1"].copy()
    conversation.tokenizer = SimpleNamespace(apply_chat_template=lambda chat, **how: told.update(how, chat=chat) or "")
    conversation.append_message("user", "<image>\nWhat?")
    conversation.append_message("assistant", None)
    conversation.get_prompt()
    assert told["add_generation_prompt"] is False
    assert [turn["role"] for turn in told["chat"]] == ["system", "user"]


def test_scripts_ask_in_its_own_prompt(tmp_path):
    folder = tiny_checkpoint("llava_mini", tmp_path)
    args = {"model_path": str(folder), "device": "cpu", "temperature": 0, "max_new_tokens": 3}
    assistant = Assistant(SimpleNamespace(**args))
    prompt = assistant.prompt(assistant.with_images("What is it?"))
    assert prompt.startswith("system: ") and prompt.endswith("user: <image>\nWhat is it?\n")
    assert isinstance(assistant.ask(prompt, [Image.new("RGB", (80, 50))]), str)


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_on_tokens_and_inside_the_llm(model):
    ids, video = torch.tensor([[1, IMAGE, 5, 6]]), [pixels(6)]
    asked = {"images": video, "modalities": ["video"], **ASKED}
    dense = model.generate(ids, **asked)
    with accelerate(model, "fastv", k=1, retention_ratio=1.0):
        assert torch.equal(model.generate(ids, **asked), dense)
    both = {"random.retention_ratio": 0.5, "fastv.k": 1, "fastv.r": 0.34}
    with accelerate(model, "random+fastv", **both), record() as requests:
        model.generate(ids, **asked)
    assert requests[0].samples[0].visual_tokens_before == 6
    assert requests[0].samples[0].visual_tokens_after == 3 and requests[0].layer_lengths(0) == [6, 5, 5, 5]


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("method", [name for name in sorted(available()) if runs_on(name, "llava_mini")])
def test_methods_of_the_table_run(model, sharp, method, kind):
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"images": [pixels(12)], "modalities": ["video"]}
    if kind == "image":
        asked = {"images": [pixels(5)], "modalities": ["image"]}
    acting = model if kind == "video" else sharp
    with accelerate(acting, configured(method)), record() as requests:
        acting.generate(ids, **asked, **ASKED)
    assert requests[0].samples[0].visual_tokens_before == (12 if kind == "video" else 64)


@pytest.mark.parametrize(("method", "says"), [("fastervlm", "cls_attention"), ("downsample", "sample stage")])
def test_methods_that_read_patches_are_refused(model, method, says):
    with pytest.raises(MethodError, match=f"{says}.*LLaVA-Mini|LLaVA-Mini.*{says}"):
        accelerate(model, method)


# -- work --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "sharp"])
def test_the_work_of_its_modules_is_what_torch_counts(request, name):
    model, views = request.getfixturevalue(name), 1 if name == "model" else 5
    with record() as requests:
        model.generate(torch.tensor([[1, IMAGE, 5, 6]]), images=[pixels(views)], max_new_tokens=1, pad_token_id=0)
    (item,) = model.encode([pixels(views)], ["image"])
    with FlopCounterMode(display=False) as counter:
        model.compress([item], Prompts(torch.tensor([[1, IMAGE, 5, 6]])))
    assert model.own_macs(requests[0].samples[0]) == counter.get_total_flops() // 2
