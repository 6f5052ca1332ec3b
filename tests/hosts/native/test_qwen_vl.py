"""Qwen-VL models of transformers: compressed prompts equal the uncompressed model on a hand-cut one."""

import dataclasses
from typing import ClassVar

import pytest
import torch

import accelerate_methods
from accelerate_methods import MethodError, accelerate, detach, record
from accelerate_methods.stages.compress import CompressMethod, selection
from accelerate_methods.stages.signals import Signal
from tests.conformance.adapters.visionzip import qwen_vl_prune
from tests.support.configured import configured
from tests.support.hand_cut import cut, dense_inputs, language_model, layer_by_layer
from tests.support.qwen_inputs import (
    BATCH,
    MODELS,
    QUESTIONS,
    QWEN3,
    QWEN25,
    TEXT,
    Visual,
    encoder_tokens,
    inputs,
    items,
    naive_signals,
    qwen,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 4

#: methods whose whole work is done before the decoder
COMPRESSING = {
    "random": {},
    "uniform": {},
    "pool": {},
    "visionzip": {},
    "fastervlm": {},
    "divprune": {},
    "evs": {"pruning_rate": 0.6},
    "holitom": {"tau": 0.2, "inner": False},
    "vispruner": {},
    "scope": {},
    "mmtok": {},
    "prumerge": {},
    "prumerge_plus": {},
    "hiprune": {},
    "fastvid": {"variant": "qwen2_5_vl", "c": 2, "retention_ratio": 0.4},
    "dycoke": {"dp": False},
    "prunevid": {"selection": False},
    "flashvid": {"pruning_layer": 28, "min_segment_num": 2},
    "vidcom2": {},
}


def compressing(name):
    return configured(name, **COMPRESSING[name])


@pytest.fixture(params=MODELS)
def model(request):
    model = qwen(request.param)
    yield model
    detach(model)


def greedy(model, asked):
    """[B, NEW] ids."""
    new = model.generate(**asked, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return new[:, asked["input_ids"].shape[1] :]


def by_hand(model, questions, method):
    """The hand-cut prompt of every sample."""
    asked = inputs(model, *questions)
    dense = dense_inputs(model, asked)
    found = [items(model, asked, dense, b, list(questions)) for b in range(len(questions))]
    if method is not None and "encoder_tokens" in method.signals:
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            own = [item for sample in found for _, item in sample if item.modality == kind]
            tokens = encoder_tokens(model, asked[pixels], asked[f"{kind}_grid_thw"]) if own else []
            for item, value in zip(own, tokens, strict=True):
                item.signals["encoder_tokens"] = value
    return [cut(dense, b, sample, method) for b, sample in enumerate(found)]


def acts(method, question):
    return any(isinstance(part, Visual) and part.kind in method.modalities for part in question)


# -- nothing changes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*QUESTIONS, "text", "batch"])
@pytest.mark.parametrize("method", ["dense", "random", "fastv", "fastvid"])
def test_at_full_retention_every_number_is_that_of_the_model(model, name, method):
    questions = {**{k: (v,) for k, v in QUESTIONS.items()}, "text": (TEXT,), "batch": BATCH}[name]
    asked = inputs(model, *questions)
    params = {} if method == "dense" else {"retention_ratio": 1.0}
    with torch.no_grad():
        before = model(**asked).logits
        ids = greedy(model, asked)
        with accelerate(model, method, **params):
            after = model(**asked).logits
            assert torch.equal(greedy(model, asked), ids)
    real = asked["attention_mask"].bool()
    assert torch.equal(after[real], before[real])


def test_detaching_leaves_nothing_behind(model):
    asked = inputs(model, QUESTIONS["image"])
    with torch.no_grad():
        before = model(**asked).logits
        accelerate(model, "random", retention_ratio=0.2)
        assert model(**asked).logits.shape[1] < before.shape[1]
        detach(model)
        assert torch.equal(model(**asked).logits, before)
    for module in (model, model.model, model.model.language_model):
        assert not {"forward", "get_image_features", "get_video_features", "acceleration"} & set(module.__dict__)
    assert not model.model.visual.blocks[-1].attn._forward_pre_hooks


# -- compression equals a prompt that was cut by hand ------------------------------------------------------------------


@pytest.mark.share(3, each=("method",))
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("method", COMPRESSING)
def test_a_compressed_prompt_is_the_hand_cut_one(model, method, question):
    method, question = compressing(method), QUESTIONS[question]
    (expected,) = by_hand(model, [question], method)
    asked = inputs(model, question)
    if acts(method, question):
        assert len(expected.source) < asked["input_ids"].shape[1]
    logits, ids = language_model(model, expected, NEW)
    with torch.no_grad(), accelerate(model, method), record() as requests:
        out = model(**asked)
        generated = greedy(model, asked)
    assert out.logits.shape[1] == len(expected.source) == requests[0].samples[0].length
    torch.testing.assert_close(out.logits[0, -1], logits[0], atol=2e-5, rtol=1e-4)
    assert generated[0].tolist() == ids


@pytest.mark.share(2, each=("method",))
@pytest.mark.parametrize("method", COMPRESSING)
def test_a_padded_batch_equals_its_samples(model, method):
    method = compressing(method)
    asked = inputs(model, *BATCH)
    with torch.no_grad(), accelerate(model, method):
        logits, generated = model(**asked).logits[:, -1], greedy(model, asked)
    for sample, expected in enumerate(by_hand(model, BATCH, method)):
        wanted, ids = language_model(model, expected, NEW)
        torch.testing.assert_close(logits[sample], wanted[0], atol=2e-5, rtol=1e-4)
        assert generated[sample].tolist() == ids


@pytest.mark.parametrize("method", ["random", "visionzip"])
def test_beams_score_what_the_hand_cut_prompt_scores(model, method):
    method, questions = compressing(method), [QUESTIONS["two images"], QUESTIONS["image and video"]]
    asked = inputs(model, *questions)
    with torch.no_grad(), accelerate(model, method):
        out = model.generate(
            **asked, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=3, do_sample=False, pad_token_id=0,
            length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    for sample, expected in enumerate(by_hand(model, questions, method)):
        ids = out.sequences[sample, asked["input_ids"].shape[1] :].tolist()
        logits, _ = language_model(model, expected, NEW, forced=ids)
        score = logits.log_softmax(-1)[range(NEW), ids].sum()
        torch.testing.assert_close(out.sequences_scores[sample], score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["dense", "random", "fastv"])
@pytest.mark.parametrize("told", [True, False], ids=["told where", "not told"])
def test_steps_made_by_hand_go_on_behind_the_whole_prompt(model, told, method):
    """Calls of ``forward`` one by one: they go on behind the largest position, which is that of the long video."""
    asked = inputs(model, QUESTIONS["long video"])
    params = {} if method == "dense" else {"retention_ratio": 0.3}
    fed, dense = [40, 41, 42], dense_inputs(model, asked)
    following, length = int(dense.positions.max()) + 1, asked["input_ids"].shape[1]
    with torch.no_grad(), accelerate(model, method, **params), record() as requests:
        out = model(**asked, use_cache=True)
        logits = [out.logits[0, -1]]
        for step, token in enumerate(fed):
            more = {}
            if told:
                more["attention_mask"] = torch.ones(1, length + step + 1, dtype=torch.long)
                more["position_ids"] = torch.full((3, 1, 1), following + step)
            out = model(
                input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True, **more
            )
            logits.append(out.logits[0, -1])
    (whole,) = by_hand(model, [QUESTIONS["long video"]], configured("random") if method == "random" else None)
    whole.following = following
    if method == "fastv":
        (item,) = requests[0].samples[0].items
        gone = item.rows[(item.left_at == 2).flatten()].tolist()
        expected, _, _ = layer_by_layer(model, whole, 4, {2: gone}, forced=[*fed, 0])
    else:
        expected, _ = language_model(model, whole, 4, forced=[*fed, 0])
    torch.testing.assert_close(torch.stack(logits), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["dense", "random", "visionzip"])
def test_a_later_turn_goes_on_from_the_cut_cache(model, method):
    question, more = QUESTIONS["two images"], [50, 51, 52]
    asked = inputs(model, question)
    method = None if method == "dense" else compressing(method)
    kept = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), accelerate(model, method):
        first = model.generate(**asked, max_new_tokens=NEW, min_new_tokens=NEW, **kept)
        chat = torch.cat([first.sequences, torch.tensor([more])], dim=1)
        second = model.generate(
            chat, attention_mask=torch.ones_like(chat), past_key_values=first.past_key_values, max_new_tokens=2, **kept
        )
    (expected,) = by_hand(model, [question], method)
    said = first.sequences[0, asked["input_ids"].shape[1] :].tolist()
    logits, _ = language_model(model, expected, NEW + len(more) + 1, forced=[*said, *more, 0])
    torch.testing.assert_close(second.logits[0][0], logits[-1], atol=2e-5, rtol=1e-4)


# -- inside the decoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2])  # before layer 1, Qwen3-VL has yet to add features to what is left
@pytest.mark.parametrize("question", QUESTIONS)
def test_fastv_keeps_what_the_last_prompt_token_attends_to(model, question, layer):
    question, ratio = QUESTIONS[question], 0.3
    asked = inputs(model, question)
    with torch.no_grad(), accelerate(model, "fastv", k=layer, retention_ratio=ratio), record() as requests:
        logits = model(**asked).logits[0, -1]
        generated = greedy(model, asked)[0].tolist()
    (whole,) = by_hand(model, [question], None)
    _, _, maps = layer_by_layer(model, whole, 1)
    visual = torch.cat([item.rows for item in requests[0].samples[0].items])
    scores = maps[layer - 1][:, -1].mean(0)[visual]
    wanted = visual[scores.topk(round(len(visual) * ratio)).indices].sort().values
    left = torch.cat([item.left_at.flatten() for item in requests[0].samples[0].items])
    assert torch.equal(visual[left == len(maps)].sort().values, wanted)
    dropped = sorted(set(visual.tolist()) - set(wanted.tolist()))
    expected, ids, _ = layer_by_layer(model, whole, NEW, {layer: dropped})
    torch.testing.assert_close(logits, expected[0], atol=2e-5, rtol=1e-4)
    assert generated == ids
    lengths = requests[0].layer_lengths(0)
    full = asked["input_ids"].shape[1]
    assert lengths == [full] * layer + [full - len(dropped)] * (len(maps) - layer)


@pytest.mark.parametrize("question", ["video", "two videos"])
def test_prunevid_drops_rows_of_every_cache(model, question):
    """Its second stage, with the tokens that it kept taken from the record."""
    question, layer = QUESTIONS[question], 1
    method = accelerate_methods.get("prunevid", selected_layer=layer, alpha=0.5)
    asked = inputs(model, question)
    with torch.no_grad(), accelerate(model, method), record() as requests:
        logits = model(**asked).logits[0, -1]
        generated = greedy(model, asked)[0].tolist()
    (merged,) = by_hand(model, [question], method)
    dropped = {
        int(item.rows[row])
        for item in requests[0].samples[0].items
        for row, at in zip(item.owner.flatten().tolist(), item.left_at.flatten().tolist(), strict=True)
        if row >= 0 and at == layer + 1
    }
    assert dropped  # of Qwen3-VL, whose frames have text in between: a share of every frame's run
    expected, ids, _ = layer_by_layer(model, merged, NEW, {layer + 1: sorted(dropped)}, hidden=True)
    torch.testing.assert_close(logits, expected[0], atol=2e-5, rtol=1e-4)
    assert generated == ids


def test_dycoke_hides_keys_in_decode_steps_only(model):
    asked = inputs(model, QUESTIONS["video"])
    found = {}
    for p in (0.0, 0.9):
        with torch.no_grad(), accelerate(model, "dycoke", ttm=False, p=p, threshold=2.0, l=1):
            found[p] = model.generate(
                **asked, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
            ).logits
    (whole,) = by_hand(model, [QUESTIONS["video"]], None)
    expected, _ = language_model(model, whole, NEW)
    torch.testing.assert_close(torch.cat(found[0.0]), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[0.9][0], found[0.0][0], atol=0, rtol=0)
    assert not torch.allclose(found[0.9][1], found[0.0][1], atol=1e-3)


def test_methods_combine(model):
    """VisionZip before the decoder, FastV (here: in the last layer, which leaves the logits as they are) inside it."""
    question, layers = QUESTIONS["two images"], len(model.model.language_model.layers)
    first = compressing("visionzip")
    (expected,) = by_hand(model, [question], first)
    _, _, maps = layer_by_layer(model, expected, 1)
    with torch.no_grad(), accelerate(model, [first, configured("fastv", k=layers - 1)]), record() as requests:
        model(**inputs(model, question))
    items_ = requests[0].samples[0].items
    visual = torch.cat([item.rows for item in items_])
    scores = maps[layers - 2][:, -1].mean(0)[visual]
    wanted = set(visual[scores.topk(round(len(visual) * 0.3)).indices].tolist())
    left = {
        int(item.rows[row])
        for item in items_
        for row, at in zip(item.owner.flatten().tolist(), item.left_at.flatten().tolist(), strict=True)
        if row >= 0 and at == layers
    }
    assert left == wanted


# -- signals -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(CompressMethod):
    """Keeps everything and remembers what it was given."""

    name: ClassVar[str] = "probe"
    signals: ClassVar[frozenset[str]] = frozenset(
        {
            "received_attention", "pooling_attention", "key_states", "frame_features",
            Signal("received_attention", 0.375), Signal("received_attention", "next", "joined"),
            Signal("key_states", "next", "joined"),
        }
    )  # fmt: skip
    given: list = dataclasses.field(default_factory=list)

    def compress(self, item):
        self.given.append(item)
        return selection(item, torch.arange(item.num_tokens))


#: in merged tokens the windows of the tiny Qwen2.5-VL are 4 x 4
GRIDS = [[(1, 8, 8)], [(1, 16, 16)], [(1, 10, 26)], [(1, 4, 6)], [(3, 18, 10)], [(2, 8, 12), (1, 22, 6), (4, 6, 18)]]


@pytest.mark.parametrize(
    ("kind", "grids"),
    [(kind, g) for g in GRIDS for kind in ("image", "video") if kind == "video" or all(n == 1 for n, _, _ in g)],
)
def test_signals_are_those_of_full_attention_maps(model, kind, grids):
    question = (5, *(Visual(kind, *grid) for grid in grids), 7)
    asked, probe = inputs(model, question, seed=3), Probe()
    with torch.no_grad(), accelerate(model, probe):
        model(**asked)
    dense = dense_inputs(model, asked)
    expected = items(model, asked, dense, 0, [question])
    assert len(probe.given) == len(expected) == len(grids)
    for got, (_, wanted), (frames, rows, columns) in zip(probe.given, expected, grids, strict=True):
        assert got.grid == (rows // 2, columns // 2) and got.features.shape[:2] == (frames, rows * columns // 4)
        torch.testing.assert_close(got.features, wanted.features, atol=0, rtol=0)
        assert set(got.signals) == set(wanted.signals) == probe.signals
        for name, value in wanted.signals.items():
            torch.testing.assert_close(got.signals[name], value, atol=1e-6, rtol=1e-4)


def test_windows_matter():
    """The reference would notice signals in the order of the windows."""
    model, question = qwen(QWEN25), (5, Visual("image", 1, 10, 26), 7)
    asked = inputs(model, question, seed=3)
    (signals,) = naive_signals(model, asked["pixel_values"], asked["image_grid_thw"])
    model.config.vision_config.window_size, before = 10**4, model.config.vision_config.window_size
    try:
        # with a window larger than the grid nothing is re-ordered: the tower runs, but on other windows
        (other,) = naive_signals(model, asked["pixel_values"], asked["image_grid_thw"])
    finally:
        model.config.vision_config.window_size = before
    assert not torch.allclose(signals["key_states"], other["key_states"], atol=1e-3)


def test_large_grids_are_scored_piece_by_piece(model, monkeypatch):
    """The same numbers when only one head's map is formed at a time."""
    from accelerate_methods.engine import encoder_attention

    asked = inputs(model, QUESTIONS["video"])
    given = []
    for limit in (encoder_attention.CHUNK_BYTES, 1):
        monkeypatch.setattr(encoder_attention, "CHUNK_BYTES", limit)
        probe = Probe()
        with torch.no_grad(), accelerate(model, probe):
            model(**asked)
        given.append(probe.given[0].signals["received_attention"])
    torch.testing.assert_close(given[0], given[1])


# -- the authors' and third-party forms for this family ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 12), (10, 26), (6, 10)])
@pytest.mark.parametrize("ratios", [(0.3, 0.05), (0.54, 0.1), (0.1, 0.001)])
def test_visionzip_is_the_form_of_the_golden_cases(model, shape, ratios):
    """As LightCompress@9701d03 does it: original order, original position ids, contextual tokens at their target."""
    visual = Visual("image", 1, *shape)
    question, count = (5, 6, visual, 30, 31), visual.per_frame
    dominant, contextual = int(ratios[0] * count), max(1, int(ratios[1] * count))
    asked = inputs(model, question, seed=5)
    dense = dense_inputs(model, asked)
    ((rows, item),) = items(model, asked, dense, 0, [question])
    start = int(rows[0])
    params = {
        "vision_start": start, "vision_tokens": count, "dominant_ratio": ratios[0], "contextual_ratio": ratios[1],
    }  # fmt: skip
    golden = qwen_vl_prune(
        {
            "inputs_embeds": dense.embeds,
            "received_attn": item.signals["received_attention"][0],
            "keys": item.signals["key_states"][0],
        },
        params,
        None,
    )
    caught = {}
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(kwargs, hidden=args[0]), with_kwargs=True
    )
    method = accelerate_methods.get("visionzip", dominant=dominant, contextual=contextual)
    with torch.no_grad(), accelerate(model, method), record() as requests:
        model(**asked)
    hook.remove()
    torch.testing.assert_close(caught["hidden"], golden["inputs_embeds"], atol=1e-5, rtol=1e-4)
    kept = golden["kept_positions"]
    rotary = model.model.language_model.rotary_emb(dense.embeds, dense.positions[:, :, kept])
    torch.testing.assert_close(caught["position_embeddings"][0], rotary[0], atol=0, rtol=0)
    (found,) = requests[0].samples[0].items
    assert torch.equal(found.positions + start, kept[(kept >= start) & (kept < start + count)])
    assert (found.tokens_before, found.tokens_after) == (count, dominant + contextual)


def test_fastvid_follows_its_qwen_tree(model):
    """Positions ascend and are the original ones; the segments say which variant ran."""
    question = QUESTIONS["video"]
    asked = inputs(model, question)
    with torch.no_grad(), accelerate(model, compressing("fastvid")), record() as requests:
        model(**asked)
    (found,) = requests[0].samples[0].items
    assert found.info["variant"] == "qwen2_5_vl" and sum(found.info["segment_sizes"]) == 5
    assert (found.positions.diff() > 0).all()
    assert found.tokens_after == sum(found.info["salient_per_frame"]) + sum(found.info["context_per_frame"])


# -- what is recorded, what is refused ---------------------------------------------------------------------------------


def test_records_count_tokens_of_each_sample(model):
    asked = inputs(model, *BATCH)
    with torch.no_grad(), accelerate(model, "random", retention_ratio=0.25), record() as requests:
        greedy(model, asked)
    (request,) = requests
    assert request.decode_steps == NEW - 1
    assert {"vision", "compress", "prefill", "decode"} <= set(request.stage_ms)
    for number, (sample, question) in enumerate(zip(request.samples, BATCH, strict=True)):
        visuals = [part for part in question if isinstance(part, Visual)]
        dense = int(asked["attention_mask"][number].sum())
        before = [v.frames * v.per_frame for v in visuals]
        after = [n // 4 for n in before]
        assert [item.modality for item in sample.items] == [v.kind for v in visuals]
        assert [item.tokens_before for item in sample.items] == before
        assert [item.tokens_after for item in sample.items] == after
        assert (sample.dense_length, sample.length) == (dense, dense - sum(before) + sum(after))
        assert request.layer_lengths(number) == [sample.length] * len(model.model.language_model.layers)


def test_a_loss_counts_text_only(model):
    question = QUESTIONS["image"]
    asked = inputs(model, question)
    ids = asked["input_ids"]
    labels = ids.masked_fill(ids >= 290, -100)
    with torch.no_grad(), accelerate(model, "random", retention_ratio=0.25):
        loss = model(**asked, labels=labels).loss
    (expected,) = by_hand(model, [question], accelerate_methods.get("random", retention_ratio=0.25))
    more = {"visual_pos_masks": torch.ones(1, len(expected.source), dtype=torch.bool)} if expected.added else {}
    if more:
        more["deepstack_visual_embeds"] = expected.added
    with torch.no_grad():
        states = model.model.language_model(
            inputs_embeds=expected.embeds[None], position_ids=expected.positions[:, None], **more
        ).last_hidden_state
        logits = model.lm_head(states)[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], labels[0, expected.source][1:])
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)


def test_a_cls_token_is_not_there(model):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NeedsCls(CompressMethod):
        name: ClassVar[str] = "needs_cls"
        signals: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    with pytest.raises(MethodError, match="needs_cls needs cls_attention"):
        accelerate(model, NeedsCls())


def test_deepstack_rows_are_cut_alike():
    """Were the rows of another token added, the hand-cut prompt would give other logits."""
    model, question = qwen(QWEN3), QUESTIONS["image"]
    (expected,) = by_hand(model, [question], compressing("random"))
    assert len(expected.added) == 2 and all(part.abs().sum() > 0 for part in expected.added)
    right, _ = language_model(model, expected, 1)
    shifted = dataclasses.replace(expected, added=[part.roll(1, 0) for part in expected.added])
    wrong, _ = language_model(model, shifted, 1)
    assert (right - wrong).abs().max() > 1e-2
