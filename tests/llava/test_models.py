"""The four tiny checkpoints: loading in every form, forms of `images`, batches, and FastVID on the whole model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import accelerate_methods
from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.hosts.tower_files import TowerError
from accelerate_methods.stages.errors import UnknownNameError
from llava.constants import IGNORE_INDEX
from llava.model import LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM, LlavaQwenForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from llava.model.decoders import named_decoder
from tests.conftest import CHECKPOINTS
from tests.support.paths import ROOT

V15, V16, OV, VIDEO = "tiny-llava-1.5", "tiny-llava-1.6", "tiny-llava-onevision", "tiny-llava-video"
ALL = (V15, V16, OV, VIDEO)
IMAGE = -200
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_grad(request):
    with torch.set_grad_enabled("backward" in request.node.name):
        yield


def load(path, **kwargs):
    kwargs = {"device_map": "cpu", "torch_dtype": "float32", "attn_implementation": "sdpa", **kwargs}
    return load_pretrained_model(str(path), **kwargs)


def ids(*rows):
    """A batch of prompts, right-padded with its mask."""
    longest = max(map(len, rows))
    padded = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    return padded, mask


def pixels(count, side=384, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.5


def copy_of(name, target, skip=()):
    """A checkpoint folder without the fake hub cache and the files named."""
    return Path(shutil.copytree(CHECKPOINTS / name, target, ignore=shutil.ignore_patterns("hf_cache", *skip)))


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}), encoding="utf-8")


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ALL)
def test_load(name, dtype):
    tokenizer, model, processor, context = load(CHECKPOINTS / name, torch_dtype=dtype)
    wanted = getattr(torch, dtype)
    assert model.dtype == wanted and model.get_vision_tower().dtype == wanted and not model.training
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == model.lm_head.weight.shape[0] == 1000
    assert context in (4096, 32768) and processor.crop_size["height"] in (336, 384)
    assert all(p.device.type == "cpu" for p in model.parameters())
    side = processor.crop_size["height"]
    out = model.generate(torch.tensor([[5, IMAGE, 7]]), images=pixels(1, side).half(), **GREEDY)
    assert out.shape == (1, 5), "images are float16 always"


def test_auto_device_and_default_arguments():
    _, model, _, _ = load_pretrained_model(
        str(CHECKPOINTS / OV), None, "llava_qwen", multimodal=True, torch_dtype="auto"
    )
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("given", "says"), [({"device": "gpu"}, "unknown device 'gpu'"), ({"device_map": "cuda:99"}, "CUDA devices")]
)
def test_a_device_that_is_not_there(given, says):
    with pytest.raises(MethodError, match=says):
        load_pretrained_model("/nowhere", None, "llava_qwen", **given)


@pytest.mark.parametrize("form", ["safetensors", "bin", "bin single"])
@pytest.mark.parametrize("name", [V15, OV])
def test_other_weight_files(name, form, tmp_path, loaded):
    folder = copy_of(name, tmp_path / name, skip=("model.safetensors",) if name == OV else ())
    shutil.rmtree(folder / "vision_tower")
    shutil.copytree(CHECKPOINTS / name / "vision_tower", folder / "vision_tower")
    (folder / "model.safetensors").unlink(missing_ok=True)
    weights = load_file(CHECKPOINTS / name / "model.safetensors")
    if form == "bin single":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        kind, stem = ("safetensors", "model") if form == "safetensors" else ("bin", "pytorch_model")
        index = {}
        for part in range(2):
            shard = dict(sorted(weights.items())[part::2])
            file = f"{stem}-0000{part + 1}-of-00002.{kind}"
            save_file(shard, folder / file, {"format": "pt"}) if kind == "safetensors" else torch.save(
                shard, folder / file
            )
            index.update(dict.fromkeys(shard, file))
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
        (folder / f"{stem}.{kind}.index.json").write_text(text)
    assert same_weights(load(folder)[1], loaded(name)[1])


def test_missing_weight(tmp_path):
    folder = copy_of(OV, tmp_path / OV)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.3.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights missing.*layers\.3\.mlp\.up_proj"):
        load(folder)


def test_no_weights_and_no_checkpoint(tmp_path):
    folder = copy_of(OV, tmp_path / OV, skip=("*.safetensors",))
    with pytest.raises(CheckpointError, match="has no weights"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "model_name", "message"),
    [(OV, "llava-v1.5-7b", "says llama.*says qwen"), (V15, "llava_qwen", "says qwen.*says llama"),
     (V15, "llava-mixtral", "says mixtral"), (V16, "llava-v1.6-mistral-7b", "says mistral")],
)  # fmt: skip
def test_contradicting_name(name, model_name, message):
    with pytest.raises(CheckpointError, match=message):
        load(CHECKPOINTS / name, model_name=model_name)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("llava-v1.5-13b-qwen", "llama"),  # the official loader asks for LLaMA first
        ("llava-v1.6-34b-qwen", "llama"), ("llava-yi-34b", "llama"), ("nous-hermes-llava-qwen", "llama"),
        ("WizardLM-2-vicuna-llava-qwen", "llama"), ("llava-v1.6-vicuna-7b", "llama"), ("vicuna-llava-qwen", "qwen"),
        ("llava-mixtral-8x7b", "mixtral"), ("llava-mixtral-mistral", "mixtral"), ("llava-mistral-llama", "mistral"),
        ("llava-zephyr-7b", "mistral"), ("llava-qwen1.5-moe-a2.7b", "qwen_moe"), ("llava-moe-qwen", "qwen_moe"),
        ("llava-Qwen2-57B-A14B", "qwen_moe"), ("my-llava-quyen", "qwen"), ("llava-gemma-2b", "gemma"),
        ("llava-moe-2b", "moe"), ("mpt-7b-llava", "mpt"),
        # short words stand alone
        ("trying-llava-qwen", "qwen"), ("llava-prompt-tuned", None), ("llava-smoent", None), ("llava-next", None),
    ],
)  # fmt: skip
def test_what_a_model_name_speaks_of(name, decoder):
    assert named_decoder(name) == decoder


def test_experts_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"says qwen_moe.*says qwen"):
        load(CHECKPOINTS / OV, model_name="llava-qwen1.5-moe-a2.7b")
    with pytest.raises(CheckpointError, match=r"says moe.*says llama"):
        load(CHECKPOINTS / V15, model_name="llava-moe-2b")
    folder = copy_of(V15, tmp_path / V15)
    edit_config(folder, architectures=["MoELLaVALlamaForCausalLM"], model_type="moe_llava_llama")
    with pytest.raises(CheckpointError, match=r"not a LLaVA checkpoint.*MoELLaVALlamaForCausalLM"):
        load(folder)


def test_native_and_foreign_checkpoints(tmp_path):
    folder = copy_of(OV, tmp_path / OV)
    edit_config(folder, architectures=["LlavaOnevisionForConditionalGeneration"], model_type="llava_onevision")
    with pytest.raises(CheckpointError, match="transformers-native"):
        load(folder)
    with pytest.raises(CheckpointError, match="not a LLaVA checkpoint"):
        load(CHECKPOINTS / "tiny-qwen2.5-vl")


def test_wrong_dtype_and_quantisation():
    with pytest.raises(UnknownNameError, match="Did you mean 'float16'"):
        load(CHECKPOINTS / OV, torch_dtype="flot16")
    with pytest.raises(ValueError, match="not both"):
        load(CHECKPOINTS / OV, load_8bit=True, load_4bit=True)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        for bits in ("load_8bit", "load_4bit"):
            with pytest.raises(ImportError, match="bitsandbytes"):
                load(CHECKPOINTS / OV, **{bits: True})


def test_tower_from_the_checkpoint_folder_or_nowhere(tmp_path, loaded):
    tower = loaded(V15)[1].get_vision_tower().vision_tower.state_dict()
    hub = load_file(CHECKPOINTS / V15 / "vision_tower/model.safetensors")
    key = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(tower[key], hub[f"vision_model.{key}"].float())
    folder = copy_of(V15, tmp_path / V15, skip=("vision_tower",))
    with pytest.raises(TowerError, match="no folder 'vision_tower'"):
        load(folder)


def test_tower_from_the_hub_cache(tmp_path):
    folder = copy_of(V15, tmp_path / V15, skip=("vision_tower",))
    code = f"""
