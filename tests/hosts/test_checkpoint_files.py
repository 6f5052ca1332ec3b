"""Files of checkpoints that cannot be reached, read or used: one line with the file and the reason."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from accelerate_methods import MethodError
from accelerate_methods.hosts.checkpoint_files import (
    CheckpointError,
    check_files,
    check_loaded,
    find_file,
    read_config,
    reading,
    weight_names,
)
from accelerate_methods.hosts.tower_files import TowerError, tower_config
from llava.model.builder import load_pretrained_model
from llava.tokenization import load_tokenizer
from tests.support.paths import CHECKPOINTS

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def refused(call, *args):
    """The message of a CheckpointError, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards with an index."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, file in zip(("a", "b"), SHARDS, strict=True):
        save_file({f"model.layers.0.{name}.weight": torch.zeros(64)}, folder / file, {"format": "pt"})
    names = {f"model.layers.0.{name}.weight": file for name, file in zip(("a", "b"), SHARDS, strict=True)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text('{"model_type": "llava"}')
    return folder


def test_whole_files_are_accepted(folder):
    check_files(folder)
    assert weight_names(folder) == {"model.layers.0.a.weight", "model.layers.0.b.weight"}
    assert read_config(folder) == {"model_type": "llava"}
    check_files(None)  # as from_pretrained with a state_dict


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", b"", "it is empty"),
        ("config.json", b'{"a": 1,', "line 1 column 9"),
        ("config.json", b"[1]", "it holds a list, not a mapping"),
        ("config.json", '{"a": "é"}'.encode("latin-1"), "can't decode byte 0xe9"),
        ("config.json", b"\xef\xbb\xbf{}", "BOM"),
        ("config.json", b"\x00\x00", "line 1 column 1"),
        ("tokenizer.json", b"", "it is empty"),
        ("tokenizer_config.json", b"{", "line 1"),
        ("generation_config.json", b"", "it is empty"),
        ("preprocessor_config.json", b"null", "it holds a NoneType"),
        (INDEX, b"", "it is empty"),
        (INDEX, b'{"x": 1}', "no 'weight_map'"),
        (INDEX, b'{"weight_map": ["a"]}', "no 'weight_map'"),
        (SHARDS[1], b"", "it is empty"),
        (SHARDS[1], b"\x00" * 100, "damaged or not complete"),
        (SHARDS[1], b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ],
)
def test_damaged_file(folder, file, content, reason):
    (folder / file).write_bytes(content)
    message = refused(check_files, folder)
    assert message.startswith(f"cannot read {folder / file}: ") and reason in message


def test_cut_and_missing_shards(folder):
    shard = folder / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-40])
    said = refused(check_files, folder)
    assert re.match(rf"cannot read {re.escape(str(shard))}: it is damaged or not complete", said)
    shard.unlink()
    assert f"{shard}: no such file, and {INDEX} names it" in refused(check_files, folder)


def test_cut_pickle(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(64)}, file)
    assert weight_names(tmp_path) == {"a"}
    file.write_bytes(file.read_bytes()[:-40])
    assert refused(weight_names, tmp_path).startswith(f"cannot read {file}: ")
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)  # cannot be mapped into memory
    assert weight_names(tmp_path) == {"a"}


def test_loading_names_the_file(folder):
    """Whatever a library raises for a damaged file, the file is found; other errors stay what they are."""
    with reading(folder), pytest.raises(KeyError):
        raise KeyError("of the caller")
    with pytest.raises(MemoryError), reading(folder):
        raise MemoryError
    (folder / "tokenizer.json").write_text("")

    def load():
        with reading(folder):
            raise AttributeError("'NoneType' object has no attribute 'get'")

    assert refused(load) == f"cannot read {folder / 'tokenizer.json'}: it is empty."


