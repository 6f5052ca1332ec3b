"""LLaMA-VID: its checkpoints and the files beside them, questions, forms of images and videos, methods on it."""

import copy
import json
import shutil

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from accelerate_methods import MethodError, accelerate, available, record
from accelerate_methods.engine.recording import ItemRecord, SampleRecord
from accelerate_methods.hosts.tower_files import TowerError
from accelerate_methods.registry.compatibility import runs_on
from llava.model.architectures import architecture_of, llama_vid
from llava.model.architectures.llama_vid import LlamaVidForCausalLM
from llava.model.architectures.llama_vid.eva import resized_positions
from llava.model.architectures.llama_vid.tokens import content_cells, pooled
from llava.model.architectures.qformer import QFormer
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from tests.support.architectures import from_checkpoint
from tests.support.configured import configured
from tests.support.paths import CHECKPOINTS

FOLDER, TOKENIZER = CHECKPOINTS / "tiny-llama-vid", CHECKPOINTS / "tiny-llava-1.5"
IMAGE = -200
ASKED = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
pytestmark = pytest.mark.usefixtures("no_grad")


def load(folder=FOLDER, device_map=None, offload_folder=None, **keys):
    where = {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    return from_checkpoint(LlamaVidForCausalLM, folder, how=where, **{"eva_heads": 4, **keys})


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def grids():
    return load(compress_type="grid:4")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as one is downloaded: weights, tower, vocabulary and the language model's tokenizer."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, tmp_path)
    change_config(tmp_path, eva_heads=4)
    return tmp_path


def change_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def pixels(count, seed=0):
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def embedded(model, ids, images, questions, **how):
    return model.prepare_multimodal(torch.tensor(ids), None, None, images, questions=questions, **how)


def visual(model, images, questions, **how):
    """[K, D] visual rows of a prompt with one placeholder."""
    spliced = embedded(model, [[1, IMAGE, 9]], images, questions, **how)
    return spliced.inputs_embeds[0, 1:-1]


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_config():
    assert (
        architecture_of({"architectures": ["LlavaLlamaAttForCausalLM"], "model_type": "llava"}) is LlamaVidForCausalLM
    )
    assert architecture_of({"architectures": ["LlavaLlamaForCausalLM"], "bert_type": "qformer_pretrain_freeze"})
    assert architecture_of({"architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu"}) is None


def test_loaded_like_every_checkpoint(folder):
    """Tower and vocabulary lie in the folder; the question is read out of the prompt as it is written there."""
    tokenizer, model, processor, length = load_pretrained_model(str(folder), torch_dtype="float32", device_map="cpu")
    assert (processor.crop_size["height"], length, model.dtype) == (224, 4096, torch.float32)
    picture = model.image_inputs([Image.new("RGB", (60, 30), "red")], processor)
    prompt = "USER: <image>\nwhat color is the dog?\nanswer the question using a single word. ASSISTANT:"
    ids = model.prompt_ids(prompt, tokenizer)[None]
    said = ["what color is the dog?\nanswer the question using a single word."]
    read, given = (model.generate(ids, images=picture, questions=q, **ASKED) for q in (None, said))
    assert torch.equal(read, given)


def test_scaled_rotary_embeddings_stretch_the_context(folder):
    change_config(folder, rope_scaling={"type": "linear", "factor": 16.0}, max_token=65536)
    _, model, _, length = load_pretrained_model(str(folder), torch_dtype="float32", device_map="cpu")
    assert length == 65536 and model.config.rope_parameters["factor"] == 16.0


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = load(tmp_path, mm_vision_tower=str(FOLDER / "eva_vit_g.pth"), bert_folder=str(FOLDER / "bert-base-uncased"))
    assert torch.equal(visual(again, pixels(1), ["what is this?"]), visual(model, pixels(1), ["what is this?"]))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"bert_type": "raw_bert_layer:2"}, "only LLaMA-VID models with a Q-Former"),
        ({"compress_type": "median"}, "compress_type 'median' is not known"),
        ({"compress_type": "grid:99"}, "grid:N needs a number from 1 to 16"),
        ({"eva_heads": 16}, "width of 44 cannot be divided among 16 heads"),
        ({"image_processor": "clip-large"}, "names no side"),
        ({"bert_type": "qformer"}, "place for 2 of its weights .first: model.vlm_att_ln"),
        ({"mm_vision_select_feature": "cls_patch"}, "tokens are those of patches alone"),
        ({"bert_type": "qformer_pretrain:9"}, "number of layers must be 1 to 4"),
        ({"num_query": 16}, "1 of the wrong shape"),
        ({"mm_vision_tower": "nowhere/eva.pth"}, "cannot find the weights of the EVA tower"),
    ],
)
def test_configs_that_do_not_fit_are_errors(keys, says):
    with pytest.raises(CheckpointError, match=says):
        load(**keys)