from llava.model.builder import load_pretrained_model
_, model, processor, _ = load_pretrained_model({str(folder)!r}, device_map="cpu", torch_dtype="float32")
print(float(model.get_vision_tower().vision_tower.encoder.layers[0].mlp.fc1.weight.double().sum()), processor.crop_size)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(CHECKPOINTS / V15 / "hf_cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    hub = load_file(CHECKPOINTS / V15 / "vision_tower/model.safetensors")
    expected = hub["vision_model.encoder.layers.0.mlp.fc1.weight"].double().sum()
    assert float(done.stdout.split()[0]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("name", [V16, OV])
def test_fine_tuned_tower_wins(name, loaded):
    tower = loaded(name)[1].get_vision_tower().vision_tower.state_dict()
    inside = load_file(CHECKPOINTS / name / "model.safetensors")
    hub = load_file(CHECKPOINTS / name / "vision_tower/model.safetensors")
    key = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(tower[key], inside[f"model.vision_tower.vision_tower.vision_model.{key}"].float())
    assert not torch.equal(tower[key], hub[f"vision_model.{key}"].float())


@pytest.mark.parametrize("name", [V15, OV])
def test_save_and_load(name, tmp_path, loaded):
    tokenizer, model, _, _ = load(CHECKPOINTS / name)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for path in CHECKPOINTS.joinpath(name).glob("*token*"):
        if not (tmp_path / path.name).exists():
            shutil.copy(path, tmp_path)
    shutil.copytree(CHECKPOINTS / name / "vision_tower", tmp_path / "vision_tower")
    official = set(load_file(CHECKPOINTS / name / "model.safetensors"))
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert official <= saved, sorted(official - saved)[:3]
    assert all(k.startswith("model.vision_tower.vision_tower.") for k in saved - official)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    again = load(tmp_path)[1]
    assert same_weights(again, model)
    assert same_weights(type(model).from_pretrained(tmp_path, dtype=torch.float32), model)


def test_vocabulary_and_overwritten_config(tmp_path):
    folder = copy_of(OV, tmp_path / OV)
    edit_config(folder, mm_use_im_patch_token="REMOVE")  # the official default is True
    tokenizer, model, _, _ = load(
        folder, overwrite_config={"mm_spatial_pool_mode": "average", "tokenizer_model_max_length": 77}
    )
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == 1001
    assert model.config.mm_spatial_pool_mode == "average" and model.config.tokenizer_model_max_length == 77


def test_rope_scaling_of_llama():
    scaling = {"type": "linear", "factor": 4.0}
    _, model, _, _ = load(CHECKPOINTS / V16, overwrite_config={"rope_scaling": scaling, "max_sequence_length": 16384})
    plain = load(CHECKPOINTS / V16)[1].model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq * 4, plain)


def test_customized_config(loaded):
    config = LlavaLlamaForCausalLM.config_class.from_dict(json.loads((CHECKPOINTS / V15 / "config.json").read_text()))
    assert same_weights(load(CHECKPOINTS / V15, customized_config=config)[1], loaded(V15)[1])
    assert same_weights(load(CHECKPOINTS / V15, customized_config=CHECKPOINTS / V15)[1], loaded(V15)[1])


def test_auto_classes():
    config = AutoConfig.for_model("llava_qwen", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                  num_key_value_heads=2, intermediate_size=32, vocab_size=32)  # fmt: skip
    assert isinstance(AutoModelForCausalLM.from_config(config), LlavaQwenForCausalLM)
    assert AutoConfig.for_model("llava_llama").model_type == "llava_llama"
    AutoConfig.from_pretrained(CHECKPOINTS / OV)  # lmms-eval does this; official files say model_type "llava"


def test_tied_embeddings(tmp_path):
    folder = copy_of(OV, tmp_path / OV)
    edit_config(folder, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = load(folder)[1]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"].float()[:1000])


def test_mistral(tmp_path):
    text = json.loads((CHECKPOINTS / V16 / "config.json").read_text())
    text.update(architectures=["LlavaMistralForCausalLM"], num_key_value_heads=2, sliding_window=None)
    text.pop("model_type")
    config = LlavaMistralConfig.from_dict(text)
    config.name_or_path = str(CHECKPOINTS / V16)
    torch.manual_seed(0)
    model = LlavaMistralForCausalLM(config).eval()
    copy_of(V16, tmp_path / "m", skip=("model.safetensors", "config.json", "vision_tower"))
    model.save_pretrained(tmp_path / "m")
    shutil.copytree(CHECKPOINTS / V16 / "vision_tower", tmp_path / "m/vision_tower")
    again = load(tmp_path / "m", model_name="llava-v1.6-mistral-7b")[1]
    assert isinstance(again, LlavaMistralForCausalLM) and same_weights(again, model)
    shared = {"images": [pixels(5, 336)], "image_sizes": [(600, 600)]}
    prompt = torch.tensor([[1, IMAGE, 7]])
    dense = again.generate(prompt, **shared, **GREEDY)
    with accelerate(
        again, "uniform+random_prefill", **{"uniform.retention_ratio": 1.0, "random_prefill.retention_ratio": 1.0}
    ):
        assert torch.equal(again.generate(prompt, **shared, **GREEDY), dense)


def test_projector_only(tmp_path, loaded):
    """model_base: a base LLM in one folder, projector and newline in another."""
    weights = load_file(CHECKPOINTS / V16 / "model.safetensors")
    base = copy_of(V16, tmp_path / "base", skip=("vision_tower",))
    vision = {k: v for k, v in weights.items() if "vision_tower" in k}
    extra = {k: v for k, v in weights.items() if "mm_projector" in k or "image_newline" in k}
    rest = {k: v for k, v in weights.items() if k not in extra}
    assert vision and len(extra) == 5
    save_file(rest, base / "model.safetensors", {"format": "pt"})
    adapter = tmp_path / "llava-projector"
    adapter.mkdir()
    shutil.copy(CHECKPOINTS / V16 / "config.json", adapter)
    shutil.copytree(CHECKPOINTS / V16 / "vision_tower", adapter / "vision_tower")
    with pytest.raises(CheckpointError, match=r"no mm_projector\.bin"):
        load(adapter, model_base=str(base))
    torch.save(extra, adapter / "mm_projector.bin")
    assert same_weights(load(adapter, model_base=str(base))[1], loaded(V16)[1])
    torch.save({**extra, "model.nonsense": torch.zeros(1)}, adapter / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"model\.nonsense"):
        load(adapter, model_base=str(base))


def test_generate_without_cache_is_refused(loaded):
    with pytest.raises(ValueError, match="needs the KV cache"):
        loaded(OV)[1].generate(torch.tensor([[1, 2]]), use_cache=False)


@pytest.mark.parametrize(("how", "says"), [
    ({"prefill_chunk_size": 4}, "prefill_chunk_size is not possible"),
    ({"generation_config": GenerationConfig(prefill_chunk_size=4)}, "prefill_chunk_size is not possible"),
    ({"guidance_scale": 2.0}, "guidance_scale needs negative_prompt_ids"),
])  # fmt: skip
def test_what_reads_the_ids_of_the_prompt_is_refused(how, says, loaded):
    model, pixels = loaded(V15)[1], torch.zeros(1, 3, 336, 336)
    for ids, images in (([5, IMAGE, 8], pixels), ([5, 7, 8], None)):
        with pytest.raises(ValueError, match=says):
            model.generate(torch.tensor([ids]), images=images, max_new_tokens=2, **how)


def test_guidance_by_another_prompt(loaded):
    model, ids = loaded(V15)[1], torch.tensor([[5, IMAGE, 8]])
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    how = dict(max_new_tokens=3, output_scores=True, return_dict_in_generate=True, do_sample=False, pad_token_id=0)
    plain = torch.stack(model.generate(ids, images=pixels, **how).scores).log_softmax(-1)
    guided = model.generate(ids, images=pixels, guidance_scale=2.0, negative_prompt_ids=torch.tensor([[5, 9]]), **how)
    other = model(input_ids=torch.tensor([[5, 9]])).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(guided.scores[0], 2 * plain[0] - other, atol=1e-4, rtol=1e-4)


def test_lora(tmp_path, loaded):
    peft = pytest.importorskip("peft")
    _, model, _, _ = load(CHECKPOINTS / V16)
    targets = r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    )
    adapter = tmp_path / "llava-lora"
    wrapped.save_pretrained(adapter)
    shutil.copy(CHECKPOINTS / V16 / "config.json", adapter)
    weights = load_file(CHECKPOINTS / V16 / "model.safetensors")
    extra = {f"base_model.{k}": v.float() + 1 for k, v in weights.items() if "mm_projector" in k}
    torch.save(extra, adapter / "non_lora_trainables.bin")
    expected = wrapped.merge_and_unload().state_dict()
    got = load(adapter, model_base=str(CHECKPOINTS / V16))[1].state_dict()
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key] + ("mm_projector" in key), atol=1e-6, rtol=1e-5)
    assert not torch.equal(got["model.layers.0.self_attn.q_proj.weight"],
                           loaded(V16)[1].state_dict()["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


def test_method_at_load():
    _, model, _, _ = load(CHECKPOINTS / OV, method="fastvid", method_params={"retention_ratio": 0.25})
    assert model.acceleration.pipeline.compress.retention_ratio == 0.25
    accelerate_methods.detach(model)
    assert model.acceleration is None


# -- forms of images and batches ---------------------------------------------------------------------------------------


def test_image_forms(tiny):
    """A tensor of plain images takes no newline; a list gives each image one (both official behaviours)."""
    model, images = tiny(OV), pixels(2)
    prompt = torch.tensor([[5, IMAGE, 6, IMAGE, 7]])

    def logits(images):
        return model(input_ids=prompt, images=images, image_sizes=[(384, 384)] * 2).logits

    assert logits(images).shape[1] == 3 + 2 * 729
    listed = logits([images[0], images[1]])
    assert listed.shape[1] == 3 + 2 * 730
    torch.testing.assert_close(logits(images[:, None]), listed)
    torch.testing.assert_close(logits([images[:1], images[1:]]), listed)


def batch_of(seed=0):
    """Text only, an anyres image, a one-frame video, a five-frame video."""
    prompt, mask = ids([5, 6, 7, 8, 9, 10], [5, IMAGE, 7], [IMAGE, 7, 8, 9], [5, 6, IMAGE, 7])
    images = [pixels(3, seed=1), pixels(1, seed=2), pixels(5, seed=3)]
    return prompt, mask, images, ["image", "video", "video"], [(700, 300), (384, 384), (384, 384)]


@pytest.mark.parametrize(
    ("name", "method", "params"),
    [(OV, None, {}), (VIDEO, None, {}), (OV, "fastvid", {"retention_ratio": 0.2}), (VIDEO, "fastvid", {}),
     (OV, "random_prefill", {}), (VIDEO, "pool", {"retention_ratio": 0.1}),
     (OV, "fastvid+random_prefill", {"random_prefill.layer": 1})],
)  # fmt: skip
def test_mixed_batch_equals_one_by_one(name, method, params, tiny):
    model = tiny(name)
    prompt, mask, images, modalities, sizes = batch_of()
    with accelerate(model, method, **params):
        together = model.generate(
            prompt, attention_mask=mask, images=images, modalities=modalities, image_sizes=sizes, **GREEDY
        )
        logits = model(
            input_ids=prompt, attention_mask=mask, images=images, modalities=modalities, image_sizes=sizes
        ).logits
        for row in range(4):
            own = prompt[row : row + 1, : int(mask[row].sum())]
            shared = {} if row == 0 else {
                "images": images[row - 1 : row], "modalities": modalities[row - 1 : row],
                "image_sizes": sizes[row - 1 : row],
            }  # fmt: skip
            assert torch.equal(model.generate(own, **shared, **GREEDY)[0], together[row])
            alone = model(input_ids=own, **shared).logits[0]
            torch.testing.assert_close(logits[row, : len(alone)], alone, atol=1e-4, rtol=1e-4)  # right padding


def test_left_padded_input(tiny):
    model = tiny(V15)
    shared = {"images": pixels(2, 336), **GREEDY}
    right = model.generate(torch.tensor([[1, IMAGE, 7, 8], [1, IMAGE, 9, 0]]),
                           attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), **shared)  # fmt: skip
    left = model.generate(torch.tensor([[1, IMAGE, 7, 8], [0, 1, IMAGE, 9]]),
                          attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), **shared)  # fmt: skip
    assert torch.equal(left, right)


