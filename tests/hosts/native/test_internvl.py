"""InternVL of transformers: compressed prompts equal the uncompressed model on a hand-cut one."""

import dataclasses
import functools
import math
from typing import ClassVar

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

import accelerate_methods
from accelerate_methods import MethodError, accelerate, detach, record
from accelerate_methods.stages.compress import CompressMethod, VisualItem, selection
from accelerate_methods.stages.signals import Signal
from tests.support.configured import configured
from tests.support.hand_cut import cut, dense_inputs, language_model, layer_by_layer

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGE, START, END, NEW = 90, 91, 92, 4
SIDE, PER_TILE = 32, 16  # pixels of a tile: 8 x 8 patches, 4 x 4 tokens

#: what a processor makes of them: an image with its tiles and thumbnail is one run, a frame of a video a run of its own
QUESTIONS = {
    "image": (5, 6, 1, 30, 31),
    "tiled image": (5, 4, 30, 31),
    "two images": (5, 3, 8, 2, 30),
    "frames": (5, 21, 1, 5, 22, 1, 5, 23, 1, 30),
}
WHERE = {"image": (2,), "tiled image": (1,), "two images": (1, 3), "frames": (2, 5, 8)}
BATCH = ("two images", "text", "image", "frames")
COMPRESSING = (
    *("random", "uniform", "pool", "visionzip", "fastervlm"),
    *("divprune", "vispruner", "prumerge", "prumerge_plus", "hiprune", "scope", "mmtok"),
)


@functools.cache
def internvl(variant="plain"):
    """Random weights; "6b" has the norms of the large tower, "middle" takes features of another layer."""
    vision = {
        **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64},
        **{"image_size": [SIDE, SIDE], "patch_size": [4, 4], "attention_bias": variant != "6b"},
        **{"use_qk_norm": variant == "6b", "norm_type": "rms_norm" if variant == "6b" else "layer_norm"},
        **{"use_mean_pooling": variant != "6b", "initializer_range": 0.3, "layer_scale_init_value": 0.5},
    }
    text = {
        **{"model_type": "qwen2", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 4096},
    }
    config = InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=PER_TILE,
        vision_feature_layer=-2 if variant == "middle" else -1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = InternVLForConditionalGeneration(config).eval()
        # these are drawn as zeros and ones, which would make all places and heads alike
        for name, parameter in model.model.vision_tower.named_parameters():
            if parameter.ndim == 1 or "embeddings." in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=["plain", "6b", "middle"])
def model(request):
    model = internvl(request.param)
    yield model
    detach(model)


def tiles_of(name):
    """Tiles of each image."""
    return [QUESTIONS[name][at] for at in WHERE.get(name, ())]


def written(name):
    if name == "text":
        return [5, 6, 7, 8]
    ids = []
    for at, part in enumerate(QUESTIONS[name]):
        ids += [START, *[IMAGE] * (part * PER_TILE), END] if at in WHERE[name] else [part]
    return ids


def inputs(*names, seed=0):
    rows = [written(name) for name in names]
    longest = max(map(len, rows))
    count = sum(tiles for name in names for tiles in tiles_of(name))
    out = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    if count:
        draw = torch.Generator().manual_seed(seed)
        out["pixel_values"] = torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return out


