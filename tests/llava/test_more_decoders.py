"""Gemma, Mixtral and Qwen-MoE under the tree's vision side, with random weights: no such checkpoint is released."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from accelerate_methods import accelerate, record
from llava.model import LlavaGemmaForCausalLM, LlavaMixtralForCausalLM, LlavaQwenMoeForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from tests.support.paths import ROOT

EMBEDDED = ROOT / "assets/tiny-llava-onevision"
SHAPE = {
    "vocab_size": 427, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 424, "eos_token_id": 426, "pad_token_id": 0,
}  # fmt: skip
DECODERS = {
    "gemma": (LlavaGemmaForCausalLM, GemmaForCausalLM, GemmaConfig(**SHAPE, head_dim=32)),
    "mixtral": (
        LlavaMixtralForCausalLM, MixtralForCausalLM, MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=2)
    ),
    "qwen_moe": (
        LlavaQwenMoeForCausalLM,
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **SHAPE, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=48
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=DECODERS)
def loaded(request, tmp_path_factory):
    """(name, model, the decoder that it was made of): loaded out of a folder in the official format."""
    ours, theirs, config = DECODERS[request.param]
    torch.manual_seed(0)
    decoder = theirs(config).eval()
    folder = tmp_path_factory.mktemp(request.param)
    decoder.save_pretrained(folder)  # experts one by one, as on the hub
    vision = ("model.vision_tower", "model.mm_projector", "model.image_newline")
    embedded = load_file(EMBEDDED / "model.safetensors")
    weights = load_file(folder / "model.safetensors") | {
        name: value.float() for name, value in embedded.items() if name.startswith(vision)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    own = json.loads((EMBEDDED / "config.json").read_text("utf-8"))
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings |= {name: value for name, value in own.items() if name.startswith(("mm_", "image_", "tokenizer_"))}
    settings |= {"architectures": [ours.__name__], "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((EMBEDDED / name).read_bytes())
    (folder / "vision_tower").symlink_to(EMBEDDED / "vision_tower")
    model = load_pretrained_model(str(folder), device_map="cpu", torch_dtype="float32")[1]
    assert type(model) is ours
    with pytest.raises(CheckpointError, match=f"says {request.param}"):
        load_pretrained_model(str(folder), model_name="llava_llama", device_map="cpu")
    return request.param, model, decoder


@torch.no_grad()
def test_the_decoder_and_methods(loaded):
    name, model, decoder = loaded
    text = torch.tensor([[5, 6, 7, 9]])
    torch.testing.assert_close(model(input_ids=text).logits, decoder(input_ids=text).logits)
    video = torch.randn(4, 3, 182, 182, generator=torch.Generator().manual_seed(0))
    call = {"images": [video], "modalities": ["video"]}
    prompt = torch.tensor([[5, -200, 7, 8]])
    # what the official code, on transformers 4, gave the layers: Gemma scales whatever comes in
    item = model.encode([video], ["video"])[0]
    visual = torch.cat([item.features.flatten(0, 1), item.newlines])
    scale = model.config.hidden_size**0.5 if name == "gemma" else 1
    words = model.get_input_embeddings()
    embeds = torch.cat([words(prompt[:, :1]), visual[None] * scale, words(prompt[:, 2:])], dim=1)
    dense = model(input_ids=prompt, **call).logits
    torch.testing.assert_close(dense, decoder(inputs_embeds=embeds).logits)
    with accelerate(model, "random_prefill", retention_ratio=1.0):
        torch.testing.assert_close(model(input_ids=prompt, **call).logits, dense)
    with accelerate(model, "fastv", k=1, retention_ratio=0.25), record() as requests:
        answer = model.generate(prompt, **call, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape == (1, 3)
    (first,), (second,), (third,) = requests[0].layer_tokens
    assert first == embeds.shape[1] and second == third < first / 2


def test_saving_and_loading_again(loaded, tmp_path):
    _, model, _ = loaded
    model.save_pretrained(tmp_path)
    (tmp_path / "vision_tower").symlink_to(EMBEDDED / "vision_tower")
    again = type(model).from_pretrained(tmp_path)
    mine, other = model.state_dict(), again.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