def test_a_tower_file_that_is_cut_is_an_error(folder):
    path = folder / "eva_vit_g.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TowerError, match=r"cannot read .*eva_vit_g.pth"):
        load(folder)


def test_a_tower_file_of_something_else_is_an_error(folder):
    torch.save({"model.weight": torch.zeros(3)}, folder / "eva_vit_g.pth")
    with pytest.raises(TowerError, match="holds no EVA-ViT"):
        load(folder)


def test_a_tower_without_all_blocks_weights_is_an_error(folder):
    weights = torch.load(folder / "eva_vit_g.pth", weights_only=True)
    del weights["blocks.1.attn.v_bias"]
    torch.save(weights, folder / "eva_vit_g.pth")
    with pytest.raises(TowerError, match=r"lacks 1 weights of EVA-ViT \(first: blocks.1.attn.v_bias\)"):
        load(folder)


@pytest.mark.parametrize("change", ["missing", "more"])
def test_half_checkpoints_and_unknown_weights_are_errors(folder, change):
    shard = folder / "pytorch_model-00002-of-00002.bin"
    weights = torch.load(shard, weights_only=True)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    if change == "missing":
        del weights["model.vlm_att_ln.weight"], index["weight_map"]["model.vlm_att_ln.weight"]
    else:
        weights["model.vlm_att_bert_proj.weight"] = torch.zeros(4, 4)
        index["weight_map"]["model.vlm_att_bert_proj.weight"] = shard.name
    torch.save(weights, shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"vlm_att_ln.weight" if change == "missing" else "vlm_att_bert_proj"):
        load(folder)


