"""CDPruner beyond its golden vectors."""

import pytest
import torch

import accelerate_methods
from accelerate_methods.cdpruner import diverse_tokens, scaled, similarity
from accelerate_methods.hosts.layouts import video_item
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.stages.views import Views
from tests.support.clip_checkpoints import clip_folder
from tests.support.native_models import expanded, native_model, tree_model


def method(**params):
    return accelerate_methods.get("cdpruner", **params)


def views(count=2, side=4, width=12, seed=0, **signals):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, side * side, width, generator=generator)
    signals = signals or {"prompt_mean": torch.randn(width, generator=generator)}
    return Views(features=features, grid=(side, side), signals=signals, project=lambda tokens: tokens)


def test_relevance_is_scaled_over_all_views():
    relevance = scaled(torch.tensor([[0.0, 1.0], [3.0, 4.0]]))
    torch.testing.assert_close(relevance, torch.tensor([[0.0, 0.25], [0.75, 1.0]]), atol=1e-6, rtol=0)
    assert relevance.min() > 0, "no token's relevance is nothing at all"


def test_alike_everywhere_means_diversity_alone():
    assert torch.equal(scaled(torch.full((2, 3), 0.7)), torch.ones(2, 3))
    tokens = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(1))
    alone = diverse_tokens(tokens, None, 5)
    assert torch.equal(diverse_tokens(tokens, scaled(torch.zeros(1, 20)), 5), alone)


def test_in_clips_space_the_least_similar_patch_comes_first():
    text = torch.tensor([[1.0, 0.0]])
    patches = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    features = torch.eye(3)[None]
    asked = views(1, 1, image_embeds=patches, text_embeds=text)
    asked.features = features
    assert method(visual_token_num=1).compress_views(asked).patch.tolist() == [2]
    assert torch.equal(similarity(patches, text), torch.tensor([[1.0, 0.0, -1.0]]))


def test_in_the_language_models_space_the_most_similar_token_comes_first():
    asked = views(1, 1, prompt_mean=torch.tensor([0.0, 1.0, 0.0]))
    asked.features = torch.eye(3)[None]
    assert method(visual_token_num=1).compress_views(asked).patch.tolist() == [1]


def test_rows_of_a_long_question_count_alike():
    patches = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(2))
    texts = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    each = torch.stack([similarity(patches, text[None]) for text in texts]).mean(0)
    torch.testing.assert_close(similarity(patches, texts), each)


@pytest.mark.parametrize("count", [1, 5, 12, 15, 16, 17])
def test_as_many_as_asked_for_in_every_view(count):
    asked = views(3)
    compressed = method(visual_token_num=count).compress_views(asked)
    if count >= 16:
        assert compressed is None
    else:  # more than the rank of the features, too
        kept = compressed.patch.view(3, count)
        assert (kept[:, 1:] > kept[:, :-1]).all(), "ascending, each once"
        assert torch.equal(compressed.tokens.view(3, count, -1), torch.stack(
            [features[patches] for features, patches in zip(asked.features, kept, strict=True)]
        ))  # fmt: skip


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 0.0])
def test_tokens_that_are_no_numbers_are_kept_last(spoil):
    asked = views(1)
    asked.features[0, 3] = spoil
    for count in (4, 12, 15):
        assert 3 not in method(visual_token_num=count, relevance="none").compress_views(asked).patch.tolist()


def test_frames_keep_their_share_and_the_question_is_the_videos():
    generator = torch.Generator().manual_seed(4)
    item = video_item(torch.randn(3, 9, 6, generator=generator), torch.zeros(6), "one_token", "spatial_unpad")
    item.signals = {"prompt_mean": torch.randn(6, generator=generator)}
    compressed = method(visual_token_num=4).compress(item)
    assert (compressed.owner >= 0).sum(1).tolist() == [4, 4, 4]
    relevance = scaled(similarity(item.features, item.signals["prompt_mean"][None]))
    frames = torch.arange(3)[:, None] * 9
    assert torch.equal(compressed.positions, (diverse_tokens(item.features, relevance, 4) + frames).flatten())


# -- with a text tower -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towered():
    return {"visual_token_num": 9, "text_tower": str(clip_folder("tiny-llava-1.5"))}


QUESTIONS = ["what is in the lake?", "who is she? " * 20]
IDS = torch.tensor([[5, -200, 7, 8], [5, 6, -200, 7]])
PIXELS = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0))