def test_placeholders_and_images_must_match(tiny):
    model = tiny(V15)
    for prompt, images in (((1, IMAGE, IMAGE, 7), 1), ((1, IMAGE, 7), 3), ((1, 5, IMAGE), 0)):
        shared = {"images": pixels(images, 336) if images else None}
        with pytest.raises(ValueError, match="placeholders but"):
            model.generate(torch.tensor([prompt]), **shared, **GREEDY)


def test_image_sizes_as_tensor(tiny):
    model, images = tiny(OV), [pixels(3)]
    prompt = torch.tensor([[5, IMAGE, 7]])
    for size in ((700, 300), (640, 347), (767, 383)):
        listed = model(input_ids=prompt, images=images, image_sizes=[size]).logits
        for form in (torch.tensor([size]), [torch.tensor(size)], [list(size)]):
            assert torch.equal(model(input_ids=prompt, images=images, image_sizes=form).logits, listed)
    a_video = r"modalities=\['video'\]"
    with pytest.raises(ValueError, match=f"needs image_sizes.*{a_video}"):
        model(input_ids=prompt, images=images)
    with pytest.raises(ValueError, match=f"tiles.*{a_video}"):
        model(input_ids=prompt, images=images, image_sizes=[(300, 3000)])


def test_ways_to_call_generate(tiny):
    model, video = tiny(VIDEO), pixels(2)
    prompt = torch.tensor([[5, IMAGE, 7]])
    wanted = model.generate(prompt, images=[video], modalities=["video"], **GREEDY)
    assert wanted.shape == (1, 5)
    for call in (
        {"inputs": prompt}, {"input_ids": prompt}, {"inputs": prompt, "temperature": 0, "top_p": None, "num_beams": 1}
    ):  # fmt: skip
        assert torch.equal(model.generate(**call, images=[video], modalities="video", **GREEDY), wanted)
    with pytest.raises(NotImplementedError):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match="input ids"):
        model.generate(images=[video])
    with pytest.raises(ValueError, match="modality 'vidoe'"):
        model.generate(prompt, images=[video], modalities=["vidoe"], **GREEDY)
    text = model.generate(torch.tensor([[5, 6, 7]]), images=[], **GREEDY)
    assert torch.equal(text, model.generate(torch.tensor([[5, 6, 7]]), **GREEDY)) and text.shape == (1, 5)
    assert torch.equal(
        model(input_ids=torch.tensor([[5, 6]]), images=[]).logits, model(input_ids=torch.tensor([[5, 6]])).logits
    )


