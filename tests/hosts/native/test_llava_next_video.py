"""LLaVA-NeXT-Video of transformers: a tiny model made from a config, against its own language model on a cut prompt."""

import functools
import math

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from accelerate_methods import MethodError, accelerate, available, detach, record
from accelerate_methods.registry import method_class
from accelerate_methods.registry.compatibility import FAMILIES, why_not
from accelerate_methods.stages.compress import ViewCompressMethod, VisualItem
from tests.support import hand_cut
from tests.support.configured import configured

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE, PATCH, NEW = 56, 7, 4  # 8 x 8 patches per view, 4 x 4 tokens per frame
IMAGE, VIDEO = 90, 91
GRID = (2 * SIDE, SIDE)  # (height, width): the one resolution beside the whole view
CLIP = next(f for f in FAMILIES if f.name == "LLaVA-NeXT")  # the same signals


@functools.cache
def tiny(mode="average", stride=2):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE,
        patch_size=PATCH, projection_dim=16,
    )  # fmt: skip
    config = LlavaNextVideoConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[list(GRID), [SIDE, 2 * SIDE]], spatial_pool_mode=mode, spatial_pool_stride=stride,
    )  # fmt: skip
    model = LlavaNextVideoForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 2
    for parameter in model.parameters():  # larger weights, so that answers differ between prompts
        parameter.data.mul_(3.0) if parameter.ndim > 1 else None
    return model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    model = tiny()
    yield model
    detach(model)


SIZES = [(100, 50), (60, 80)]  # (height, width): tall and wide
QUESTIONS = {
    "image": [5, "i0", 6, 7],
    "two images": ["i0", 8, "i1", 9],
    "video": [5, 6, "v0", 7],
    "two videos": [5, "v0", 6, "v1", 9],
    "image and video": [5, "v0", 11, "i1", 7, 8],
    "text": [5, 6, 7, 8],
}
BATCH = ["image and video", "text", "video", "image"]
FRAMES = 3


def video_length(model):
    side = SIDE // PATCH // model.config.spatial_pool_stride
    return FRAMES * side * side


def image_length(size):
    """One view of 8 x 8, then two views unpadded to the image's shape with a newline after every row."""
    height, width = size
    rows, columns = (16, 8) if height > width else (8, 16)
    if width / height > columns / rows:
        rows -= (rows - int(height * columns / width)) // 2 * 2
    else:
        columns -= (columns - int(width * rows / height)) // 2 * 2
    return 64 + rows * (columns + 1)