def test_a_shard_with_code_in_it_is_not_executed(folder):
    class Code:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    torch.save({"lm_head.weight": Code()}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(CheckpointError, match="cannot read"):
        load(folder)


def test_no_vocabulary_is_an_error(tmp_path):
    model = load()
    model.config.bert_folder = str(tmp_path)
    with pytest.raises(CheckpointError, match="reads the question with BERT's vocabulary"):
        visual(model, pixels(1), ["what is this?"])


# -- the question ------------------------------------------------------------------------------------------------------


def test_the_question_changes_the_context_token_alone(model):
    one, other = (visual(model, pixels(1), [text]) for text in ("what is this?", "where is the dog?"))
    assert torch.equal(one[1:], other[1:]) and not torch.allclose(one[0], other[0])


def test_the_harness_gives_the_question_as_it_is_written(model):
    text = "<image>\nwhat is this?\nAnswer the question using a single word or phrase."
    assert model.asked_text(text) == "what is this?\nAnswer the question using a single word or phrase."


def test_the_image_stands_in_the_latest_turn_of_a_chat(model):
    first = "A chat. USER: <image>\nwhat is this? ASSISTANT:"
    assert model.whole_prompt(first) == first
    second = f"{first} A dog.</s>USER: where is it? ASSISTANT:"
    assert model.whole_prompt(second) == (
        "A chat. USER: what is this? ASSISTANT: A dog.</s>USER: <image>\nwhere is it? ASSISTANT:"
    )
    own = second.replace("where", "<image>\nwhere")
    assert model.whole_prompt(own) == own and model.whole_prompt("no turns") == "no turns"


def test_words_of_a_long_question_are_lost_at_its_beginning(model):
    ids, mask = model.question_tokenizer(["dog " * 300 + "cat", "cat"])
    assert ids.shape == (2, 256) and ids[0, [0, -2, -1]].tolist() == ids[1, :3].tolist() and mask[1].sum() == 3


def test_one_image_at_several_placeholders_is_seen_with_the_text_of_each(model):
    ids = [[1, IMAGE, 7, IMAGE, 9]]
    rows = embedded(model, ids, pixels(1), [["what is this?", "where?"]]).inputs_embeds[0]
    assert torch.equal(rows[1:3], visual(model, pixels(1), ["what is this?"]))
    assert torch.equal(rows[4:6], visual(model, pixels(1), ["where?"]))


def test_several_images_share_the_question_of_their_prompt(model):
    rows = embedded(model, [[1, IMAGE, 7, IMAGE, 9]], pixels(2), ["what is this?"]).inputs_embeds[0]
    torch.testing.assert_close(rows[4:6], visual(model, pixels(2)[1:], ["what is this?"]))


@pytest.mark.parametrize(
    ("ids", "count", "questions", "says"),
    [
        ([[1, IMAGE, 5]], 1, None, "nothing says what it is"),
        ([[1, IMAGE, 5]], 1, ["a", "b"], r"per prompt \(1\), got 2"),
        ([[1, IMAGE, IMAGE]], 2, [["a", "b", "c"]], "a prompt with 2 placeholders"),
        ([[1, IMAGE, 5]], 1, [7], "one text, or one for each"),
        ([[1, IMAGE, IMAGE, IMAGE]], 2, ["a"], "hold 3 <image> placeholders but 2 images"),
        ([[1, 4, 5]], 1, ["a"], "hold 0 <image> placeholders but 1 images"),
    ],
)
def test_questions_and_images_that_do_not_fit_are_errors(model, ids, count, questions, says):
    with pytest.raises((MethodError, ValueError, TypeError), match=says):
        embedded(model, ids, pixels(count), questions)


def test_queries_alone_need_no_text():
    """The Q-Former of other architectures: no words, and padding of the text changes nothing."""
    from transformers import BertConfig

    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=8, num_hidden_layers=3)
    former, image = QFormer(config, 12, words=30).eval(), torch.randn(2, 5, 12)
    queries, ids = torch.randn(4, 16), torch.tensor([[2, 7, 3]])
    padded, real = torch.tensor([[2, 7, 3, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(former(queries, image, ids), former(queries, image, padded, real))
    assert former(queries, image).shape == (2, 4, 16)
    assert "embeddings.word_embeddings.weight" not in QFormer(config, 12, words=None).state_dict()


# -- images and videos -------------------------------------------------------------------------------------------------


def test_a_batch_gives_the_answers_of_its_samples(model):
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [0, 0, 1, IMAGE, 9], [0, 1, 5, 6, 7]])
    image, video = pixels(1), pixels(3, seed=1)
    asked = {"modalities": ["image", "video"], "questions": ["what is this?", "where?", ""], **ASKED}
    both = model.generate(ids, images=[image[0], video], attention_mask=(ids != 0).long(), **asked)
    single = [
        model.generate(ids[:1], images=image, questions=["what is this?"], **ASKED),
        model.generate(ids[1:2, 2:], images=[video], modalities=["video"], questions=["where?"], **ASKED),
        model.generate(ids[2:, 1:], **ASKED),
    ]
    assert torch.equal(both, torch.cat(single))


def test_tokens_of_a_video_are_those_of_its_frames(model, monkeypatch):
    frames = pixels(5)
    alone = torch.cat([visual(model, frame[None], ["where?"]) for frame in frames])
    for chunk in (64, 2):
        monkeypatch.setattr(llama_vid, "CHUNK", chunk)
        together = visual(model, [frames], ["where?"], modalities=["video"])
        torch.testing.assert_close(together, alone)


def test_frames_of_several_videos_share_a_chunk(model, monkeypatch):
    monkeypatch.setattr(llama_vid, "CHUNK", 4)
    ids, mask = torch.tensor([[1, IMAGE, 7, IMAGE], [1, IMAGE, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    videos, questions = [pixels(3), pixels(2, seed=1), pixels(2, seed=2)], [["a", "b"], "c"]
    kinds = ["video"] * 3
    spliced = model.prepare_multimodal(ids, mask, None, videos, kinds, questions=questions)
    for (row, start), video, question in zip(((0, 1), (0, 8), (1, 1)), videos, "abc", strict=True):
        own = visual(model, [video], [question], modalities=["video"])
        torch.testing.assert_close(spliced.inputs_embeds[row, start : start + len(own)], own)


def test_features_stand_at_one_placeholder_or_at_one_for_each_token(model):
    features = model.video_features(pixels(3))
    whole = visual(model, [features], ["where?"])
    assert len(whole) == 6
    beside = embedded(model, [[1, *[IMAGE] * 6, 9]], [features], ["where?"])
    assert torch.equal(beside.inputs_embeds[0, 1:-1], whole)
    apart = embedded(model, [[1, IMAGE, IMAGE, 7, *[IMAGE] * 3, 8, IMAGE, 9]], [features], ["where?"])
    assert torch.equal(apart.inputs_embeds[0][apart.visual[0]], whole)
    assert apart.visual[0].nonzero().squeeze(1).tolist() == [1, 2, 4, 5, 6, 8]


def test_features_in_a_batch_leave_the_placeholders_of_others_alone(model):
    features, ids = model.video_features(pixels(2)), torch.tensor([[1, *[IMAGE] * 4, 9], [1, IMAGE, IMAGE, 9, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    spliced = model.prepare_multimodal(ids, mask, None, [features, pixels(1)[0]], questions=["a", ["b", "c"]])
    assert spliced.lengths == [6, 6]
    assert torch.equal(spliced.inputs_embeds[1, 3:5], visual(model, pixels(1), ["c"]))


def test_features_that_do_not_fit_their_placeholders_are_errors(model):
    features = model.video_features(pixels(3))
    with pytest.raises(ValueError, match="3 frames has 6 tokens, but 4 placeholders"):
        embedded(model, [[1, *[IMAGE] * 4]], [features], ["where?"])
    with pytest.raises(ValueError, match="one video for each of 1 prompts, got 2"):
        embedded(model, [[1, IMAGE, IMAGE]], [features, features], ["where?"])


def test_a_movie_has_two_placeholders_and_a_subtitle_per_frame(model):
    prompt = model.movie_prompt(["Hello.", ""], "Who is it?")
    assert prompt.count("<image>") == 4 and prompt.endswith("Now the movie end.\nWho is it?")
    assert "watching this movie.<image><image>Hello.<image><image>Now" in prompt


def test_frames_by_rate_up_to_a_limit(model):
    assert model.frame_indices(90, 30.0, fps=1, max_frames_num=1900) == [0, 30, 60]
    assert model.frame_indices(10, 10.0, fps=1000) == list(range(10))  # the official code fails
    assert model.frame_indices(1000, 10.0, fps=10, max_frames_num=4) == [0, 333, 666, 999]


@pytest.mark.parametrize(
    ("kind", "tokens"), [(None, 576), ("mean", 1), ("mean_concat", 1), ("grid:5", 36), ("grid:4", 16)]
)
def test_content_tokens_are_counted_as_they_are_pooled(kind, tokens):
    assert content_cells(kind, 576) == tokens == pooled(torch.zeros(1, 576, 2), kind).shape[1]


def test_positions_keep_the_cls_token_and_become_finer():
    table = torch.randn(17, 3)
    resized = resized_positions(table, 6)
    assert resized.shape == (37, 3) and torch.equal(resized[0], table[0]) and resized_positions(table, 4) is table


def test_half_precision(model):
    ids, asked = torch.tensor([[1, IMAGE, 5]]), {"questions": ["what is this?"]}
    exact = model(input_ids=ids, images=pixels(1), **asked).logits
    for dtype, close in ((torch.float16, 0.05), (torch.bfloat16, 0.3)):
        small = copy.deepcopy(model).to(dtype)
        logits = small(input_ids=ids, images=pixels(1).to(dtype), **asked).logits
        assert logits.dtype == dtype and (logits.float() - exact).abs().max() < close


def test_weights_may_lie_elsewhere(model, tmp_path):
    places = {f"model.{name}": "disk" for name, _ in model.get_model().named_children()} | {"lm_head": "cpu"}
    places |= {"model.norm": "cpu", "model.vlm_att_query": "cpu"}
    offloaded = load(device_map=places, offload_folder=str(tmp_path))
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"images": pixels(1), "questions": ["where?"], **ASKED}
    assert torch.equal(offloaded.generate(ids, **asked), model.generate(ids, **asked))


def test_queries_on_disk_are_an_error_that_says_what_to_do(folder, tmp_path, model):
    places = {f"model.{name}": "cpu" for name, _ in model.get_model().named_children()} | {"lm_head": "cpu"}
    places |= {"model.vlm_att_query": "disk"}
    with pytest.raises(CheckpointError, match=r"model\.vlm_att_query is on disk .* give it a device"):
        load_pretrained_model(str(folder), device_map=places, torch_dtype="float32", offload_folder=str(tmp_path / "o"))


def test_beams_begin_with_the_prompt(model):
    ids, asked = torch.tensor([[1, IMAGE, 5]]), {"questions": ["what is this?"], **ASKED}
    beams = model.generate(ids, images=pixels(1), num_beams=3, num_return_sequences=2, **asked)
    assert beams.shape == (2, 4)


def test_training_reaches_the_queries(model):
    trained = copy.deepcopy(model).train()
    with torch.enable_grad():
        ids = torch.tensor([[1, IMAGE, 5, 6], [1, 5, 6, 7]])
        images = pixels(2)  # the second one is a dummy, as in training data
        trained(input_ids=ids, images=images, labels=ids.clamp(min=0), questions=["where?", ""]).loss.backward()
    assert trained.get_model().vlm_att_query.grad.abs().sum() > 0


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_inside_the_llm_and_on_tokens(model):
    ids, video = torch.tensor([[1, IMAGE, 5, 6]]), [pixels(10)]
    asked = {"images": video, "modalities": ["video"], "questions": ["where?"], **ASKED}
    dense = model.generate(ids, **asked)
    with accelerate(model, "fastv", k=1, retention_ratio=1.0):
        assert torch.equal(model.generate(ids, **asked), dense)
    both = {"random.retention_ratio": 0.5, "fastv.k": 1, "fastv.r": 0.5}
    with accelerate(model, "random+fastv", **both), record() as requests:
        model.generate(ids, **asked)
    (sample,) = requests[0].samples
    assert (sample.visual_tokens_before, sample.visual_tokens_after) == (20, 10)
    assert requests[0].layer_lengths(0) == [13, 8, 8, 8] and model.own_macs(sample) > 0
    with accelerate(model, "streamingllm"):
        assert model.generate(ids, **asked).shape == dense.shape


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("method", [name for name in sorted(available()) if runs_on(name, "llama_vid")])
def test_methods_of_the_table_run(model, grids, method, kind):
    """On two tokens per frame, and on the context token and 16 cells of an image."""
    own, images = (model, [pixels(6)]) if kind == "video" else (grids, [pixels(1)])
    ids, asked = torch.tensor([[1, IMAGE, 5, 6]]), {"images": images, "modalities": [kind], "questions": ["where?"]}
    with accelerate(own, configured(method)), record() as requests:
        assert own.generate(ids, **asked, **ASKED).shape == (1, 4)
    assert requests[0].samples[0].visual_tokens_before == (12 if kind == "video" else 17)


@pytest.mark.parametrize("kind", ["mean", "grid:4", None])
def test_the_work_of_the_q_former_is_what_torch_counts(kind):
    model, words = load(compress_type=kind).requires_grad_(False), 7
    tokens = 1 + content_cells(kind, 256)
    sample = SampleRecord(items=[ItemRecord("video", 3 * tokens, 3 * tokens)], dense_length=3 * tokens + words)
    features = model.get_vision_tower()(pixels(3))
    with FlopCounterMode(display=False) as counter:
        model.get_model().look_for(features, [0] * 3, torch.ones(1, words, dtype=torch.long), None)
    assert model.own_macs(sample) == counter.get_total_flops() // 2


@pytest.mark.parametrize(("method", "says"), [("fastervlm", "cls_attention"), ("downsample", "sample stage")])
def test_methods_that_read_patches_are_refused(model, method, says):
    with pytest.raises(MethodError, match=f"{says}.*LLaMA-VID|LLaMA-VID.*{says}"):
        accelerate(model, method)