def kept(model, ids, **kwargs):
    with accelerate_methods.record() as requests, torch.no_grad():
        model(input_ids=ids, **kwargs)
    return [item.kept for sample in requests[0].samples for item in sample.items]


def test_every_prompt_is_asked_its_own_question(towered):
    model = tree_model("tiny-llava-1.5")
    with accelerate_methods.accelerate(model, "cdpruner", **towered) as acceleration:
        assert acceleration.adaptations == {}
        both = kept(model, IDS, images=PIXELS, questions=QUESTIONS)
        alone = [kept(model, IDS[i : i + 1], images=PIXELS[i : i + 1], questions=QUESTIONS[i : i + 1]) for i in (0, 1)]
        other = kept(model, IDS, images=PIXELS, questions=QUESTIONS[::-1])
    assert torch.equal(both[0], alone[0][0]) and torch.equal(both[1], alone[1][0])
    assert not torch.equal(both[0], other[0]) and int(both[0].sum()) == 9


def test_images_of_a_prompt_share_its_question(towered):
    model = tree_model("tiny-llava-1.5")
    ids = torch.tensor([[5, -200, 6, -200, 7], [5, -200, 7, 8, 9]])
    pixels = torch.cat([PIXELS, PIXELS[:1]])
    with accelerate_methods.accelerate(model, "cdpruner", **towered):
        first, second, third = kept(model, ids, images=pixels, questions=QUESTIONS)
        same = kept(model, IDS[:1], images=PIXELS[:1], questions=QUESTIONS[:1])[0]
        other = kept(model, IDS[:1], images=PIXELS[1:], questions=QUESTIONS[:1])[0]
        last = kept(model, IDS[:1], images=PIXELS[:1], questions=QUESTIONS[1:])[0]
    assert torch.equal(first, same) and torch.equal(second, other) and torch.equal(third, last)


def test_the_native_model_keeps_what_the_tree_keeps(towered):
    tree, native = tree_model("tiny-llava-1.5"), native_model("tiny-llava-1.5")
    native.model.vision_tower.post_layernorm.load_state_dict(
        tree.get_vision_tower().vision_tower.post_layernorm.state_dict()
    )
    with accelerate_methods.accelerate(tree, "cdpruner", **towered):
        here = kept(tree, IDS[:1], images=PIXELS[:1], questions=QUESTIONS[:1])[0]
    with accelerate_methods.accelerate(native, "cdpruner", **towered) as acceleration:
        ids = expanded([5, 7, 8, 9], 7, 576)
        there = kept(native, ids, pixel_values=PIXELS[:1], questions=QUESTIONS[:1])[0]
        with accelerate_methods.record() as requests:
            native.generate(ids, pixel_values=PIXELS[:1], questions=QUESTIONS[:1], max_new_tokens=1, num_beams=2)
        with pytest.raises(MethodError, match="questions="):
            native.generate(ids, pixel_values=PIXELS[:1], max_new_tokens=1)
        assert acceleration.adaptations == {}
    assert torch.equal(here, there) and torch.equal(there, requests[0].samples[0].items[0].kept)


def test_without_a_question_the_error_names_the_argument(towered):
    model = tree_model("tiny-llava-1.5")
    with accelerate_methods.accelerate(model, "cdpruner", **towered):
        for questions in (None, [""]):
            with pytest.raises(MethodError, match="questions="):
                kept(model, IDS[:1], images=PIXELS[:1], questions=questions)
        with pytest.raises(MethodError, match=r"one text per prompt \(2\)"):
            kept(model, IDS, images=PIXELS, questions=["a", "b", "c"])


def test_without_a_text_tower_it_is_an_adaptation():
    model = tree_model("tiny-llava-1.5")
    with accelerate_methods.accelerate(model, "cdpruner", visual_token_num=9) as acceleration:
        assert set(acceleration.adaptations.values()) == {"prompt_mean"}
        assert int(kept(model, IDS[:1], images=PIXELS[:1])[0].sum()) == 9


def test_another_towers_text_is_refused(tmp_path):
    model = tree_model("tiny-llava-1.5")
    with pytest.raises(MethodError, match="text_tower"):
        accelerate_methods.accelerate(model, "cdpruner", text_tower=str(tmp_path / "nowhere"))
