"""Video-XL: windows, what they leave in the cache, its checkpoints, and methods on it."""

import copy
import json
import shutil

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from accelerate_methods import MethodError, accelerate, available, record
from accelerate_methods.engine.long_prompts import LongPromptError
from accelerate_methods.engine.recording import new_request
from accelerate_methods.registry.compatibility import runs_on
from accelerate_methods.stages.compress import ViewCompressMethod
from llava.conversation import conv_templates
from llava.model.architectures import architecture_of
from llava.model.architectures.video_xl import VideoXLForCausalLM
from llava.model.architectures.video_xl.windows import Settings, entries_of, pieces_of, summaries_of
from llava.model.checkpoint import CheckpointError
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from tests.support.configured import configured
from tests.support.paths import GOLDEN
from tests.support.several_devices import SeveralDevices

FOLDER = GOLDEN / "video_xl/tiny_videoxl"
IMAGE = -200
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
pytestmark = pytest.mark.usefixtures("no_grad")


def load(folder=FOLDER, dtype=torch.float32, **how):
    return VideoXLForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


@pytest.fixture(scope="module")
def model():
    """With windows of two frames, so that short clips have several."""
    loaded = load()
    loaded.config.beacon_window = loaded.config.beacon_stride = 288
    return loaded


def clip(frames, seed=0):
    """[F, 3, 336, 336] of few numbers."""
    coarse = torch.randn(frames, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return coarse.repeat_interleave(14, 2).repeat_interleave(14, 3)


def written(target, weights=None, **keys):
    """The checkpoint with other weights or config keys."""
    config = json.loads((FOLDER / "config.json").read_text("utf-8")) | keys
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copytree(FOLDER / "vision_tower", target / "vision_tower")
    save_file(load_file(FOLDER / "model.safetensors") if weights is None else weights, target / "model.safetensors")
    return target


# -- windows -----------------------------------------------------------------------------------------------------------


@given(
    texts=st.lists(st.integers(0, 30), min_size=2, max_size=4),
    visual=st.integers(1, 70),
    window=st.integers(1, 40),
    ratio=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_pieces_cover_the_prompt_and_a_summary_follows_every_so_many_tokens(texts, visual, window, ratio):
    visuals, row = [], 0
    for text in texts[:-1]:
        visuals.append((row + text, visual))
        row += text + visual
    length = row + texts[-1]
    pieces = pieces_of(length, visuals, Settings(window=window, ratios=(ratio,)))
    assert [row for piece in pieces for row in range(piece.start, piece.start + piece.rows)] == list(range(length))
    assert summaries_of(pieces) == [visual // ratio] * len(visuals)
    assert entries_of(pieces) == sum(texts) + len(visuals) * (visual // ratio)
    cached = 0
    for piece in pieces:
        assert piece.cached == cached
        cached += piece.left
        if piece.ratio is None:
            continue
        inputs = range(piece.rows + piece.summaries)
        slots = [j for j in inputs if j % (ratio + 1) == ratio - piece.offset] if piece.summaries else []
        assert list(inputs)[piece.slots] == slots and len(slots) == piece.summaries and piece.rows <= window


def test_the_size_of_released_settings():
    released = Settings(window=1440, ratios=(8,))
    (summaries,) = summaries_of(pieces_of(14 + 900 * 144 + 20, [(14, 900 * 144)], released))
    assert summaries == 16200


def ratios(mix, rows=240, length=300, **more):
    pieces = pieces_of(length, [(4, rows)], Settings(window=48, ratios=(2, 4, 8), mix=mix, **more))
    return [piece.ratio for piece in pieces if piece.ratio is not None]


def test_how_one_of_several_ratios_is_chosen():
    assert ratios("step-random") == ratios("step-random") == [2, 8, 4, 4, 4]
    assert ratios("instance-random") == [2] * 5
    assert ratios("instance-random", rows=99) == [2] * 3  # also of a window that it does not divide
    assert ratios("sequence", rows=230) == [2, 4, 8, 2, 4]
    assert ratios("adapt-0", positions=1000) == [2] * 5
    assert ratios("adapt-100", positions=150) == [4] * 5  # (150 - 48) * 4 + 48 = 456 positions for 300 + 100 tokens
    assert ratios("adapt-100000", positions=150) == [8] * 5


def test_a_window_that_no_ratio_divides_is_an_error():
    with pytest.raises(MethodError, match=r"none of the ratios 2, 4, 8 divides a window of 47"):
        ratios("step-random", rows=95)


@pytest.mark.parametrize("value", [0, -2, 2.0, True, [], [4, "8"]])
def test_wrong_ratios_are_refused(model, value):
    with pytest.raises(MethodError, match="whole number of at least 1"):
        model.generate(torch.tensor([[1, IMAGE, 5]]), images=[clip(1)], modalities=["video"], beacon_ratio=value)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_official_script():
    conversation = conv_templates[VideoXLForCausalLM.about.template].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_tokens_of_frames_tiles_and_single_views(model):
    def rows(images, kind):
        (item,) = model.prepare_multimodal(torch.tensor([[1, IMAGE, 5]]), None, None, images, [kind]).spans[0]
        return item.length, item.frames, item.frame_rows

    features = model.encode_images(clip(3))
    pooled = functional.avg_pool2d(features.transpose(1, 2).unflatten(2, (24, 24)), 2).flatten(2).transpose(1, 2)
    assert rows([clip(3)], "video") == (432, 3, 144)
    assert rows([clip(3)], "image")[0] == 288
    assert rows([clip(1)], "image")[0] == 576 and rows(clip(1), "image")[0] == 576
    (item,) = model.encode([clip(3)], ["image"])
    torch.testing.assert_close(item.features[0], pooled[1:].flatten(0, 1))  # without the overview


def test_only_summaries_stay_in_the_cache(model):
    ids, asked = torch.tensor([[1, 2, IMAGE, 5, 6, 7]]), {"images": [clip(5)], "modalities": ["video"]}
    with record() as requests:
        where = {"beacon_skip_first": 2, "beacon_skip_last": 722}  # as the official scripts do
        out = model.generate(ids, **asked, **GREEDY, **where, beacon_ratio=4, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == 2 + 180 + 3 + 4
    (request,) = requests
    assert [layers[0] for layers in request.cached] == [185, 186, 187, 188, 189]
    assert request.decode_steps == 4 and set(request.stage_ms) == {"vision", "compress", "prefill", "decode"}
    (item,) = request.samples[0].items
    assert (item.tokens_before, item.info["summary_tokens"]) == (720, 180)


def test_no_call_attends_to_more_than_a_window_and_the_cache(model, monkeypatch):
    seen, attend = [], functional.scaled_dot_product_attention

    def watched(query, key, *rest, **how):
        if query.shape[-1] == 12:  # the decoder's heads
            seen.append((query.shape[2], key.shape[2]))
        return attend(query, key, *rest, **how)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    ids = torch.tensor([[1, 2, IMAGE, 5, 6, 7]])
    model.generate(ids, images=[clip(5)], modalities=["video"], beacon_ratio=8, **{**GREEDY, "max_new_tokens": 2})
    assert seen[::3] == [(2, 2), (324, 326), (324, 362), (162, 236), (2, 94), (1, 95), (1, 96)]


def test_the_recorded_work_is_what_torch_counts(model):
    ids, asked = torch.tensor([[1, 2, IMAGE, 5, 6, 7]]), {"images": [clip(5)], "modalities": ["video"]}
    with record() as requests:
        spliced = model.prepare_multimodal(ids, None, None, **asked, request=new_request(), padding_side="left")
    decoder = model.get_model()
    with FlopCounterMode(display=False) as counter:
        decoder.read(spliced.inputs_embeds, spliced.layout)
    (sample,) = requests[0].samples
    slots = (spliced.pieces[0][1], spliced.pieces[0][2], spliced.pieces[0][3])
    width, heads = decoder.config.hidden_size, 4 * 12 + 2 * 2 * 12  # projections are computed for all rows, then again
    again = sum(piece.summaries for piece in slots) * width * heads * decoder.config.num_hidden_layers
    assert sample.prefill_macs == counter.get_total_flops() // 2 - again


def test_a_video_that_leaves_nothing_is_as_if_it_were_not_there(model):
    text = torch.tensor([[1, 2, 3, 5, 6, 7]])
    ids = torch.tensor([[1, 2, 3, IMAGE, 5, 6, 7]])
    asked = {"images": [clip(2)], "modalities": ["video"], "beacon_ratio": 1000}
    assert torch.equal(model.generate(ids, **asked, **GREEDY), model.generate(text, **GREEDY))
    rows = model(ids, **asked).logits  # of the text, and of the video's last row
    torch.testing.assert_close(rows[:, [0, 1, 2, 4, 5, 6]], model(text).logits, atol=2e-5, rtol=1e-4)


def test_text_alone_is_qwen2s(model, tmp_path):
    weights = {name: w for name, w in load_file(FOLDER / "model.safetensors").items() if "beacon_" not in name}
    plain = LlavaQwenForCausalLM.from_pretrained(written(tmp_path, weights), dtype=torch.float32).eval()
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 9, 8]])
    mask = (ids != 0).long()
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **GREEDY), plain.generate(ids, attention_mask=mask, **GREEDY)
    )