def inputs(model, *names, left=True):
    rows, images, sizes, videos = [], [], [], []
    generator = torch.Generator().manual_seed(3)
    for name in names:
        row = []
        for part in QUESTIONS[name]:
            if isinstance(part, int):
                row.append(part)
            elif part[0] == "v":
                row += [VIDEO] * video_length(model)
                videos.append(torch.randn(FRAMES, 3, SIDE, SIDE, generator=generator.manual_seed(int(part[1]))))
            else:
                size = SIZES[int(part[1])]
                row += [IMAGE] * image_length(size)
                sizes.append(size)
                images.append(torch.randn(3, 3, SIDE, SIDE, generator=generator.manual_seed(10 + int(part[1]))))
        rows.append(row)
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    both = list(zip(pads, rows, strict=True))
    out = {
        "input_ids": torch.tensor([pad + row if left else row + pad for pad, row in both]),
        "attention_mask": torch.tensor(
            [[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for p, r in both]
        ),
    }
    if images:
        out |= {"pixel_values": torch.stack(images), "image_sizes": torch.tensor(sizes)}
    if videos:
        out["pixel_values_videos"] = torch.stack(videos)
    return out


def greedy(model, asked, **more):
    out = model.generate(**asked, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **more)
    return out[:, asked["input_ids"].shape[1] :]


# -- what stands where, worked out apart from the host -----------------------------------------------------------------


def blocks(ids, token, lengths):
    rows = (ids == token).nonzero().flatten()
    return list(rows.split(lengths))


def video_items(model, asked, dense, sample, name):
    """(rows, item) of the videos of one prompt, with signals from transformers' own eager attention."""
    ids = asked["input_ids"][sample]
    count = sum(isinstance(part, str) and part[0] == "v" for part in QUESTIONS[name])
    before = sum(isinstance(p, str) and p[0] == "v" for n in asked["names"][:sample] for p in QUESTIONS[n])
    out = []
    for number, rows in enumerate(blocks(ids, VIDEO, [video_length(model)] * count) if count else []):
        per_frame = video_length(model) // FRAMES
        side = int(per_frame**0.5)
        item = VisualItem(
            modality="video",
            features=dense.embeds[sample, rows].view(FRAMES, per_frame, -1),
            positions=torch.arange(FRAMES * per_frame).view(FRAMES, -1),
            length=FRAMES * per_frame,
            grid=(side, side),
            signals=video_signals(model, asked["pixel_values_videos"][before + number]),
        )
        out.append((rows, item))
    return out


def video_signals(model, frames):
    """Attention of the CLS token and keys, by the tower with eager attention, then pooled."""
    tower = model.model.vision_tower
    layer, following = tower.encoder.layers[-2:]  # the first one's output is what the projector gets
    seen, hooks = {}, []
    for name, module in {
        "states": layer.self_attn.k_proj, "keys": following.self_attn.k_proj, "queries": following.self_attn.q_proj
    }.items():  # fmt: skip
        hooks.append(module.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]})))
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    attentions = tower(frames, output_attentions=True).attentions
    tower.set_attn_implementation(before)
    for hook in hooks:
        hook.remove()
    attention, middle = attentions[-2], attentions[math.ceil(0.375 * len(attentions)) - 1]
    states = seen["states"].unflatten(-1, (3, -1)).mean(2)
    joined = (seen["queries"] @ seen["keys"].mT / seen["keys"].shape[-1] ** 0.5).softmax(-1)

    def pooled(patches):
        mode = {"average": torch.nn.functional.avg_pool2d, "max": torch.nn.functional.max_pool2d}
        maps = patches.unflatten(1, (SIDE // PATCH, -1)).permute(0, 3, 1, 2)
        pool = mode[model.config.spatial_pool_mode]
        return pool(maps, model.config.spatial_pool_stride).flatten(2).transpose(1, 2)

    received = attention.mean((1, 2))[:, 1:]
    return {
        "cls_attention": pooled(attention[:, :, 0, 1:].mean(1)[..., None])[..., 0],
        "received_attention": pooled(received[..., None])[..., 0],
        "key_states": pooled(states[:, 1:]),
        "received_attention@0.375": pooled(middle.mean((1, 2))[:, 1:, None])[..., 0],
        "cls_attention@next/joined": pooled(joined[:, 0, 1:, None])[..., 0],
        "key_states@next/joined": pooled(seen["keys"][:, 1:]),
    }


# -- the uncompressed model --------------------------------------------------------------------------------------------

FITTING = [
    name
    for name in available()
    if "sample" not in method_class(name).class_stages()
    and why_not(method_class(name), CLIP) in (None, "acts on video only")
]


@pytest.mark.parametrize("name", QUESTIONS)
def test_without_a_method_nothing_changes(name, model):
    asked = inputs(model, name)
    expected, ids = model(**asked).logits, greedy(model, asked)
    with accelerate(model, None), record() as requests:
        assert torch.equal(model(**asked).logits, expected)
        assert torch.equal(greedy(model, asked), ids)
    kinds = [{"i": "image", "v": "video"}[p[0]] for p in QUESTIONS[name] if isinstance(p, str)]
    assert [item.modality for item in requests[0].samples[0].items] == kinds
    assert requests[0].samples[0].dense_length == asked["input_ids"].shape[1]


@pytest.mark.share(3, each=("method",))
@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("method", [m for m in FITTING if "retention_ratio" in method_class(m).parameters()])
def test_a_full_budget_is_the_uncompressed_model(method, name, model):
    asked = inputs(model, name)
    expected, ids = model(**asked).logits, greedy(model, asked)
    with accelerate(model, configured(method, 1.0)):
        got = model(**asked).logits
        assert torch.equal(greedy(model, asked), ids)
    has_images = any(part[0] == "i" for part in QUESTIONS[name] if isinstance(part, str))
    if has_images and issubclass(method_class(method), ViewCompressMethod):
        # an image's views go to the projector another way, which rounds otherwise; VisionZip keeps CLS tokens besides
        torch.testing.assert_close(got[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(got, expected)


# -- compressed prompts ------------------------------------------------------------------------------------------------

#: those that need no part of them inside the vision encoder
COMPRESSING = [m for m in FITTING if {"compress", "encode"} & {*method_class(m).class_stages()} == {"compress"}]
#: without what they do inside the decoder, or read of the prompt
OFF = {
    "cdpruner": {"relevance": "none"},
    "dycoke": {"dp": False},
    "flashvid": {"llm_retention_ratio": 1.0},
    "holitom": {"inner": False},
    "prunevid": {"selection": False},
}


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize("mode", ["average", "max"])
@pytest.mark.parametrize("name", ["video", "two videos"])
@pytest.mark.parametrize("method", COMPRESSING)
def test_a_compressed_prompt_is_the_hand_cut_one(method, name, mode):
    model, method = tiny(mode), configured(method, **OFF.get(method, {}))
    asked = inputs(model, name)
    dense = hand_cut.dense_inputs(model, asked)
    items = video_items(model, {**asked, "names": [name]}, dense, 0, name)
    expected = hand_cut.cut(dense, 0, items, method)
    assert len(expected.source) < asked["input_ids"].shape[1]
    logits, ids = hand_cut.language_model(model, expected, NEW)
    with accelerate(model, method), record() as requests:
        out = model(**asked).logits
        got = greedy(model, asked)
    assert out.shape[1] == len(expected.source) == requests[0].samples[0].length
    torch.testing.assert_close(out[0, -1], logits[0], atol=1e-4, rtol=1e-4)
    assert got[0].tolist() == ids
    for item, (_, before) in zip(requests[0].samples[0].items, items, strict=True):
        compressed = method.compress(before)
        assert torch.equal(item.owner >= 0, compressed.owner >= 0)
        assert item.tokens_after == len(compressed.tokens)


@pytest.mark.parametrize("method", ["random", "uniform", "pool"])
@pytest.mark.parametrize("name", ["image", "image and video"])
def test_images_are_laid_out_as_in_llava_next(method, name, model):
    """The content of an image: the whole view, then the rows of the tiles without the newlines between them."""
    asked = inputs(model, name)
    with accelerate(model, configured(method, 0.4)), record() as requests:
        out = model(**asked).logits
    ids = asked["input_ids"][0]
    number = int(next(p for p in QUESTIONS[name] if isinstance(p, str) and p[0] == "i")[1])
    rows = (ids == IMAGE).nonzero().flatten()
    newline = model.model.image_newline
    dense = hand_cut.dense_inputs(model, asked)
    is_newline = (dense.embeds[0, rows] == newline).all(-1)
    assert not is_newline[:64].any() and is_newline[-1]
    item = next(i for i in requests[0].samples[0].items if i.modality == "image")
    assert item.tokens_before == int((~is_newline).sum()) == image_length(SIZES[number]) - int(is_newline.sum())
    # what stays is a token of the prompt, at its place: compare with the rows that the record names
    if method != "pool":
        kept = item.positions
        assert (~is_newline[kept]).sum() == item.tokens_after
        text = [r for r in range(len(ids)) if ids[r] not in (IMAGE, VIDEO)]
        source = [*text, *rows[kept].tolist()]
        if name == "image and video":
            video = next(i for i in requests[0].samples[0].items if i.modality == "video")
            source += (ids == VIDEO).nonzero().flatten()[video.positions].tolist()
        source = torch.tensor(sorted(source))
        original = method_class(method).positions == "original"
        where = source if original else torch.arange(len(source))
        by_hand = hand_cut.Cut(dense.embeds[0, source], where[None], source, [], len(source))
        logits, _ = hand_cut.language_model(model, by_hand, 1)
        torch.testing.assert_close(out[0, -1], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [*FITTING, "visionzip+fastv"])
def test_a_batch_is_each_prompt_alone(method, model):
    method = method if "+" in method else configured(method, 0.4)
    with accelerate(model, method), record() as requests:
        together = greedy(model, inputs(model, *BATCH))
        right = model(**inputs(model, *BATCH, left=False)).logits
        for row, name in enumerate(BATCH):
            assert torch.equal(together[row : row + 1], greedy(model, inputs(model, name)))
            (logits,), alone = model(**inputs(model, name)).logits, requests[-1]
            # padding stays on the caller's side
            torch.testing.assert_close(right[row, len(logits) - 1], logits[-1], atol=1e-4, rtol=1e-4)
            for request in requests[:2]:
                assert request.layer_lengths(row) == alone.layer_lengths(0)
                for item, same in zip(request.samples[row].items, alone.samples[0].items, strict=True):
                    assert torch.equal(item.left_at, same.left_at) and torch.equal(item.owner, same.owner)


@pytest.mark.parametrize("method", ["visionzip", "fastv", "prunevid"])
def test_beams(method, model):
    """All beams of a single prompt see its own video: with one beam kept, a beam search of width 1 is greedy."""
    asked = inputs(model, "two videos", "video")
    with accelerate(model, configured(method, 0.4)):
        together = greedy(model, asked, num_beams=3)
        for row, name in enumerate(("two videos", "video")):
            assert torch.equal(together[row : row + 1], greedy(model, inputs(model, name), num_beams=3))


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_other_strides_of_the_pooling(method):
    model = tiny("average", 4)
    asked = inputs(model, "image and video")
    plain = model(**asked).logits
    with accelerate(model, configured(method, 1.0)):
        assert torch.equal(model(**asked).logits, plain)
    with accelerate(model, configured(method, 0.5)), record() as requests:
        assert torch.isfinite(model(**asked).logits).all()
    assert requests[0].samples[0].items[0].owner.shape == (FRAMES, 4)


def test_a_learned_pooling(model):
    """Signals of a learned pooling are averaged over the patches that it weighs."""
    learned = tiny("conv")
    asked = inputs(learned, "video")
    with accelerate(learned, configured("visionzip", 0.4)), record() as requests:
        learned(**asked)
    expected = video_signals(model, asked["pixel_values_videos"][0])["cls_attention"]
    tower = learned.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[key]) for key, value in model.model.vision_tower.state_dict().items())
    dominant = requests[0].samples[0].items[0].kept
    assert dominant.shape == expected.shape and dominant.any()
    detach(learned)


def test_what_cannot_be_done(model, monkeypatch):
    plain = model(**inputs(model, "video")).logits
    with pytest.raises(MethodError, match="fastvid needs frame_features, pooling_attention"):
        accelerate(model, "fastvid")
    with pytest.raises(MethodError, match="downsample acts at the sample stage"):
        accelerate(model, configured("downsample"))
    monkeypatch.setattr(model.config, "spatial_pool_mode", "median")
    with pytest.raises(MethodError, match=r"does not pool its frames as this host expects.*'median'"):
        accelerate(model, "fastv")
    monkeypatch.undo()
    resampler = model.model._modules.pop("vision_resampler")
    with pytest.raises(MethodError, match="does not pool its frames"):
        accelerate(model, "fastv")
    model.model.vision_resampler = resampler
    assert torch.equal(model(**inputs(model, "video")).logits, plain)


def test_every_method_is_covered():
    no_signals = {"fastvid", "pixelprune"}
    assert set(FITTING) | no_signals | {"downsample", "fewer_frames", "aks"} == set(available())
