"""VoCo-LLaMA: checkpoints, two calls for the official mask, what is kept, videos, methods in front of it."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaModel

from accelerate_methods import MethodError, accelerate, available, record
from accelerate_methods.engine import recording
from accelerate_methods.registry.compatibility import runs_on
from llava.eval.asking import Assistant
from llava.model.architectures import architecture_of
from llava.model.architectures.voco_llama import VocoLlamaForCausalLM, decoder
from llava.model.architectures.voco_llama.cache import VocoCache
from llava.model.architectures.voco_llama.division import visible
from llava.model.architectures.voco_llama.model import voco_prompt
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError, read_config
from tests.support.architectures import from_checkpoint, tiny_checkpoint
from tests.support.configured import configured
from tests.support.paths import GOLDEN
from tests.support.several_devices import SeveralDevices

CHECKPOINTS = GOLDEN / "checkpoints"
FOLDER, TOWER = CHECKPOINTS / "tiny-voco-llama", CHECKPOINTS / "tiny-llava-1.5/vision_tower"
IMAGE, VOCO = -200, 1000
ASKED = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
pytestmark = pytest.mark.usefixtures("no_grad")


def load(folder=FOLDER, dtype=torch.float32, **how):
    return from_checkpoint(VocoLlamaForCausalLM, folder, dtype, how, mm_vision_tower=str(TOWER))


@pytest.fixture(scope="module")
def model():
    return load()


def pixels(count, seed=0):
    return torch.randn(count, 3, 336, 336, generator=torch.Generator().manual_seed(seed))


def padded(prompts, side="left"):
    """[B, n] ids and mask of prompts of different length."""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), longest, dtype=torch.long), torch.zeros(len(prompts), longest)
    for number, prompt in enumerate(prompts):
        own = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[number, own], mask[number, own] = torch.tensor(prompt), 1
    return ids, mask.long()


def officially(model, spliced, ids, mask):
    """Logits [B, L, V] of one call with the official mask; rows of ``<voco>`` counted here from the ids."""
    allowed = torch.zeros(*spliced.mask.shape, spliced.mask.shape[1], dtype=torch.bool)
    for number in range(len(ids)):
        own, row, found = ids[number][mask[number].bool()], int(spliced.mask[number].long().argmax()), []
        for token in own.tolist():
            found += [row] * (token == VOCO)
            row += 576 if token == IMAGE else 1
        allowed[number] = visible(spliced.mask[number : number + 1], torch.tensor([found], dtype=torch.long))[0]
    out = LlamaModel.forward(
        model.get_model(),
        inputs_embeds=spliced.inputs_embeds,
        attention_mask=allowed[:, None] | ~allowed.any(-1)[:, None, :, None],
        position_ids=spliced.position_ids,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)


#: (prompts of a batch, images)
BATCHES = {
    "two_voco": ([[1, IMAGE, 7, 8, VOCO, VOCO, 9, 10, 11]], 1),
    "one_voco_at_the_end": ([[1, IMAGE, 7, VOCO]], 1),
    "text_between": ([[1, IMAGE, VOCO, 5, 6, VOCO, 7, 8]], 1),
    "no_voco": ([[1, IMAGE, 7, 8, 9]], 1),
    "two_images": ([[1, IMAGE, 4, IMAGE, VOCO, VOCO, 7, 8]], 2),
    "an_image_between": ([[1, IMAGE, VOCO, 4, IMAGE, VOCO, 7, 8]], 2),
    "unlike_prompts": (
        [[1, IMAGE, 7, VOCO, VOCO, VOCO, 9], [1, 4, IMAGE, VOCO, 9, 10, 11, 12], [1, IMAGE, 5, 6], [1, IMAGE, VOCO]],
        4,
    ),
}


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_tokenizer(model, tmp_path):
    assert architecture_of(read_config(FOLDER), FOLDER) is VocoLlamaForCausalLM
    assert architecture_of(read_config(FOLDER)) is None  # whose config.json is plain LLaVA's
    assert architecture_of(read_config(CHECKPOINTS / "tiny-llava-1.5"), CHECKPOINTS / "tiny-llava-1.5") is None
    shutil.copytree(FOLDER, tmp_path / "moved")
    (tmp_path / "moved/added_tokens.json").unlink()
    assert architecture_of(read_config(tmp_path / "moved"), tmp_path / "moved") is VocoLlamaForCausalLM
    assert model.config.voco_token_id == VOCO


def test_a_checkpoint_without_the_token_is_an_error():
    with pytest.raises(CheckpointError, match="has no <voco> token"):
        load(CHECKPOINTS / "tiny-llava-1.5")


def test_loaded_as_a_user_does(tmp_path):
    folder = tmp_path / "voco"
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(TOWER)}))
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), torch_dtype="float32", device_map="cpu")
    prompt = model.whole_prompt("USER: <image>\nWhat?\nNow. ASSISTANT:", num_voco=3)
    assert prompt == "<image>\n<voco><voco><voco>\nUSER: What?Now. ASSISTANT:"
    ids = model.prompt_ids(prompt, tokenizer)
    assert (ids == VOCO).sum() == 3 and ids[1] == IMAGE
    assert model.generate(ids[None], images=pixels(1), **ASKED).shape == (1, 4)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert architecture_of(read_config(tmp_path / "again")) is VocoLlamaForCausalLM
    asked = {"input_ids": ids[None], "images": pixels(1)}
    assert torch.equal(again(**asked).logits, model(**asked).logits)
    assert processor is not None


def test_scripts_ask_in_its_own_prompt(tmp_path, monkeypatch):
    folder = tiny_checkpoint("voco_llama", tmp_path)
    args = {"model_path": str(folder), "device": "cpu", "temperature": 0, "max_new_tokens": 3}
    assistant = Assistant(SimpleNamespace(**args, model_args="num_voco=3"))
    asked, ids_of = [], assistant.model.prompt_ids
    seen = lambda text, *more, **how: asked.append(text) or ids_of(text, *more, **how)  # noqa: E731
    monkeypatch.setattr(assistant.model, "prompt_ids", seen)
    prompt = assistant.prompt(assistant.with_images("What is it?\nAnswer."))
    assert isinstance(assistant.ask(prompt, [Image.new("RGB", (80, 50))]), str)
    assert asked[0].startswith("<image>\n<voco><voco><voco>\nA chat") and asked[0].endswith("it?Answer. ASSISTANT:")


def test_prompts_without_pictures_are_left_as_they_are():
    assert voco_prompt("USER: What?\nNow. ASSISTANT:", 2) == "USER: What?\nNow. ASSISTANT:"
    assert voco_prompt("a <image>\nb <image>c", 1) == "<image>\n<image>\n<voco>\na b c"


def test_weights_may_lie_elsewhere(model, tmp_path):
    places = {f"model.{name}": "disk" for name, _ in model.get_model().named_children()} | {"lm_head": "cpu"}
    offloaded = load(device_map=places | {"model.norm": "cpu"}, offload_folder=str(tmp_path))
    asked = {"images": [pixels(2)], "modalities": ["video"], **ASKED}
    ids = torch.tensor(BATCHES["two_voco"][0])
    assert torch.equal(offloaded.generate(ids, **asked), model.generate(ids, **asked))


def test_spread_over_devices(model):
    spread = load()
    places = {f"model.layers.{layer}": f"cuda:{layer // 2}" for layer in range(4)}
    places |= {"model.embed_tokens": "cuda:0", "model.norm": "cuda:1", "model.rotary_emb": "cuda:0"}
    places |= {"model.vision_tower": "cuda:2", "model.mm_projector": "cuda:1"}
    ids, mask = padded([[1, IMAGE, 7, VOCO, VOCO, 9, 10], [1, IMAGE, VOCO, 9]])
    asked = {"images": [pixels(2), pixels(1)[0]], "modalities": ["video", "image"]}
    expected = model.generate(ids, attention_mask=mask, **asked, **ASKED)
    with SeveralDevices():
        dispatch_model(spread, places | {"lm_head": "cuda:1"}, main_device="cuda:0", skip_keys="past_key_values")
        new = spread.generate(ids, attention_mask=mask, **asked, **ASKED)
        kept = spread.compress_images(ids, **asked, attention_mask=mask)
        again = spread.generate(ids, attention_mask=mask, images=kept, **ASKED)
    assert torch.equal(new.as_subclass(torch.Tensor), expected)
    assert torch.equal(again.as_subclass(torch.Tensor), expected)


# -- two calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
def test_two_calls_are_one_with_the_official_mask(model, monkeypatch, name, side):
    monkeypatch.setattr(model.config, "tokenizer_padding_side", side)
    prompts, images = BATCHES[name]
    ids, mask = padded(prompts, side)
    spliced = model.prepare_multimodal(ids, mask, None, pixels(images))
    got = model(input_ids=ids, attention_mask=mask, images=pixels(images)).logits
    expected = officially(model, spliced, ids, mask)
    torch.testing.assert_close(got[spliced.mask], expected[spliced.mask], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_backend_has_the_mask(model, attention):
    ids, mask = padded(BATCHES["unlike_prompts"][0])
    got = load(attn_implementation=attention)(input_ids=ids, attention_mask=mask, images=pixels(4)).logits[:, -1]
    torch.testing.assert_close(
        got, model(input_ids=ids, attention_mask=mask, images=pixels(4)).logits[:, -1], atol=2e-4, rtol=1e-3
    )


def test_the_mask_matters(model):
    ids = torch.tensor(BATCHES["two_voco"][0])
    spliced = model.prepare_multimodal(ids, None, None, pixels(1))
    plain = LlamaModel.forward(model.get_model(), inputs_embeds=spliced.inputs_embeds).last_hidden_state[:, -1]
    assert (model.lm_head(plain) - model(input_ids=ids, images=pixels(1)).logits[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 1200])
def test_how_many_images_are_read_together_changes_nothing(model, monkeypatch, rows):
    ids, mask = padded(BATCHES["unlike_prompts"][0])
    expected = model(input_ids=ids, attention_mask=mask, images=pixels(4)).logits[:, -1]
    monkeypatch.setattr(decoder, "ROWS_AT_ONCE", rows)
    got = model(input_ids=ids, attention_mask=mask, images=pixels(4)).logits[:, -1]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_full(model, dtype):
    ids = torch.tensor(BATCHES["two_voco"][0])
    logits = load(dtype=dtype)(input_ids=ids, images=pixels(1).to(dtype)).logits[:, -1]
    torch.testing.assert_close(logits.float(), model(input_ids=ids, images=pixels(1)).logits[:, -1], atol=0.2, rtol=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["two_voco", "unlike_prompts"])
def test_training_sees_the_same_mask(model, name, checkpointing):
    prompts, images = BATCHES[name]
    ids, mask = padded(prompts)
    labels = ids.masked_fill((ids == IMAGE) | (ids == 1) | (mask == 0), -100)  # BOS would be learnt from padding
    expected = model(input_ids=ids, attention_mask=mask, labels=labels, images=pixels(images)).loss
    trained = copy.deepcopy(model).train()
    if checkpointing:
        trained.gradient_checkpointing_enable()
    with torch.enable_grad():
        loss = trained(input_ids=ids, attention_mask=mask, labels=labels, images=pixels(images)).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert trained.get_model().mm_projector[0].weight.grad.abs().sum() > 0


# -- cache and decoding ------------------------------------------------------------------------------------------------


def test_the_images_leave_the_cache(model):
    ids = torch.tensor(BATCHES["two_voco"][0])
    with record() as requests:
        out = model(input_ids=ids, images=pixels(1), use_cache=True)
    cache = out.past_key_values
    assert [cache.get_seq_length(layer) for layer in range(4)] == [2 + 3] * 4
    assert all(layer.keys._base is None or layer.keys._base.numel() == layer.keys.numel() for layer in cache.layers)
    assert requests[0].cached == [[5] * 4] and requests[0].samples[0].visual_tokens_after == 576
    assert requests[0].samples[0].items[0].info == {"voco_entries": 2}
    assert model(input_ids=ids, images=pixels(1), use_cache=False).past_key_values is None


def grown(model, ids, images, steps):
    """Greedy ids by the whole prompt anew for every token."""
    for _ in range(steps):
        logits = model(input_ids=ids, images=images).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -steps:]


@pytest.mark.parametrize("name", ["two_voco", "text_between", "one_voco_at_the_end", "no_voco"])
def test_decoding_is_the_prompt_grown_by_each_token(model, name):
    ids, count = torch.tensor(BATCHES[name][0]), BATCHES[name][1]
    assert torch.equal(model.generate(ids, images=pixels(count), **ASKED), grown(model, ids, pixels(count), 4))


def test_steps_without_positions_go_on_at_the_right_ones(model):
    ids, mask = padded(BATCHES["unlike_prompts"][0][:2], "right")
    expected = model.generate(ids, attention_mask=mask, images=pixels(2), **ASKED)
    out = model(input_ids=ids, attention_mask=mask, images=pixels(2), use_cache=True)
    lengths = torch.tensor([7 + 575, 8 + 575])
    rows = out.logits.shape[1] - 1 if model.padding_side == "left" else lengths - 1
    token = out.logits[torch.arange(2), rows].argmax(-1, keepdim=True)
    tokens = [token]
    for _ in range(3):
        token = model(input_ids=token, past_key_values=out.past_key_values).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


def test_a_later_turn_is_later_text(model):
    first, second = torch.tensor(BATCHES["two_voco"][0]), torch.tensor([[20, 21, 22]])
    cache = model(input_ids=first, images=pixels(1), use_cache=True).past_key_values
    later = model(input_ids=second, past_key_values=cache).logits
    whole = model(input_ids=torch.cat([first, second], dim=1), images=pixels(1)).logits[:, -3:]
    torch.testing.assert_close(later, whole, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_the_answers_of_its_samples(model, side):
    prompts, images = BATCHES["unlike_prompts"][0], pixels(4)
    ids, mask = padded(prompts, side)
    both = model.generate(ids, attention_mask=mask, images=images, **ASKED)
    beams = model.generate(ids, attention_mask=mask, images=images, num_beams=2, **ASKED)
    for number, prompt in enumerate(prompts):
        own = torch.tensor([prompt]), images[number : number + 1]
        assert torch.equal(both[number : number + 1], model.generate(own[0], images=own[1], **ASKED))
        assert torch.equal(beams[number : number + 1], model.generate(own[0], images=own[1], num_beams=2, **ASKED))


def test_text_alone(model):
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = LlamaModel.forward(model.get_model(), input_ids=ids).last_hidden_state
    torch.testing.assert_close(model(input_ids=ids).logits, model.lm_head(plain))
    assert model.generate(ids, **ASKED).shape == (1, 4)
    for ask in (model.generate, lambda ids: model(input_ids=ids)):
        with pytest.raises(MethodError, match="<voco> tokens, which stand for images"):
            ask(torch.tensor([[1, VOCO, 5]]))


def test_what_cannot_be_is_refused(model):
    ids, images = torch.tensor(BATCHES["two_voco"][0]), pixels(1)
    with pytest.raises(MethodError, match="makes the cache of a prompt itself"):
        model.generate(ids, images=images, past_key_values=DynamicCache(), **ASKED)
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        model.generate(ids, images=images, prompt_lookup_num_tokens=2, **ASKED)
    with pytest.raises(MethodError, match="output_hidden_states"):
        model(input_ids=ids, images=images, output_hidden_states=True)
    cache = model(input_ids=ids, images=images, use_cache=True).past_key_values
    with pytest.raises(MethodError, match="later turn need a new cache"):
        model(input_ids=ids, images=images, past_key_values=cache)


# -- images that are kept ----------------------------------------------------------------------------------------------


def test_kept_images_answer_as_new_ones(model):
    prefix, images = [1, IMAGE, 7, 8, VOCO, VOCO], pixels(1)
    (kept,) = model.compress_images(torch.tensor([[*prefix, 9]]), images)
    assert (kept.length, kept.position) == (2, 581)
    before = [keys.clone() for keys in kept.keys]
    ids, mask = padded([[*prefix, 9, 10], [*prefix, 11, 12, 13, 14]])
    text, text_mask = padded([[9, 10], [11, 12, 13, 14]])
    expected = model.generate(ids, attention_mask=mask, images=images.expand(2, -1, -1, -1), **ASKED)
    assert torch.equal(model.generate(ids, attention_mask=mask, images=[kept] * 2, **ASKED), expected)
    assert torch.equal(model.generate(text, attention_mask=text_mask, images=[kept] * 2, **ASKED), expected)
    beams = {"num_beams": 2, **ASKED}
    assert torch.equal(model.generate(text, attention_mask=text_mask, images=[kept] * 2, **beams),
                       model.generate(ids, attention_mask=mask, images=[*images] * 2, **beams))  # fmt: skip
    assert all(map(torch.equal, before, kept.keys))
    logits = model(input_ids=torch.tensor([[9, 10]]), images=[kept]).logits[:, -1]
    whole = model(input_ids=torch.tensor([[*prefix, 9, 10]]), images=images).logits[:, -1]
    torch.testing.assert_close(logits, whole, atol=2e-4, rtol=1e-3)


def test_unlike_kept_images_in_one_batch(model):
    prompts = [[1, IMAGE, 7, VOCO, VOCO, VOCO, 9], [1, 4, IMAGE, VOCO, 9, 10]]
    ids, mask = padded(prompts)
    kept = model.compress_images(ids, pixels(2), attention_mask=mask)
    assert [image.length for image in kept] == [3, 1]
    expected = model.generate(ids, attention_mask=mask, images=pixels(2), **ASKED)
    assert torch.equal(model.generate(ids, attention_mask=mask, images=kept, **ASKED), expected)


def test_kept_images_fit_the_prompt_or_are_refused(model):
    (kept,) = model.compress_images(torch.tensor([[1, IMAGE, VOCO, 9]]), pixels(1))
    for ids, images, says in (
        ([[1, 4, IMAGE, VOCO, 9]], [kept], "begins otherwise"),
        ([[1, IMAGE, VOCO]], [kept], "needs text behind"),
        ([[1, IMAGE, VOCO, 9]], [kept, kept], "one for each prompt"),
        ([[1, IMAGE, VOCO, 9], [1, IMAGE, VOCO, 9]], [kept, pixels(1)[0]], "not mixed"),
    ):
        with pytest.raises(MethodError, match=says):
            model.generate(torch.tensor(ids), images=images, **ASKED)
    with pytest.raises(MethodError, match="compressed already"):
        model.compress_images(torch.tensor([[1, IMAGE, VOCO, 9]]), [kept])
    with pytest.raises(MethodError, match="every prompt needs <voco> tokens"):
        model.compress_images(torch.tensor([[1, IMAGE, 9]]), pixels(1))


def test_the_work_of_a_prompt_is_what_torch_counts(model):
    ids, video = torch.tensor([[1, IMAGE, 7, VOCO, VOCO, 9, 10]]), pixels(2)
    asked = {"images": [video], "modalities": ["video"]}
    (kept,) = model.compress_images(ids, **asked)
    for images in (asked, {"images": [kept]}):
        with record() as requests:
            spliced = model.prepare_multimodal(ids, None, None, **images, request=recording.new_request())
        cache = VocoCache.of(spliced.layout)
        with FlopCounterMode(display=False) as counter:
            model.get_model()(inputs_embeds=spliced.inputs_embeds, past_key_values=cache)
        assert requests[0].samples[0].prefill_macs == counter.get_total_flops() // 2


# -- videos ------------------------------------------------------------------------------------------------------------


def voco_states(model, ids, image, positions_from):
    """Keys [layers, k, G, d] and values of the ``<voco>`` tokens of one image, read at positions from a number on."""
    embeds = model.prepare_multimodal(ids, None, None, image).inputs_embeds
    at, cache = torch.arange(embeds.shape[1])[None] + positions_from, DynamicCache()
    LlamaModel.forward(model.get_model(), inputs_embeds=embeds, position_ids=at, past_key_values=cache, use_cache=True)
    return [torch.stack([getattr(layer, name)[0, :, -2:] for layer in cache.layers]) for name in ("keys", "values")]


@pytest.mark.parametrize("positions", ["consecutive", "shared"])
def test_frames_are_read_alone_and_stand_in_order(model, monkeypatch, positions):
    monkeypatch.setattr(model.config, "voco_frame_positions", positions, raising=False)
    ids, video = torch.tensor([[1, IMAGE, 7, VOCO, VOCO]]), pixels(3)
    (kept,) = model.compress_images(ids, [video], ["video"])
    step = 2 if positions == "consecutive" else 0
    apart = [voco_states(model, ids, image[None], step * number) for number, image in enumerate(video)]
    for got, number in ((kept.keys, 0), (kept.values, 1)):
        expected = torch.cat([states[number] for states in apart], dim=2)
        torch.testing.assert_close(torch.stack(got), expected, atol=2e-4, rtol=1e-3)
    assert kept.position == 580 + 2 * step
    assert not torch.allclose(kept.values[-1][:, 2:4], kept.values[-1][:, :2])


def test_a_video_of_one_frame_is_an_image(model):
    ids, image = torch.tensor(BATCHES["two_voco"][0]), pixels(1)
    assert torch.equal(model.generate(ids, images=[image], modalities=["video"], **ASKED),
                       model.generate(ids, images=image, **ASKED))  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2**20])
def test_a_batch_of_videos_and_images(model, monkeypatch, rows):
    monkeypatch.setattr(decoder, "ROWS_AT_ONCE", rows)
    ids, mask = padded([[1, IMAGE, 7, VOCO, VOCO, 9], [1, IMAGE, VOCO, 9, 10, 11], [1, IMAGE, 4, 5]])
    images, kinds = [pixels(4), pixels(1)[0], pixels(1, 1)[0]], ["video", "image", "image"]
    both = model.generate(ids, attention_mask=mask, images=images, modalities=kinds, **ASKED)
    for number in range(3):
        own = ids[number : number + 1, mask[number].bool()]
        alone = model.generate(own, images=[images[number]], modalities=[kinds[number]], **ASKED)
        assert torch.equal(both[number : number + 1], alone)
    out = model(input_ids=ids[:1, mask[0].bool()], images=images[:1], modalities=["video"], use_cache=True)
    assert out.past_key_values.get_seq_length() == 4 * 2 + 1 and out.past_key_values.following.item() == 587


@pytest.mark.parametrize(
    ("ids", "says"), [([1, IMAGE, 7, 8], "needs <voco> tokens"), ([1, VOCO, IMAGE, VOCO, 8], "in front of")]
)
def test_videos_stand_in_front_of_the_tokens(model, ids, says):
    with pytest.raises(MethodError, match=says):
        model.generate(torch.tensor([ids]), images=[pixels(2)], modalities=["video"], **ASKED)


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_in_front_leave_fewer_rows_to_read(model):
    ids, images = torch.tensor(BATCHES["two_voco"][0]), pixels(1)
    dense = model.generate(ids, images=images, **ASKED)
    with accelerate(model, "random", retention_ratio=1.0):
        assert torch.equal(model.generate(ids, images=images, **ASKED), dense)
    for method, how, rows in (("fastervlm", {"retention_ratio": 0.25}, 144), ("tome", {"tokens_per_view": 100}, 100)):
        with accelerate(model, method, **how), record() as requests:
            out = model(input_ids=ids, images=images, use_cache=True)
        assert requests[0].samples[0].visual_tokens_after == rows
        assert requests[0].cached == [[5] * 4] and out.past_key_values.get_seq_length() == 5


def test_methods_on_frames(model):
    ids, video = torch.tensor([[1, IMAGE, 7, VOCO, VOCO, 9]]), pixels(3)
    with accelerate(model, "random", retention_ratio=0.5), record() as requests:
        out = model(input_ids=ids, images=[video], modalities=["video"], use_cache=True)
    assert requests[0].samples[0].visual_tokens_after == 864
    assert out.past_key_values.get_seq_length() == 3 * 2 + 1 and torch.isfinite(out.logits[:, -1]).all()


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("method", [name for name in sorted(available()) if runs_on(name, "voco_llama")])
def test_methods_of_the_table_run(model, method, kind):
    ids, images = torch.tensor([[1, IMAGE, 7, VOCO, VOCO, 9]]), [pixels(3 if kind == "video" else 1)]
    with accelerate(model, configured(method)), record() as requests:
        model.generate(ids, images=images, modalities=[kind], **ASKED)
    assert requests[0].samples[0].visual_tokens_before == 576 * len(images[0])
    assert requests[0].cached[0] == [2 * len(images[0]) + 1] * 4


@pytest.mark.parametrize(("method", "stage"), [("fastv", "prefill"), ("streamingllm", "decode")])
def test_methods_inside_the_decoder_are_refused(model, method, stage):
    with pytest.raises(MethodError, match=f"{stage}.*VoCo-LLaMA|VoCo-LLaMA.*{stage}"):
        accelerate(model, method, **({"k": 1, "r": 0.5} if method == "fastv" else {}))
