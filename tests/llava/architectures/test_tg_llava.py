"""TG-LLaVA: quadrants, the question and its padding, batches, checkpoints of both decoders, methods on it."""

import copy
import json
import shutil

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.hosts.tower_files import TowerError
from llava.conversation import conv_templates
from llava.model.architectures import architecture_of
from llava.model.architectures.tg_llava import (
    LlavaLlamaTextLearnableQueryForCausalLM,
    LlavaQwenTextLearnableQueryForCausalLM,
)
from llava.model.architectures.tg_llava.details import PatchEncoder, quadrants
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from tests.support.architectures import changed
from tests.support.paths import GOLDEN
from tests.support.several_devices import SeveralDevices
from tests.support.texts import tiny_text_tokenizer

FOLDER = GOLDEN / "tg_llava/tiny_tgllava_qwen2"
IMAGE = -200
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
UNREAD = ("Qformer.cls.", "d_embeddings", "position_embeddings", ".intermediate.dense", ".0.output.", ".1.output.")
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint with a tokenizer for its text tower: BOS in front and EOS, the largest id, behind."""
    target = tmp_path_factory.mktemp("tg_llava") / "checkpoint"
    shutil.copytree(FOLDER, target)
    tiny_text_tokenizer(target / "vision_tower", begin="<s>")
    return target


def load(folder, dtype=torch.float32, **how):
    model_class = architecture_of(json.loads((folder / "config.json").read_text()))
    return model_class.from_pretrained(folder, dtype=dtype, **how).eval()


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def pictures(count, seed=0):
    coarse = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return coarse.repeat_interleave(28, -2).repeat_interleave(28, -1)


def spliced(model, ids, images, mask=None, **how):
    return model.prepare_multimodal(torch.tensor(ids), mask, None, images, **how)


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_quadrants_are_those_of_the_enlarged_picture():
    pixels = pictures(2)
    large = torch.nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
    corners = [large[:, :, r : r + 336, c : c + 336] for r in (0, 336) for c in (0, 336)]
    assert torch.equal(quadrants(pixels), torch.stack(corners, dim=1))


def test_padding_of_a_question_changes_no_latent():
    torch.manual_seed(0)
    encoder = PatchEncoder(16, 12, 20, 4 * 9, {"num_heads": 4, "head_dim": 6, "num_key_value_heads": 2})
    torch.nn.init.normal_(encoder.perceiver.latents)
    patches, text = torch.randn(2, 4, 9, 16), torch.randn(2, 5, 12)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = encoder(patches, text, real)
    torch.testing.assert_close(found[1:], encoder(patches[1:], text[1:, :3]))
    assert not torch.allclose(found[1:], encoder(patches[1:], text[1:]))


def test_the_layers_read_text_first_and_then_patches(model):
    encoder = model.get_model().mm_patch_encoder
    patches, text = torch.randn(1, 4, 576, 32), torch.randn(1, 7, 24)
    latents = encoder.perceiver.latents[None]
    latents = encoder.perceiver.layers[0](latents, encoder.resize_linear(text), None)
    latents = encoder.perceiver.layers[1](latents, encoder.encode(patches), None)
    torch.testing.assert_close(encoder(patches, text), encoder.proj(encoder.perceiver.norm(latents)))


# -- the question ------------------------------------------------------------------------------------------------------


def test_every_way_to_give_the_question(model):
    tower, images, asked = model.get_text_tower(), pictures(1), [[1, IMAGE, 5]]
    ids, real = tower.ids_of(["what is it ?"])
    assert real is None and ids[0, 0] == 62 and ids[0, -1] == 63
    by_ids = spliced(model, asked, images, text_guide_ids=ids)
    by_row = spliced(model, asked, images, text_guide_ids=ids[0])
    by_text = spliced(model, asked, images, questions=["<image>\nwhat is it ?"])
    assert torch.equal(by_ids.inputs_embeds, by_text.inputs_embeds)
    assert torch.equal(by_ids.inputs_embeds, by_row.inputs_embeds)
    assert by_ids.lengths == [642]
    other = spliced(model, asked, images, questions=["how many are there ?"])
    assert not torch.equal(other.inputs_embeds, by_text.inputs_embeds)


def test_quadrants_may_be_given(model):
    images, asked = pictures(2), {"questions": ["what is it ?"]}
    ours = spliced(model, [[1, IMAGE, 5, IMAGE]], images, **asked)
    given = spliced(model, [[1, IMAGE, 5, IMAGE]], images, image_patches=list(quadrants(images)), **asked)
    assert torch.equal(ours.inputs_embeds, given.inputs_embeds)
    with pytest.raises(ValueError, match=r"four quadrants of each view, \[2, 4, 3, S, S\]"):
        spliced(model, [[1, IMAGE, 5, IMAGE]], images, image_patches=list(quadrants(images[:1])), **asked)


def test_other_sides_are_refused(model):
    with pytest.raises(ValueError, match=r"each patch of 336 pixels, got torch.Size\(\[1, 3, 224, 224\]\)"):
        spliced(model, [[1, IMAGE, 5]], pictures(1)[..., :224, :224], questions=["what is it ?"])


def test_long_questions_are_cut_as_in_training(model):
    ids, _ = model.get_text_tower().ids_of(["what " * 200])
    assert ids.shape == (1, 77) and ids[0, -1] == 63
    with pytest.raises(MethodError, match=r"at most 77 tokens, got \[1, 78\]"):
        spliced(model, [[1, IMAGE, 5]], pictures(1), text_guide_ids=torch.ones(1, 78, dtype=torch.long))


def test_a_question_is_needed(model):
    with pytest.raises(MethodError, match="TG-LLaVA reads the question, and nothing says what it is"):
        model.generate(torch.tensor([[1, IMAGE, 5]]), images=pictures(1), **GREEDY)
    with pytest.raises(MethodError, match=r"one for each prompt \(1\) or one for each image \(1\), got 3"):
        spliced(model, [[1, IMAGE, 5]], pictures(1), text_guide_ids=torch.full((3, 4), 5))


def test_a_batch_gives_the_answers_of_its_samples(model):
    """Questions of different length, several images, text alone."""
    ids = torch.tensor([[1, IMAGE, 5, IMAGE, 6], [0, 0, 1, IMAGE, 7], [0, 0, 4, 5, 6]])
    images, questions = pictures(3), ["what is it ?", "how many are there in this picture ?", "who ?"]
    mask = (ids != 0).long()
    batch = model.generate(ids, images=images, questions=questions, attention_mask=mask, **GREEDY)
    one = model.generate(ids[:1], images=images[:2], questions=questions[:1], **GREEDY)
    two = model.generate(ids[1:2, 2:], images=images[2:], questions=questions[1:2], **GREEDY)
    text = model.generate(ids[2:, 2:], **GREEDY)
    assert torch.equal(batch, torch.cat([one, two, text]))


def test_an_image_may_be_asked_twice(model):
    images, asked = pictures(1), {"questions": [["what is it ?", "who ?"]]}
    both = spliced(model, [[1, IMAGE, 5, IMAGE]], images, **asked).inputs_embeds[0]
    apart = [spliced(model, [[IMAGE]], images, questions=[text]).inputs_embeds[0] for text in asked["questions"][0]]
    torch.testing.assert_close(both[1:641], apart[0])
    torch.testing.assert_close(both[642:], apart[1])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_config():
    qwen, llama = LlavaQwenTextLearnableQueryForCausalLM, LlavaLlamaTextLearnableQueryForCausalLM
    assert architecture_of({"architectures": [qwen.__name__]}) is qwen
    assert architecture_of({"architectures": [llama.__name__]}) is llama
    assert architecture_of({"model_type": "llava_llama_text_learnable_query"}) is llama
    assert architecture_of({"model_type": "llava_qwen", "mm_text_tower": "openai/clip"}) is qwen
    assert architecture_of({"model_type": "llava_qwen"}) is None


def test_prompts_are_those_of_the_official_script(model):
    conversation = conv_templates[model.prompt_template].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == (
        "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives helpful "
        "and honest answers.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\n"
    )


def test_loaded_as_any_checkpoint_and_saved_in_the_official_format(folder, tmp_path):
    source, again = tmp_path / "source", tmp_path / "again"
    shutil.copytree(folder, source)
    for path in (GOLDEN / "checkpoints/tiny-llava-onevision").glob("*"):
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            shutil.copy(path, source)
    how = {"torch_dtype": "float32", "device_map": "cpu"}
    tokenizer, loaded, processor, _ = load_pretrained_model(str(source), None, "llava_qwen", **how)
    assert processor.image_mean[0] == pytest.approx(0.48145466)
    loaded.resize_token_embeddings(300)
    loaded.save_pretrained(again)
    names = set(load_file(FOLDER / "model.safetensors"))
    assert set(load_file(again / "model.safetensors")) == {n for n in names if not any(part in n for part in UNREAD)}
    shutil.copytree(folder / "vision_tower", again / "vision_tower")
    tokenizer.save_pretrained(again)
    _, once_more, *_ = load_pretrained_model(str(again), **how)
    text = tokenizer("what is it ?").input_ids
    asked = torch.tensor([[1, IMAGE, *text]])
    read = once_more.generate(asked, images=pictures(1), **GREEDY)  # the question is read out of the prompt
    given = once_more.generate(asked, images=pictures(1), questions=[tokenizer.decode(text)], **GREEDY)
    assert torch.equal(read, given)


def test_a_llama_decoder(folder, tmp_path):
    """The same modules in front of the other decoder."""
    weights = {
        n: v
        for n, v in load_file(folder / "model.safetensors").items()
        if "_proj.bias" not in n or "model.layers" not in n
    }
    keys = {"architectures": [LlavaLlamaTextLearnableQueryForCausalLM.__name__], "attention_bias": False}
    llama = load(changed(folder, tmp_path / "llama", weights, model_type="llava_llama_text_learnable_query", **keys))
    assert isinstance(llama, LlavaLlamaTextLearnableQueryForCausalLM)
    assert llama.prompt_template == "llava_v0" and llama.prompt_template in conv_templates
    ids, asked = torch.tensor([[1, IMAGE, 5]]), {"images": pictures(1), "questions": ["what is it ?"]}
    assert llama.generate(ids, **asked, **GREEDY).shape == (1, 4)


def test_towers_come_from_their_own_files_where_the_checkpoint_has_none(folder, tmp_path, model):
    weights = load_file(folder / "model.safetensors")
    towers = {n: v for n, v in weights.items() if "tower." in n}
    target = changed(folder, tmp_path / "bare", {n: v for n, v in weights.items() if n not in towers})
    own = {n.split("tower.", 2)[-1]: v for n, v in towers.items()}
    save_file(own, target / "vision_tower/model.safetensors", {"format": "pt"})
    bare = load(target)
    bare.get_vision_tower().load_model()
    asked = {"questions": ["what is it ?"]}
    assert torch.equal(
        spliced(bare, [[1, IMAGE, 5]], pictures(1), **asked).inputs_embeds,
        spliced(model, [[1, IMAGE, 5]], pictures(1), **asked).inputs_embeds,
    )


def test_trained_parts_on_a_base(folder, tmp_path, model):
    """What the first stage of training writes: three files beside the base language model."""
    weights = load_file(folder / "model.safetensors")
    parts = ("mm_projector", "mm_cross_attn", "mm_patch_encoder")
    base = changed(
        folder, tmp_path / "base", {n: v for n, v in weights.items() if not any(f".{p}." in n for p in parts)}
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(folder / "config.json", adapter)
    shutil.copytree(folder / "vision_tower", adapter / "vision_tower")
    for path in (GOLDEN / "checkpoints/tiny-llava-onevision").glob("*"):
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            shutil.copy(path, base)
    with pytest.raises(CheckpointError, match=r"has no mm_projector\.bin"):
        load_pretrained_model(str(adapter), str(base), torch_dtype="float32", device_map="cpu")
    for part in parts:
        torch.save({n: v for n, v in weights.items() if f".{part}." in n}, adapter / f"{part}.bin")
    _, loaded, *_ = load_pretrained_model(str(adapter), str(base), torch_dtype="float32", device_map="cpu")
    asked = {"questions": ["what is it ?"]}
    assert torch.equal(
        spliced(loaded, [[1, IMAGE, 5]], pictures(1), **asked).inputs_embeds,
        spliced(model, [[1, IMAGE, 5]], pictures(1), **asked).inputs_embeds,
    )


@pytest.mark.parametrize(
    "name", ["query_tokens", "perceiver.latents", "text_model.final_layer_norm", "crossattention.self"]
)
def test_half_checkpoints_are_refused(folder, tmp_path, name):
    half = {key: value for key, value in load_file(folder / "model.safetensors").items() if name not in key}
    with pytest.raises(CheckpointError, match="weights missing"):
        load(changed(folder, tmp_path / "half", half))


def test_weights_without_a_place_are_refused(folder, tmp_path):
    name = "model.mm_cross_attn.Qformer.bert.encoder.layer.1.crossattention.self.query.bias"
    weights = load_file(folder / "model.safetensors") | {name: torch.zeros(32)}
    with pytest.raises(CheckpointError, match=r"no place for 1 of its weights.*crossattention"):
        load(changed(folder, tmp_path / "more", weights))


def test_other_configs_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="mm_patch_merge_type 'spatial' is not 'flat'"):
        load(changed(folder, tmp_path / "spatial", mm_patch_merge_type="spatial"))
    with pytest.raises(CheckpointError, match="has no mm_text_hidden_size"):
        load(changed(folder, tmp_path / "text", mm_text_hidden_size=None))
    siglip = changed(folder, tmp_path / "siglip")
    shutil.copy(GOLDEN / "hicom/tiny_hicom/vision_tower/config.json", siglip / "vision_tower/config.json")
    with pytest.raises(TowerError, match="of model_type 'siglip_text_model'; the one of clip is needed"):
        load(siglip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder, model, dtype):
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"questions": ["what is it ?"]}
    half = load(folder, dtype=dtype)
    near = half(input_ids=ids, images=pictures(1).to(dtype), **asked).logits
    exact = model(input_ids=ids, images=pictures(1), **asked).logits
    assert near.dtype == dtype and (near.float() - exact).norm() < 0.05 * exact.norm()
    assert half.generate(ids, images=pictures(1).to(dtype), **asked, **GREEDY).shape == (1, 4)


def test_copies_answer_alike_and_beams_run(model):
    ids, asked = torch.tensor([[1, IMAGE, 5]]), {"images": pictures(1), "questions": ["what is it ?"]}
    assert torch.equal(copy.deepcopy(model).generate(ids, **asked, **GREEDY), model.generate(ids, **asked, **GREEDY))
    assert model.generate(ids, **asked, **{**GREEDY, "num_beams": 3}).shape == (1, 4)


def test_labels_stand_beside_the_visual_tokens(model):
    ids, labels = torch.tensor([[1, IMAGE, 5, 6]]), torch.tensor([[-100, -100, 5, 6]])
    out = model(input_ids=ids, labels=labels, images=pictures(1), questions=["what is it ?"])
    assert out.loss.isfinite() and out.logits.shape == (1, 643, 300)


def test_weights_may_lie_elsewhere(model):
    ids, asked = torch.tensor([[1, IMAGE, 5]]), {"images": pictures(1), "questions": ["what is it ?"]}
    expected = model.generate(ids, **asked, **GREEDY)
    away = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert away.get_model().mm_cross_attn.query_tokens.is_meta
    assert torch.equal(away.generate(ids, **asked, **GREEDY), expected)
    copied = copy.deepcopy(model)
    places = {f"model.layers.{index}": f"cuda:{index % 2}" for index in range(3)}
    places |= {
        "model.embed_tokens": "cuda:0",
        "model.norm": "cuda:1",
        "model.rotary_emb": "cuda:0",
        "lm_head": "cuda:1",
    }
    places |= {"model.vision_tower": "cuda:2", "model.text_tower": "cuda:0", "model.mm_projector": "cuda:1"}
    places |= {"model.mm_cross_attn": "cuda:3", "model.mm_patch_encoder": "cuda:1", "lm_head": "cuda:1"}
    with SeveralDevices():
        dispatch_model(copied, places, main_device="cuda:0", skip_keys="past_key_values")
        got = copied.generate(ids, **asked, **GREEDY)
    assert torch.equal(got.as_subclass(torch.Tensor), expected)


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_on_tokens_and_inside_the_llm(model):
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"images": pictures(1), "questions": ["what is it ?"]}
    dense = model.generate(ids, **asked, **GREEDY)
    with accelerate(model, "fastv", k=1, retention_ratio=1.0):
        assert torch.equal(model.generate(ids, **asked, **GREEDY), dense)
    both = {"divprune.retention_ratio": 0.5, "fastv.k": 1, "fastv.r": 0.5}
    with accelerate(model, "divprune+fastv", **both), record() as requests:
        model.generate(ids, **asked, **GREEDY)
    assert requests[0].samples[0].visual_tokens_after == 320 and requests[0].layer_lengths(0) == [323, 163, 163]


@pytest.mark.parametrize(("method", "says"), [("fastervlm", "cls_attention"), ("dycoke", "trained on images alone")])
def test_methods_that_read_patches_or_videos_are_refused(model, method, says):
    with pytest.raises(MethodError, match=says):
        accelerate(model, method)


def test_own_work_is_what_torch_counts(model):
    model = copy.deepcopy(model).requires_grad_(False)  # torch's counter fails on views of parameters
    ids, asked = torch.tensor([[1, IMAGE, 5, IMAGE]]), {"text_guide_ids": torch.tensor([62, 3])}
    with record() as requests:
        model.generate(ids, images=pictures(2), **asked, **GREEDY)
    with FlopCounterMode(display=False) as counter:
        spliced(model, ids.tolist(), pictures(2), **asked)
    tower, decoder = model.get_vision_tower(), model.get_model()
    with FlopCounterMode(display=False) as shared:  # the text is read once for both, and each picture once more
        tower(pictures(2))
        model.get_text_tower()(asked["text_guide_ids"][None])
        decoder.guidance(torch.zeros(1, 24))
    with FlopCounterMode(display=False) as twice:
        model.get_text_tower()(asked["text_guide_ids"][None])
        decoder.guidance(torch.zeros(1, 24))
    expected = counter.get_total_flops() - shared.get_total_flops() + 2 * twice.get_total_flops()
    assert model.own_macs(requests[0].samples[0]) == expected // 2