def greedy(model, asked):
    new = model.generate(**asked, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return new[:, asked["input_ids"].shape[1] :]


def naive_signals(model, pixels):
    """[V, N, ...]: of the layer whose output is projected, and of the others that methods ask for."""
    depth = len(model.model.vision_tower.encoder.layer)
    feature = depth + model.config.vision_feature_layer
    of_next = signals_of_layer(model, pixels, min(feature + 1, depth - 1))
    middle = signals_of_layer(model, pixels, math.ceil(0.375 * depth) - 1)
    plain = {k: v for k, v in signals_of_layer(model, pixels, feature).items() if "@" not in k}
    joined = {k: v for k, v in of_next.items() if "@" in k}
    return plain | joined | {"received_attention@0.375": middle["received_attention"]}


@torch.no_grad()
def signals_of_layer(model, pixels, index):
    """[V, N, ...]: attention maps of one layer, in blocks of the model's own shuffle."""
    tower = model.model.vision_tower
    layers = tower.encoder.layer
    attention = layers[index].attention
    caught = {}
    hook = attention.register_forward_hook(
        lambda module, args, kwargs, output: caught.update(states=args[0], output=output[0]), with_kwargs=True
    )
    tower(pixels)
    hook.remove()
    split = (attention.num_heads, attention.head_dim)
    query, key = (
        norm(projection(caught["states"])).unflatten(-1, split).transpose(1, 2)
        for norm, projection in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj))
    )
    value = attention.v_proj(caught["states"]).unflatten(-1, split).transpose(1, 2)
    maps = (query @ key.transpose(2, 3) / attention.head_dim**0.5).softmax(-1)
    mixed = attention.projection_layer((maps @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, caught["output"], atol=1e-4, rtol=1e-4)

    whole = [states.transpose(1, 2).flatten(2) for states in (query, key)]
    joined = (whole[0] @ whole[1].mT / whole[0].shape[-1] ** 0.5).softmax(-1)

    def blocks(values):  # [V, P, d]: every token's four patches, side by side as the projector gets them
        side = SIDE // 4
        shuffled = model.model.pixel_shuffle(values.unflatten(1, (side, side)).contiguous(), 0.5)
        return shuffled.flatten(1, 2).unflatten(-1, (4, values.shape[-1])).mean(2)

    return {
        "cls_attention": blocks(maps.mean(1)[:, 0, 1:, None])[..., 0],
        "received_attention": blocks(maps.mean((1, 2))[:, 1:, None])[..., 0],
        "key_states": blocks(key.mean(1)[:, 1:]),
        "cls_attention@next/joined": blocks(joined[:, 0, 1:, None])[..., 0],
        "key_states@next/joined": blocks(whole[1][:, 1:]),
    }


def items(model, asked, dense, names, sample):
    """(rows, item with naive signals) of every image of one sample."""
    if not tiles_of(names[sample]):
        return []
    signals = naive_signals(model, asked["pixel_values"])
    first = sum(tiles for name in names[:sample] for tiles in tiles_of(name))
    at = (asked["input_ids"][sample] == IMAGE).nonzero().flatten()
    out = []
    for tiles in tiles_of(names[sample]):
        rows, at = at[: tiles * PER_TILE], at[tiles * PER_TILE :]
        item = VisualItem(
            modality="image",
            features=dense.embeds[sample, rows].view(tiles, PER_TILE, -1),
            positions=torch.arange(len(rows)).view(tiles, -1),
            length=len(rows),
            layout="grid",
            grid=(4, 4),
            signals={name: value[first : first + tiles] for name, value in signals.items()},
        )
        first += tiles
        out.append((rows, item))
    return out


def by_hand(model, names, method):
    asked = inputs(*names)
    dense = dense_inputs(model, asked)
    return [cut(dense, b, items(model, asked, dense, names, b), method) for b in range(len(names))]


@pytest.mark.parametrize("names", [*((name,) for name in QUESTIONS), ("text",), BATCH], ids="+".join)
@pytest.mark.parametrize("method", ["dense", "random", "fastv", "visionzip"])
def test_at_full_retention_every_number_is_that_of_the_model(model, names, method):
    asked = inputs(*names)
    params = {} if method == "dense" else {"retention_ratio": 1.0}
    real = asked["attention_mask"].bool()
    places = (real.long().cumsum(1) - 1).clamp(min=0)  # as generate gives them; forward would count padding, too
    with torch.no_grad():
        before, ids = model(**asked, position_ids=places).logits, greedy(model, asked)
        with accelerate(model, method, **params):
            after = model(**asked, position_ids=places).logits
            assert torch.equal(greedy(model, asked), ids)
        assert torch.equal(model(**asked, position_ids=places).logits, before)  # detached
    assert torch.equal(after[real], before[real])


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("method", COMPRESSING)
def test_a_compressed_prompt_is_the_hand_cut_one(model, method, name):
    method = configured(method)
    (expected,) = by_hand(model, [name], method)
    asked = inputs(name)
    logits, ids = language_model(model, expected, NEW)
    with torch.no_grad(), accelerate(model, method), record() as requests:
        out, generated = model(**asked), greedy(model, asked)
    assert out.logits.shape[1] == len(expected.source) == requests[0].samples[0].length < asked["input_ids"].shape[1]
    torch.testing.assert_close(out.logits[0, -1], logits[0], atol=2e-5, rtol=1e-4)
    assert generated[0].tolist() == ids


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize("method", COMPRESSING)
def test_a_padded_batch_equals_its_samples(model, method):
    method, asked = configured(method), inputs(*BATCH)
    with torch.no_grad(), accelerate(model, method):
        logits, generated = model(**asked).logits[:, -1], greedy(model, asked)
    for sample, expected in enumerate(by_hand(model, BATCH, method)):
        wanted, ids = language_model(model, expected, NEW)
        torch.testing.assert_close(logits[sample], wanted[0], atol=5e-5, rtol=1e-4)
        assert generated[sample].tolist() == ids


def beams(model, asked):
    """Scores [B] and ids of the best of three beams."""
    out = model.generate(
        **asked, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=3, do_sample=False, pad_token_id=0,
        length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    return out.sequences_scores, out.sequences[:, asked["input_ids"].shape[1] :].tolist()


def scored_by_hand(model, names, method, ids):
    scores = []
    for expected, own in zip(by_hand(model, names, method), ids, strict=True):
        logits, _ = language_model(model, expected, NEW, forced=own)
        scores.append(logits.log_softmax(-1)[range(NEW), own].sum())
    return torch.stack(scores)


@pytest.mark.parametrize("names", [("image",), ("two images", "image", "tiled image")], ids="+".join)
def test_beams_score_what_the_hand_cut_prompt_scores(model, names):
    method, asked = configured("visionzip"), inputs(*names)
    scores, ids = beams(model, asked)
    if not torch.allclose(scores, scored_by_hand(model, names, None, ids), atol=1e-4):
        assert len(names) > 1
        pytest.skip("this version of transformers mixes up the tiles of samples in a beam search, attached or not")
    with torch.no_grad(), accelerate(model, method):
        scores, ids = beams(model, asked)
    torch.testing.assert_close(scores, scored_by_hand(model, names, method, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", QUESTIONS)
def test_fastv_keeps_what_the_last_prompt_token_attends_to(model, name):
    layer, ratio, asked = 2, 0.3, inputs(name)
    with torch.no_grad(), accelerate(model, "fastv", k=layer, retention_ratio=ratio), record() as requests:
        logits, generated = model(**asked).logits[0, -1], greedy(model, asked)[0].tolist()
    (whole,) = by_hand(model, [name], None)
    _, _, maps = layer_by_layer(model, whole, 1)
    visual = (asked["input_ids"][0] == IMAGE).nonzero().flatten()
    scores = maps[layer - 1][:, -1].mean(0)[visual]
    wanted = visual[scores.topk(round(len(visual) * ratio)).indices].tolist()
    dropped = sorted(set(visual.tolist()) - set(wanted))
    expected, ids, _ = layer_by_layer(model, whole, NEW, {layer: dropped})
    torch.testing.assert_close(logits, expected[0], atol=2e-5, rtol=1e-4)
    assert generated == ids
    full = asked["input_ids"].shape[1]
    assert requests[0].layer_lengths(0) == [full] * layer + [full - len(dropped)] * (len(maps) - layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(CompressMethod):
    """Keeps everything and remembers what it was given."""

    name: ClassVar[str] = "probe"
    signals: ClassVar[frozenset[str]] = frozenset(
        {
            "cls_attention", "received_attention", "key_states", Signal("received_attention", 0.375),
            Signal("cls_attention", "next", "joined"), Signal("key_states", "next", "joined"),
        }
    )  # fmt: skip
    given: list = dataclasses.field(default_factory=list)

    def compress(self, item):
        self.given.append(item)
        return selection(item, torch.arange(item.num_tokens))


def test_signals_are_those_of_full_attention_maps(model):
    asked, probe = inputs(*BATCH), Probe()
    with torch.no_grad(), accelerate(model, probe):
        model(**asked)
    dense = dense_inputs(model, asked)
    expected = [item for b in range(len(BATCH)) for _, item in items(model, asked, dense, BATCH, b)]
    assert [item.num_frames for item in probe.given] == [tiles for name in BATCH for tiles in tiles_of(name)]
    for got, wanted in zip(probe.given, expected, strict=True):
        assert got.grid == (4, 4)
        torch.testing.assert_close(got.features, wanted.features, atol=0, rtol=0)
        assert set(got.signals) == probe.signals >= set(wanted.signals)
        for name, value in wanted.signals.items():
            torch.testing.assert_close(got.signals[name], value, atol=1e-5, rtol=1e-4)


def test_visionzip_reads_the_cls_token_and_treats_tiles_as_views(model):
    method = accelerate_methods.get("visionzip", dominant=3, contextual=2)
    with torch.no_grad(), accelerate(model, method) as acceleration, record() as requests:
        model(**inputs("tiled image"))
    assert not acceleration.adaptations
    (item,) = requests[0].samples[0].items
    assert (item.tokens_before, item.tokens_after) == (4 * PER_TILE, 4 * 5)
    assert item.kept.sum(1).tolist() == [5] * 4


def test_records_count_tokens_of_each_sample(model):
    asked = inputs(*BATCH)
    with torch.no_grad(), accelerate(model, "random", retention_ratio=0.25), record() as requests:
        greedy(model, asked)
    (request,) = requests
    assert request.decode_steps == NEW - 1
    for number, (sample, name) in enumerate(zip(request.samples, BATCH, strict=True)):
        dense, before = int(asked["attention_mask"][number].sum()), [tiles * PER_TILE for tiles in tiles_of(name)]
        assert [item.tokens_before for item in sample.items] == before
        assert [item.tokens_after for item in sample.items] == [n // 4 for n in before]
        assert (sample.dense_length, sample.length) == (dense, dense - sum(before) * 3 // 4)


@pytest.mark.parametrize("method", ["fastvid", "dycoke", "prunevid"])
def test_methods_for_videos_are_refused_with_the_reason(method):
    model = internvl()
    with pytest.raises(MethodError, match=r"frame_features|video"):
        accelerate(model, method)
    assert "acceleration" not in model.__dict__ and "forward" not in model.__dict__


def test_dycoke_is_told_why():
    with pytest.raises(MethodError, match="frames of a video reach an InternVL model as images"):
        accelerate(internvl(), "dycoke")


def test_other_towers_are_refused():
    model = internvl()
    strategy, model.config.vision_feature_select_strategy = model.config.vision_feature_select_strategy, "full"
    try:
        with pytest.raises(MethodError, match="vision_feature_select_strategy='full'"):
            accelerate(model, "random", retention_ratio=0.5)
    finally:
        model.config.vision_feature_select_strategy = strategy
    assert accelerate_methods.resolve("random", retention_ratio=0.5)  # nothing was left half attached
    with torch.no_grad():
        model(**inputs("image"))


def test_features_of_another_layer_are_refused(model):
    other = -3
    with torch.no_grad(), accelerate(model, "visionzip", retention_ratio=0.5):
        model(**inputs("image"), vision_feature_layer=model.config.vision_feature_layer)
        with pytest.raises(MethodError, match="vision_feature_layer=-3 is not the model's own"):
            model(**inputs("image"), vision_feature_layer=other)