def test_names_that_do_not_fit():
    """Layers beyond the config's are an error, and so is any weight without a place but for what towers leave out."""
    none = {"missing_keys": set(), "unexpected_keys": set()}
    towers = {"model.vision_tower.head.probe", "model.image_newline", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    check_loaded({**none, "unexpected_keys": towers}, "x")
    message = refused(check_loaded, {**none, "unexpected_keys": {"model.layers.7.mlp.up_proj.weight"}}, "x")
    assert "no place for 1 of its weights (first: model.layers.7.mlp.up_proj.weight)" in message
    assert "fewer layers" in message
    blocks = {"model.visual.blocks.31.attn.qkv.weight", "model.vision_tower.encoder.layers.23.mlp.fc1.bias"}
    assert "no place for 2" in refused(check_loaded, {**none, "unexpected_keys": blocks}, "x")
    check_loaded({**none, "unexpected_keys": blocks}, "x", (), ("model.vision_tower.", "model.visual."))
    assert "fewer" not in refused(check_loaded, {**none, "unexpected_keys": {"model.mm_projector.4.bias"}}, "x")
    wrong = {**none, "mismatched_keys": {("lm_head.weight", (2, 3), (3, 3))}}
    assert "0 weights missing, 1 of the wrong shape (first: lm_head.weight)" in refused(check_loaded, wrong, "x")


# -- the tree's own loader ---------------------------------------------------------------------------------------------


def tree(path):
    return load_pretrained_model(str(path), device_map="cpu", torch_dtype="float32")


def copy_of(name, target):
    ignored = shutil.ignore_patterns("hf_cache")
    return Path(shutil.copytree(CHECKPOINTS / name, target / name, ignore=ignored))


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_config_that_does_not_fit(tmp_path, caplog):
    folder = copy_of("tiny-llava-onevision", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    change(folder, num_hidden_layers=config["num_hidden_layers"] - 1)
    assert "fewer layers than the weights have" in refused(tree, folder)
    change(folder, num_hidden_layers=config["num_hidden_layers"], intermediate_size=2 * config["intermediate_size"])
    assert "of the wrong shape (first: model.layers.0.mlp." in refused(tree, folder)
    assert "LOAD REPORT" not in caplog.text
    change(folder, intermediate_size="big")
    assert "cannot use the config" in refused(tree, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.surprise": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    change(folder, intermediate_size=config["intermediate_size"])
    assert "model.surprise" in refused(tree, folder)


def test_damaged_tokenizer_and_tower(tmp_path):
    folder = copy_of("tiny-llava-1.5", tmp_path)
    (folder / "tokenizer.model").write_bytes(b"hello")
    assert refused(load_tokenizer, folder).startswith(f"cannot read {folder / 'tokenizer.model'}: ")
    (folder / "tokenizer.model").unlink()
    assert "no tokenizer in" in refused(tree, folder)
    (folder / "vision_tower" / "config.json").write_text("")
    assert "vision_tower/config.json: it is empty" in refused(tower_config, "x", str(folder))


# -- the hub -----------------------------------------------------------------------------------------------------------


def response(status):
    httpx = pytest.importorskip("httpx")
    return httpx.Response(status, request=httpx.Request("HEAD", "http://hub.invalid"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: hub.LocalEntryNotFoundError("Cannot find\nit"), r"does not answer|HF_HUB_OFFLINE is set"),
        (lambda: hub.RepositoryNotFoundError("401", response=response(401)), "no such repository"),
        (lambda: hub.GatedRepoError("403", response=response(403)), "hf auth login"),
        (lambda: ConnectionError("refused\nagain"), "the hub says: refused again"),
        (lambda: hub.HFValidationError("bad name"), "the hub says: bad name"),
    ],
)
def test_hub_that_cannot_be_reached(monkeypatch, error, said):
    """Never "it has no config.json": nobody has looked."""

    def fails(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    for call, args in ((read_config, ["org/name"]), (load_tokenizer, ["org/name"]), (tree, ["org/name"])):
        message = refused(call, *args)
        assert message.startswith("cannot reach checkpoint 'org/name'") and re.search(said, message)
    with pytest.raises(TowerError, match=f"no folder 'vision_tower'.*{said}") as caught:
        tower_config("org/name", None)
    assert "\n" not in str(caught.value)


def test_file_that_the_hub_does_not_have(monkeypatch, tmp_path):
    """A file beside those that were downloaded is missing, offline as well as online."""

    def absent(*args, **kwargs):
        raise hub.EntryNotFoundError("404")

    def unreachable(*args, **kwargs):
        raise hub.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    assert find_file("org/name", "tokenizer.model") is None
    assert "it has no config.json" in refused(read_config, "org/name")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert find_file("org/name", "tokenizer.model") is None


def test_errors_of_checkpoints_are_those_of_the_toolkit():
    """So that every command that catches the one catches the other; as before they are RuntimeErrors."""
    assert issubclass(TowerError, CheckpointError) and issubclass(CheckpointError, MethodError)
    assert issubclass(CheckpointError, RuntimeError)