def test_truncation(tiny):
    model = tiny(V15, tokenizer_model_max_length=100)
    prompt = torch.tensor([[1, IMAGE, 7, 8]])
    assert model(input_ids=prompt, images=pixels(1, 336)).logits.shape[1] == 100
    full = tiny(V15, tokenizer_model_max_length=None)(input_ids=prompt, images=pixels(1, 336)).logits
    torch.testing.assert_close(
        tiny(V15, tokenizer_model_max_length=100)(input_ids=prompt, images=pixels(1, 336)).logits, full[:, :100]
    )


def test_recorder_changes_nothing(tiny):
    model, prompt = tiny(OV), torch.tensor([[5, IMAGE, 7]])
    plain = model(input_ids=prompt, images=[pixels(2)], modalities=["video"]).logits
    with record():
        assert torch.equal(model(input_ids=prompt, images=[pixels(2)], modalities=["video"]).logits, plain)


def test_beam_search(tiny):
    model, prompt = tiny(OV), torch.tensor([[5, IMAGE, 7]])
    shared = {**GREEDY, "images": [pixels(2)], "modalities": ["video"], "num_beams": 2}
    dense = model.generate(prompt, **shared)
    for method in ("random_prefill", "uniform"):
        with accelerate(model, method, retention_ratio=1.0):
            assert torch.equal(model.generate(prompt, **shared), dense)
    with accelerate(model, "fastvid+random_prefill"):
        assert model.generate(prompt, **shared).shape == (1, 5)