# -- batches, and everything else that generate does -------------------------------------------------------------------

IDS = torch.tensor([[1, 2, IMAGE, 5, 6, 7, IMAGE, 8], [0, 0, 0, 1, IMAGE, 9, 10, 11], [0, 0, 0, 0, 0, 4, 5, 6]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def batch():
    """A prompt with a video and an image, one with a longer video, and one of text."""
    return {"images": [clip(3), clip(1, 1), clip(5, 2)], "modalities": ["video", "image", "video"]}


def samples(batch):
    """The three prompts, one by one."""
    yield IDS[:1], {name: value[:2] for name, value in batch.items()}
    yield IDS[1:2, 3:], {name: value[2:] for name, value in batch.items()}
    yield IDS[2:, 5:], {}


@pytest.mark.parametrize("ratio", [None, 4, 7])
def test_a_batch_gives_the_answers_of_its_samples(model, batch, ratio):
    together = model.generate(IDS, attention_mask=MASK, **batch, **GREEDY, beacon_ratio=ratio)
    alone = [model.generate(ids, **asked, **GREEDY, beacon_ratio=ratio) for ids, asked in samples(batch)]
    assert torch.equal(together, torch.cat(alone))


def test_forward_gives_the_logits_of_text_rows(model, batch):
    together = model(IDS, attention_mask=MASK, **batch, beacon_ratio=8).logits
    for row, (ids, asked) in zip(together, samples(batch), strict=True):
        alone = model(ids, **asked, beacon_ratio=8).logits[0]
        torch.testing.assert_close(row[: len(alone)], alone, atol=2e-5, rtol=1e-4)
        assert len(alone) == ids.shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ratio", [8, 432])  # with 432 each leaves one entry, as many as it has placeholders
def test_going_on_by_hand_with_the_cache_of_a_batch(model, batch, ratio, side):
    answer = model.generate(IDS, attention_mask=MASK, **batch, **GREEDY, beacon_ratio=ratio)
    ids, mask = IDS, MASK
    if side == "right":
        ids = torch.stack([torch.cat([row[row != 0], row[row == 0]]) for row in IDS])
        mask = (ids != 0).long()
    out = model(ids, attention_mask=mask, **batch, beacon_ratio=ratio)
    ends = (MASK.sum(1) - 1)[:, None, None].expand(-1, -1, out.logits.shape[-1])
    found = [out.logits.gather(1, ends)[:, 0].argmax(-1)]
    for says in (True, False, True, False):  # the mask of the prompts as they are written, or none
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        step = {"past_key_values": out.past_key_values, "attention_mask": mask if says else None}
        out = model(found[-1][:, None], **step)
        found.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(torch.stack(found, dim=1), answer)


def test_labels_count_where_text_is_predicted(model, batch):
    labels = IDS.masked_fill((IDS == IMAGE) | (MASK == 0), -100)
    asked = {"beacon_ratio": 8}
    loss = model(IDS, attention_mask=MASK, labels=labels, **batch, **asked).loss
    total, count = 0.0, 0
    for ids, own in samples(batch):
        logits = model(ids, **own, **asked).logits[0]
        targets = ids[0, 1:]  # a placeholder's row is that of the last visual token
        real = targets != IMAGE
        total += functional.cross_entropy(logits[:-1][real], targets[real], reduction="sum")
        count += int(real.sum())
    torch.testing.assert_close(loss, total / count)


def test_gradients_reach_the_summary_tokens():
    with torch.enable_grad():
        trained = load()
        trained.requires_grad_(True)
        ids = torch.tensor([[1, IMAGE, 5, 6]])
        asked = {"images": [clip(1)], "modalities": ["video"], "beacon_ratio": 8}
        trained(ids, labels=ids.masked_fill(ids == IMAGE, -100), **asked).loss.backward()
    decoder = trained.get_model()
    assert decoder.beacon_embed_tokens.weight.grad.abs().sum() > 0
    assert decoder.layers[0].self_attn.beacon_v_proj.weight.grad.abs().sum() > 0


def test_beams_and_several_answers(model, batch):
    ids, asked = next(samples(batch))
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "beacon_ratio": 8}
    alone = model.generate(ids, **asked, **beams)
    together = model.generate(IDS, attention_mask=MASK, **batch, **beams)
    assert alone.shape == (2, 5) and torch.equal(together[:2], alone)


def test_drafts_of_a_look_up_change_nothing(model, batch):
    ids, asked = next(samples(batch))
    plain = {**GREEDY, "beacon_ratio": 8, "max_new_tokens": 12}
    assert torch.equal(
        model.generate(ids, **asked, **plain, prompt_lookup_num_tokens=2), model.generate(ids, **asked, **plain)
    )


def test_over_several_devices(model, batch):
    spread = load()
    spread.config.beacon_window = spread.config.beacon_stride = 288
    places = {f"model.layers.{index}": f"cuda:{index % 2}" for index in range(3)}
    places |= {"model.embed_tokens": "cuda:0", "model.norm": "cuda:1", "model.rotary_emb": "cuda:0"}
    places |= {"model.beacon_embed_tokens": "cuda:1", "model.vision_tower": "cuda:2", "model.mm_projector": "cuda:1"}
    beams = {**GREEDY, "num_beams": 2, "beacon_ratio": 8}
    expected = model.generate(IDS, attention_mask=MASK, **batch, **beams)
    with SeveralDevices():
        dispatch_model(spread, places | {"lm_head": "cuda:1"}, main_device="cuda:0", skip_keys="past_key_values")
        got = spread.generate(IDS, attention_mask=MASK, **batch, **beams)
    assert torch.equal(got.as_subclass(torch.Tensor), expected)


def test_with_weights_in_cpu_memory(model, batch):
    away = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert away.get_model().beacon_embed_tokens.weight.is_meta
    got = away.generate(IDS, attention_mask=MASK, **batch, **GREEDY)
    assert torch.equal(got, model.generate(IDS, attention_mask=MASK, **batch, **GREEDY))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, dtype, attention):
    near = load(dtype=dtype, attn_implementation=attention)
    near.config.beacon_window = near.config.beacon_stride = 288
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"modalities": ["video"], "beacon_ratio": 8}
    got = near(ids, images=[clip(3).to(dtype)], **asked).logits.float()
    exact = model(ids, images=[clip(3)], **asked).logits
    assert got.isfinite().all() and (got - exact).norm() < 0.05 * exact.norm()
    assert near.generate(ids, images=[clip(3).to(dtype)], **asked, **GREEDY).shape == (1, 5)


