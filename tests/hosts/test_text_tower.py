"""Text towers: rows of long texts, agreement with transformers, where they come from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, SiglipConfig, SiglipModel

from accelerate_methods.hosts.text_tower import TextTower, text_chunks, text_tower_name, text_tower_of
from accelerate_methods.hosts.tower_files import TowerError, tower_config
from accelerate_methods.stages.errors import MethodError
from tests.conftest import CHECKPOINTS
from tests.support.clip_checkpoints import clip_folder
from tests.support.native_models import tree_model

NAME = "tiny-llava-1.5"


@pytest.fixture(scope="module")
def folder():
    return clip_folder(NAME)


@pytest.mark.parametrize(("length", "rows"), [(1, 1), (76, 1), (77, 1), (78, 2), (154, 2), (155, 3)])
def test_rows_of_a_text(length, rows):
    ids = torch.arange(1, length + 1)
    chunks, mask, place = text_chunks(ids, 77)
    assert chunks.shape == mask.shape == (rows, 77)
    assert torch.equal(chunks[mask.bool()], ids) and int(mask.sum()) == length
    assert place.tolist() == [76] * (rows - 1) + [(length - 1) % 77]


def test_clip_gives_what_transformers_gives(folder):
    tower = TextTower.from_files(str(folder)).on_device(torch.device("cpu"), torch.float32)
    whole = CLIPModel.from_pretrained(folder).float().eval()
    ids = torch.tensor([tower.tokenize("what is it?")])
    with torch.no_grad():
        text = whole.text_projection(whole.text_model(ids).pooler_output)
        torch.testing.assert_close(tower.embed("what is it?"), text)
        states = whole.vision_model(torch.randn(1, 3, 336, 336)).last_hidden_state[:, 1:]
        norm = whole.vision_model.post_layernorm
        torch.testing.assert_close(tower.embed_patches(states, norm), whole.visual_projection(norm(states)))
    assert len(tower.embed("what? " * 60)) > 1


def test_siglip_gives_what_transformers_gives(folder, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 500, "max_position_embeddings": 16, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 14})
    whole = SiglipModel(config).eval()
    whole.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    tower = TextTower.from_files(str(tmp_path))
    assert not tower.is_clip
    ids = torch.tensor(tower.tokenize("what is it?"))
    rows = text_chunks(ids, 16, 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(tower.embed("what is it?"), whole.text_model(rows).pooler_output)


def test_where_a_text_tower_is_looked_for(folder):
    tower = tree_model(NAME).get_vision_tower()
    own = CHECKPOINTS / NAME
    assert text_tower_name(tower.vision_tower_name, str(own), tower.hub_config) is None, "the folder has one half only"
    assert text_tower_name(str(folder), None, tower.hub_config) == str(folder)
    assert text_tower_name("openai/clip-vit-large-patch14-336", None, tower.hub_config) is not None
    official = tower_config("openai/clip-vit-large-patch14-336", None)
    assert text_tower_name(None, None, official) == "openai/clip-vit-large-patch14-336"
    assert text_tower_name(None, None, tower.hub_config) is None, "a tower of another structure"
    siglip = tree_model("tiny-llava-onevision").get_vision_tower().hub_config
    assert text_tower_name("google/siglip-so400m-patch14-384", None, siglip) is None, "patches have no projection"


def test_loaded_once_for_a_model(folder):
    model = tree_model(NAME)
    first = text_tower_of(model, str(folder), 32, "a method")
    assert text_tower_of(model, str(folder), 32, "a method") is first
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert not any(key.startswith("text") for key in model.state_dict())


def test_what_cannot_be_used_is_said(folder, tmp_path):
    with pytest.raises(MethodError, match=r"patches of width 32, this model's have 48.*text_tower="):
        text_tower_of(torch.nn.Linear(1, 1), str(folder), 48, "a method")
    with pytest.raises(TowerError, match="without its text tower"):
        TextTower.from_files(str(CHECKPOINTS / NAME / "vision_tower"))
    shutil.copytree(folder, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    del weights["text_model.final_layer_norm.bias"]
    save_file(weights, tmp_path / "part" / "model.safetensors")
    with pytest.raises(TowerError, match=r"lacks 1 weights: text_model\.final_layer_norm\.bias"):
        TextTower.from_files(str(tmp_path / "part"))
    (tmp_path / "part" / "config.json").write_text(json.dumps({"model_type": "blip"}), encoding="utf-8")
    with pytest.raises(TowerError, match="'blip' has no text tower"):
        TextTower.from_files(str(tmp_path / "part"))