def test_add_faster_video_is_refused(tiny):
    with pytest.raises(ValueError, match="add_faster_video"):
        tiny(VIDEO, add_faster_video=True).generate(torch.tensor([[IMAGE, 7]]), images=[pixels(1)], modalities="video")


# -- FastVID -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", [OV, VIDEO])
def test_fastvid_on_few_frames(name, frames, tiny):
    model, prompt, video = tiny(name), torch.tensor([[5, IMAGE, 7]]), [pixels(frames)]
    per_frame = 196
    dense = model(input_ids=prompt, images=video, modalities=["video"]).logits
    for ratio in (0.01, 0.5, 0.99, 1.0):
        with accelerate(model, "fastvid", retention_ratio=ratio), record() as requests:
            logits = model(input_ids=prompt, images=video, modalities=["video"]).logits
            assert model.generate(prompt, images=video, modalities=["video"], **GREEDY).shape == (1, 5)
        sample = requests[0].samples[0]
        assert 1 <= sample.visual_tokens_after <= max(1, int(per_frame * ratio)) * frames
        assert logits.shape[1] == sample.length and torch.isfinite(logits).all()
        if ratio == 1.0:
            torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)
        else:
            assert sample.length < sample.dense_length == dense.shape[1]


@pytest.mark.parametrize("name", [OV, VIDEO])
def test_fastvid_on_a_batch_of_videos(name, tiny):
    model = tiny(name)
    prompt, mask = ids([5, IMAGE, 7, 8, 9], [IMAGE, 9])
    videos = [pixels(9, seed=1), pixels(3, seed=2)]
    with accelerate(model, "fastvid"):
        both = model.generate(prompt, attention_mask=mask, images=videos, modalities=["video"] * 2, **GREEDY)
        assert torch.equal(
            both, model.generate(prompt, attention_mask=mask, images=videos, modalities="video", **GREEDY)
        )
        for row, video in enumerate(videos):
            own = prompt[row : row + 1, : int(mask[row].sum())]
            assert torch.equal(model.generate(own, images=[video], modalities=["video"], **GREEDY)[0], both[row])


