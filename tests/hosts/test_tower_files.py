"""Names and structures of towers."""

import pytest

from accelerate_methods.hosts.tower_files import TowerError, official_name, text_config, tower_config
from tests.support.paths import GOLDEN


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("playground/models/siglip-so400m-patch14-384", "google/siglip-so400m-patch14-384"),
        ("/mnt/models/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("./clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336"),
        ("someone/clip-vit-large-patch14-336", "someone/clip-vit-large-patch14-336"),
        ("/mnt/models/clip-vit-huge", "/mnt/models/clip-vit-huge"),
    ],
)
def test_paths_of_the_training_machine_stand_for_official_towers(name, expected):
    assert official_name(name) == expected


def test_a_path_that_is_here_is_what_it_is(tmp_path):
    folder = tmp_path / "clip-vit-large-patch14-336"
    folder.mkdir()
    assert official_name(str(folder)) == str(folder)


@pytest.mark.parametrize(
    ("name", "widths"),
    [("google/siglip-so400m-patch14-384", (1152, 1152)), ("openai/clip-vit-large-patch14-336", (1024, 768))],
)
def test_both_halves_of_official_towers_are_known_without_the_hub(name, widths):
    path = f"/nowhere/{name.rpartition('/')[2]}"
    assert (tower_config(path, None).hidden_size, text_config(path, None)["hidden_size"]) == widths


def test_the_text_half_of_a_folder():
    folder = GOLDEN / "hicom/tiny_hicom"
    assert text_config("anything", str(folder))["vocab_size"] == 64


def test_a_vision_tower_alone_has_no_text_half(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(TowerError, match="a vision tower without its text tower"):
        text_config(str(tmp_path), None)