def test_a_request_leaves_nothing_for_the_next(model, batch):
    ids, asked = next(samples(batch))
    once = model.generate(ids, **asked, **GREEDY)
    assert torch.equal(model.generate(ids, **asked, **GREEDY), once)
    assert torch.equal(copy.deepcopy(model).generate(ids, **asked, **GREEDY), once)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_answered(model):
    asked = {"images": [clip(1)], "modalities": ["video"], "beacon_ratio": 8}
    with pytest.raises(ValueError, match="answers behind text"):
        model.generate(torch.tensor([[1, 2, IMAGE]]), **asked, **GREEDY)
    out = model(torch.tensor([[1, IMAGE, 2]]), **asked)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="makes the cache of a prompt"):
            call(torch.tensor([[1, IMAGE, 2]]), **asked, past_key_values=out.past_key_values.__class__())


def test_embeddings_that_hide_a_video_are_not_offered(model):
    with pytest.raises(NotImplementedError, match="give ids and images"):
        model.prepare_inputs_labels_for_multimodal(IDS, None, MASK, None, None, [clip(1)], ["video"])


def test_what_counts_for_the_context_is_what_stays(model, monkeypatch):
    monkeypatch.setattr(model.config, "tokenizer_model_max_length", 100)
    monkeypatch.setattr(model.config, "on_long_prompt", "error", raising=False)
    ids, asked = torch.tensor([[1, IMAGE, 5]]), {"images": [clip(5)], "modalities": ["video"]}
    assert model.generate(ids, **asked, **GREEDY, beacon_ratio=8).shape == (1, 5)
    with pytest.raises(LongPromptError, match=r"context of 100 positions: 82 of its 182"):
        model.generate(ids, **asked, **GREEDY, beacon_ratio=4)