def test_fastvid_leaves_images_and_text_alone(tiny):
    model = tiny(OV)
    calls = [
        {"input_ids": torch.tensor([[5, 6, 7]])},
        {"input_ids": torch.tensor([[5, IMAGE, 7]]), "images": pixels(1)},
        {"input_ids": torch.tensor([[5, IMAGE, 7]]), "images": [pixels(3)], "image_sizes": [(700, 300)]},
    ]
    for call in calls:
        dense, ids_dense = model(**call).logits, model.generate(**call, **GREEDY)
        with accelerate(model, "fastvid"):
            torch.testing.assert_close(model(**call).logits, dense, atol=1e-5, rtol=1e-5)
            assert torch.equal(model.generate(**call, **GREEDY), ids_dense)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fastvid_in_half_precision(dtype):
    _, model, _, _ = load(CHECKPOINTS / OV, torch_dtype=dtype, method="fastvid")
    out = model.generate(torch.tensor([[5, IMAGE, 7]]), images=[pixels(9).half()], modalities=["video"], **GREEDY)
    assert out.shape == (1, 5)


@pytest.mark.parametrize("method", ["fastvid", "random_prefill", "fastvid+random_prefill", None])
def test_loss_and_backward(method, tiny):
    """Labels of the text survive; the loss is that of the remaining sequence, and gradients reach the projector."""
    model = tiny(OV)
    prompt, mask = ids([5, IMAGE, 7, 8, 9], [IMAGE, 9, 4])
    labels = prompt.where(mask.bool() & (prompt >= 0), IGNORE_INDEX)
    with accelerate(model, method):
        out = model(
            input_ids=prompt,
            attention_mask=mask,
            labels=labels,
            images=[pixels(4), pixels(3, seed=1)],
            modalities="video",
        )
        logits, new_labels = model(
            input_ids=prompt, attention_mask=mask, labels=labels, images=[pixels(4), pixels(3, seed=1)],
            modalities="video", dpo_forward=True,
        )  # fmt: skip
    assert logits.shape[:2] == new_labels.shape
    assert [row[row >= 0].tolist() for row in new_labels] == [[5, 7, 8, 9], [9, 4]]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), new_labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    grad = model.get_model().mm_projector[0].weight.grad
    model.zero_grad()
    assert grad is not None and torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_next_turn_without_position_ids(tiny):
    """A caller that drives forward itself: after a compressed prompt positions go on from the uncompressed length."""
    model, prompt = tiny(OV), torch.tensor([[5, IMAGE, 7]])
    with accelerate(model, "fastvid"):
        wanted = model.generate(prompt, images=[pixels(9)], modalities=["video"], **GREEDY)
        out, got = model(input_ids=prompt, images=[pixels(9)], modalities=["video"], use_cache=True), []
        for _ in range(5):
            got.append(out.logits[:, -1].argmax(-1))
            out = model(input_ids=got[-1][:, None], past_key_values=out.past_key_values)
        assert torch.equal(torch.stack(got, 1), wanted)
        state = out.past_key_values.accelerate_state
        assert state.next_position.item() == 9 * 196 + 1 + 2 + 5


