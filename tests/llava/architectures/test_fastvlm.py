"""FastVLM: its encoder, its checkpoints, and methods on it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from accelerate_methods import MethodError, accelerate, available, get, record
from accelerate_methods.hosts.tower_files import TowerError
from accelerate_methods.registry.compatibility import runs_on
from llava.conversation import conv_templates
from llava.eval.asking import Assistant
from llava.mm_utils import process_images
from llava.model.architectures import architecture_of
from llava.model.architectures.fastvlm import FastVlmConfig, LlavaQwen2ForCausalLM
from llava.model.architectures.fastvlm.fastvithd import FastViTHD, FastViTHDConfig
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from tests.support.architectures import tiny_checkpoint
from tests.support.configured import configured
from tests.support.paths import GOLDEN

FOLDER = GOLDEN / "fastvlm/tiny_fastvlm"
IMAGE = -200
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOWER = "model.vision_tower.vision_tower.model."
pytestmark = pytest.mark.usefixtures("no_grad")


def load(folder=FOLDER, dtype=torch.float32, **how):
    return LlavaQwen2ForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


@pytest.fixture(scope="module")
def model():
    return load()


def pictures(count, side=256, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def written(target, weights=None, **keys):
    """The checkpoint with other weights or config keys; a key that is None goes away."""
    config = json.loads((FOLDER / "config.json").read_text("utf-8")) | keys
    config = {key: value for key, value in config.items() if value is not None or key not in keys}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(load_file(FOLDER / "model.safetensors") if weights is None else weights, target / "model.safetensors")
    return target


# -- the encoder -------------------------------------------------------------------------------------------------------


def test_the_encoder_of_released_checkpoints():
    with torch.device("meta"):
        encoder = FastViTHD(FastViTHDConfig())
        maps = encoder(torch.empty(1, 3, 1024, 1024))
    own = sum(value.numel() for name, value in encoder.named_parameters() if not name.startswith("head."))
    assert maps.shape == (1, 3072, 16, 16) and own == 122_714_208


def test_the_work_of_the_encoder(model):
    tower = model.get_vision_tower()
    for side in (None, 128):
        with FlopCounterMode(display=False) as counter:
            tower(pictures(3, side or 256))
        assert tower.macs(3, side) == counter.get_total_flops() // 2


def test_statistics_stay_those_of_the_checkpoint_in_training():
    encoder = load().get_vision_tower().vision_tower
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    evaluated = encoder.eval()(pictures(2))
    assert torch.equal(encoder.train()(pictures(2)), evaluated)
    assert all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())


@pytest.mark.parametrize(("side", "tokens"), [(64, 1), (128, 4), (320, 25)])
def test_tokens_of_other_sides(model, side, tokens):
    spliced = model.prepare_multimodal(torch.tensor([[1, IMAGE, 5]]), None, None, pictures(1, side))
    assert spliced.lengths == [tokens + 2]


def test_other_sides_than_multiples_of_the_stride_are_refused(model):
    with pytest.raises(ValueError, match="multiples of 64 pixels"):
        model.prepare_multimodal(torch.tensor([[1, IMAGE, 5]]), None, None, pictures(1, 100))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"fastvithd_config": None}, "mobileclip_l_<side"),
        ({"mm_vision_tower": "mobileclip_ta_100"}, "multiple of 64"),
        ({"mm_vision_tower": "mobileclip_ta"}, "mobileclip_l_<side"),
        ({"fastvithd_config": {"inference_mode": False}}, "inference_mode"),
        ({"fastvithd_config": {"layers": [1, 2]}}, "embed_dims has 5 values for 2 stages"),
        ({"fastvithd_config": {"token_mixers": ["pooling"] * 5}}, "token mixer 'pooling'"),
        ({"fastvithd_config": {"hidden_size": 100}}, "hidden_size 100"),
    ],
)
def test_other_encoders_are_refused(tmp_path, keys, says):
    with pytest.raises(TowerError, match=says):
        load(written(tmp_path, **keys))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_config():
    assert architecture_of({"mm_vision_tower": "mobileclip_l_1024"}) is LlavaQwen2ForCausalLM
    assert architecture_of({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}) is None


def test_loaded_as_any_checkpoint_and_saved_in_the_official_format(model, tmp_path):
    source, again = tiny_checkpoint("fastvlm", tmp_path / "source"), tmp_path / "again"
    how = {"torch_dtype": "float32", "device_map": "cpu"}
    tokenizer, loaded, processor, context = load_pretrained_model(str(source), None, "llava_qwen", **how)
    assert context == 4096 and processor.size["shortest_edge"] == 256
    loaded.resize_token_embeddings(300)
    loaded.save_pretrained(again)
    names = set(load_file(again / "model.safetensors"))
    assert names == set(load_file(FOLDER / "model.safetensors"))
    tokenizer.save_pretrained(again)
    _, once_more, *_ = load_pretrained_model(str(again), **how)
    assert torch.equal(once_more.encode_images(pictures(1)), model.encode_images(pictures(1)))


def test_a_name_of_another_decoder_is_refused():
    with pytest.raises(CheckpointError, match=r"says mistral, but the config of .* says qwen"):
        load_pretrained_model(str(FOLDER), None, "llava_mistral")


def test_checkpoints_without_head_share_the_embeddings(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    del weights["lm_head.weight"]
    loaded = load(written(tmp_path, weights))
    assert torch.equal(loaded.lm_head.weight, loaded.get_model().embed_tokens.weight)


def test_half_checkpoints_are_refused(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    whole = {name: value for name, value in weights.items() if not name.startswith(TOWER)}
    with pytest.raises(CheckpointError, match="weights missing"):
        load(written(tmp_path, whole))
    del weights[f"{TOWER}network.4.1.layer_scale"]
    with pytest.raises(CheckpointError, match=r"1 weights missing.*layer_scale"):
        load(written(tmp_path, weights))


def test_weights_that_the_encoder_has_no_place_for_are_refused(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    weights[f"{TOWER}network.4.2.layer_scale"] = torch.ones(32, 1, 1)
    with pytest.raises(CheckpointError, match="no place for 1 of its weights"):
        load(written(tmp_path, weights))


def test_other_decoders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="LlavaLlamaForCausalLM; released are models on Qwen2"):
        load(written(tmp_path, architectures=["LlavaLlamaForCausalLM"]))


# -- prompts and images ------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_official_script():
    conversation = conv_templates[LlavaQwen2ForCausalLM.about.template].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_llavas_scripts_ask_in_its_template(tmp_path):
    args = {"model_path": str(tiny_checkpoint("fastvlm", tmp_path)), "device": "cpu", "max_new_tokens": 2}
    assistant = Assistant(SimpleNamespace(**args))
    assert assistant.template == "qwen_2"
    prompt = assistant.prompt(assistant.with_images("What is it?"))
    assert isinstance(assistant.ask(prompt, [Image.new("RGB", (80, 50))]), str)


def test_images_are_padded_with_black_or_cropped(model):
    processor, white = model.get_vision_tower().image_processor, Image.new("RGB", (100, 50), "white")
    padded = process_images([white], processor, model.config)
    assert padded.shape == (1, 3, 256, 256) and padded[0, 0, :60].max() == 0 and padded[0, 0, 128].min() == 1
    assert process_images([white], processor, FastVlmConfig()).min() == 1


def test_a_batch_gives_the_answers_of_its_samples(model):
    ids = torch.tensor([[1, IMAGE, 5, 6, 7, IMAGE, 8], [0, 0, 0, 1, IMAGE, 9, 10], [0, 0, 0, 0, 4, 5, 6]])
    images = pictures(3)
    batch = model.generate(ids, images=images, attention_mask=(ids != 0).long(), **GREEDY)
    one = model.generate(ids[:1], images=images[:2], **GREEDY)
    two = model.generate(ids[1:2, 3:], images=images[2:], **GREEDY)
    text = model.generate(ids[2:, 4:], **GREEDY)
    assert torch.equal(batch, torch.cat([one, two, text]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, dtype):
    ids, images = torch.tensor([[1, IMAGE, 5, 6]]), pictures(1)
    loaded = load(dtype=dtype)
    assert loaded.get_vision_tower().dtype == dtype
    near = loaded(input_ids=ids, images=images.to(dtype)).logits.float()
    exact = model(input_ids=ids, images=images).logits
    assert near.isfinite().all() and (near - exact).norm() < 0.05 * exact.norm()
    assert loaded.generate(ids, images=images.to(dtype), **GREEDY).shape == (1, 5)


def test_frames_of_a_video_follow_each_other_whole(model):
    frames = pictures(3)
    asked = {"images": [frames], "modalities": ["video"]}
    (item,) = model.prepare_multimodal(torch.tensor([[1, IMAGE, 5]]), None, None, **asked).spans[0]
    assert (item.length, item.frames, item.frame_rows) == (48, 3, 16)


def test_copies_answer_alike(model):
    ids, images = torch.tensor([[1, IMAGE, 5]]), pictures(1)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids, images=images).logits, model(ids, images=images).logits)


def test_with_weights_in_cpu_memory(model):
    ids, images = torch.tensor([[1, IMAGE, 5]]), pictures(1)
    away = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert away.get_vision_tower().vision_tower.head.proj.is_meta
    assert torch.equal(away.generate(ids, images=images, **GREEDY), model.generate(ids, images=images, **GREEDY))


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_on_tokens_and_inside_the_llm(model):
    ids, images = torch.tensor([[1, IMAGE, 5, 6]]), pictures(1)
    dense = model.generate(ids, images=images, **GREEDY)
    with accelerate(model, "fastv", k=1, retention_ratio=1.0):
        assert torch.equal(model.generate(ids, images=images, **GREEDY), dense)
    both = {"divprune.retention_ratio": 0.5, "fastv.k": 1, "fastv.r": 0.5}
    with accelerate(model, "divprune+fastv", **both), record() as requests:
        model.generate(ids, images=images, **GREEDY)
    assert requests[0].samples[0].visual_tokens_after == 8 and requests[0].layer_lengths(0) == [11, 7, 7]


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("method", [name for name in sorted(available()) if runs_on(name, "fastvlm")])
def test_methods_of_the_table_run(model, method, kind):
    ids, images = torch.tensor([[1, IMAGE, 5, 6]]), [pictures(4 if kind == "video" else 1)]
    fewer = {"layer_list": (1, 2), "keep_ratio_list": (0.5, 0.5)}  # the decoder has three layers
    acting = get(method, **fewer) if method == "v2drop" else configured(method)
    with accelerate(model, acting), record() as requests:
        assert model.generate(ids, images=images, modalities=[kind], **GREEDY).shape == (1, 5)
    assert requests[0].samples[0].visual_tokens_before == 16 * len(images[0])


def test_fewer_pixels_for_the_encoder(model):
    ids, images = torch.tensor([[1, IMAGE, 5, 6]]), pictures(1)
    with accelerate(model, "downsample", retention_ratio=0.25), record() as requests:
        model.generate(ids, images=images, **GREEDY)
    (sample,) = requests[0].samples
    assert (sample.visual_tokens_before, sample.visual_tokens_after) == (16, 4)


@pytest.mark.parametrize(
    ("method", "params", "says"), [("fastervlm", {}, "cls_attention"), ("tome", {"r": 1}, "encode stage")]
)
def test_methods_that_read_encoder_layers_are_refused(model, method, params, says):
    with pytest.raises(MethodError, match=f"{says}.*FastVLM|FastVLM.*{says}"):
        accelerate(model, method, **params)