@pytest.mark.parametrize(
    "keys",
    [
        {"beacon_sink_size": 4},
        {"beacon_attn": "step-expansion"},
        {"beacon_stride": 720},
        {"beacon_param": ["q", "mlp"]},
        {"beacon_ratio_mix": "join"},
        {"beacon_parallel_window": 2},
        {"use_sliding_window": True, "max_window_layers": 1},
    ],
)
def test_settings_that_mean_something_else_are_refused(tmp_path, keys):
    with pytest.raises(CheckpointError, match=next(iter(keys))):
        load(written(tmp_path, **keys))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_config():
    assert architecture_of({"enable_beacon": True, "beacon_window": 1440}) is VideoXLForCausalLM
    assert architecture_of({"model_type": "llava_qwen", "enable_beacon": False}) is None


def test_half_checkpoints_and_unknown_weights_are_refused(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    weights["model.layers.0.self_attn.beacon_o_proj.weight"] = torch.zeros(48, 48)
    with pytest.raises(CheckpointError, match=r"no place for 1 of its weights.*beacon_o_proj"):
        load(written(tmp_path, weights))


def test_missing_summary_weights_are_refused(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    del weights["model.layers.1.self_attn.beacon_k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"1 weights missing.*beacon_k_proj"):
        load(written(tmp_path, weights))


def test_summary_tokens_without_projections_of_their_own(tmp_path):
    weights = load_file(FOLDER / "model.safetensors")
    fewer = {name: w for name, w in weights.items() if "beacon_k_proj" not in name and "beacon_q_proj" not in name}
    loaded = load(written(tmp_path, fewer, beacon_param=["v"]))
    asked = {"images": [clip(1)], "modalities": ["video"], "beacon_ratio": 8}
    assert loaded.generate(torch.tensor([[1, IMAGE, 5]]), **asked, **GREEDY).shape == (1, 5)


def test_saved_and_loaded_again(model, tmp_path, batch):
    model.save_pretrained(tmp_path)
    shutil.copytree(FOLDER / "vision_tower", tmp_path / "vision_tower")
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(FOLDER / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    again = architecture_of(config).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.beacon_window == 288
    ids, asked = next(samples(batch))
    assert torch.equal(again.generate(ids, **asked, **GREEDY), model.generate(ids, **asked, **GREEDY))


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_on_the_tokens_of_frames(model):
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"images": [clip(4)], "modalities": ["video"], "beacon_ratio": 8}
    dense = model.generate(ids, **asked, **GREEDY)
    with accelerate(model, "random", retention_ratio=1.0):
        assert torch.equal(model.generate(ids, **asked, **GREEDY), dense)
    with accelerate(model, "random", retention_ratio=0.5), record() as requests:
        model.generate(ids, **asked, **GREEDY)
    (item,) = requests[0].samples[0].items
    assert (item.tokens_before, item.tokens_after, item.info["summary_tokens"]) == (576, 288, 36)


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("method", [name for name in sorted(available()) if runs_on(name, "video_xl")])
def test_methods_of_the_table_run(model, method, kind):
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"images": [clip(3)], "modalities": [kind], "beacon_ratio": 8}
    acting = configured(method)
    if kind == "image" and isinstance(acting, ViewCompressMethod):
        with accelerate(model, acting), pytest.raises(MethodError, match="Video-XL pools them"):
            model.generate(ids, **asked, **GREEDY)
        return
    with accelerate(model, acting), record() as requests:
        model.generate(ids, **asked, **GREEDY)
    (item,) = requests[0].samples[0].items
    assert item.info["summary_tokens"] == item.tokens_after // 8 > 0


@pytest.mark.parametrize(
    ("method", "params", "says"),
    [
        ("fastv", {}, "prefill stage"),
        ("streamingllm", {}, "decode stage"),
        ("fastervlm", {}, "cls_attention"),
        ("tome", {"r": 1}, "encode stage"),
    ],
)
def test_methods_that_act_elsewhere_are_refused(model, method, params, says):
    with pytest.raises(MethodError, match=f"{says}.*Video-XL|Video-XL.*{says}"):
        accelerate(model, method, **params)