# -- smaller inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call", "tokens"),
    [
        (V15, {"images": pixels(1, 336)}, 144),
        (V16, {"images": [pixels(5, 336)], "image_sizes": [(600, 600)]}, 5 * 144),
        (OV, {"images": [pixels(3)], "image_sizes": [(768, 384)]}, 3 * 169),
        (OV, {"images": [pixels(2)], "modalities": ["video"]}, 2 * 49),
        (VIDEO, {"images": [pixels(2)], "modalities": ["video"]}, 2 * 49),
    ],
)
def test_downsample(name, call, tokens, tiny):
    model, prompt = tiny(name), torch.tensor([[5, IMAGE, 7]])
    with accelerate(model, "downsample", retention_ratio=0.25), record() as requests:
        assert torch.isfinite(model(input_ids=prompt, **call).logits).all()
        assert model.generate(prompt, **call, **GREEDY).shape == (1, 5)
    sample = requests[0].samples[0]
    assert sample.visual_tokens_after == tokens
    with record() as dense_requests:
        dense = model(input_ids=prompt, **call).logits
    full = dense_requests[0].samples[0]
    assert sample.visual_tokens_before == full.visual_tokens_before > tokens
    assert sample.dense_length == full.length > sample.length
    with accelerate(model, "downsample", retention_ratio=1.0):
        assert torch.equal(model(input_ids=prompt, **call).logits, dense)


def test_downsample_then_fastvid(tiny):
    model, prompt = tiny(OV), torch.tensor([[5, IMAGE, 7]])
    with accelerate(model, "downsample+fastvid", **{"fastvid.retention_ratio": 0.5}), record() as requests:
        model(input_ids=prompt, images=[pixels(3)], modalities=["video"])
    sample = requests[0].samples[0]
    assert sample.visual_tokens_before == 3 * 196 and sample.visual_tokens_after <= 3 * 24


def test_static_cache_is_refused_while_attached(tiny):
    model, prompt = tiny(OV), torch.tensor([[5, IMAGE, 7]])
    with accelerate(model, "fastvid"), pytest.raises(MethodError, match="DynamicCache"):
        model.generate(prompt, images=[pixels(2)], modalities="video", cache_implementation="static", **GREEDY)
