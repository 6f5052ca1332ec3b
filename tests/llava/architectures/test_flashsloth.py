"""FlashSloth: its checkpoints, prompts with queries, what the queries read, one and five views, methods on it."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Tokenizer

from accelerate_methods import MethodError, accelerate, available, record
from accelerate_methods.engine.recording import ItemRecord, SampleRecord
from accelerate_methods.registry.compatibility import runs_on
from llava.conversation import conv_templates
from llava.model.architectures import architecture_of
from llava.model.architectures.flashsloth import LAYER, QUERIES, FlashSlothForCausalLM
from llava.model.architectures.flashsloth.modules import EmbeddedQuery, RegionPooling
from llava.model.architectures.flashsloth.queries import with_query_ids
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from llava.token_places import image_panels, token_cells
from tests.support.configured import configured
from tests.support.paths import GOLDEN

FOLDER = GOLDEN / "flashsloth/tiny_flashsloth"
IMAGE, LEARNABLE = -200, 280
ASKED = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
pytestmark = pytest.mark.usefixtures("no_grad")


def load(folder=FOLDER, **how):
    return FlashSlothForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    return tmp_path


def pixels(*shape, seed=0):
    return torch.randn(*shape, 3, 384, 384, generator=torch.Generator().manual_seed(seed))


def prompt(words, before=32, seed=0):
    """Ids with an image, a line break and a question of some words."""
    ids = torch.randint(1, 270, (before + words + 4,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [*ids[:before], IMAGE, *ids[before : before + words + 1], LEARNABLE, *ids[-3:]]


def batch(*rows):
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def update_of(model, rows, images):
    ids, mask = batch(*rows)
    return model.prepare_multimodal(ids, mask, None, images).update


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_config():
    assert architecture_of({"model_type": "flashsloth", "mm_projector_type": "mlp2x_gelu"}) is FlashSlothForCausalLM
    assert architecture_of({"architectures": ["FlashSlothForCausalLM"], "model_type": "phi"}) is FlashSlothForCausalLM
    assert architecture_of({"model_type": "phi", "architectures": ["PhiForCausalLM"]}) is None


def give_tokenizer(folder):
    """A byte-level vocabulary as Phi-2's files are, without the tokenizer.json of a fast one."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({**dict(zip(letters, range(256), strict=True)), "is": 256}))
    (folder / "merges.txt").write_text("#version: 0.2\ni s\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CodeGenTokenizer"}))


def test_loaded_like_every_checkpoint(folder):
    """Phi-2 keeps the rows of its embedding that no token has; "<learnable>" has its id whatever the tokenizer says."""
    give_tokenizer(folder)
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), torch_dtype="float32", device_map="cpu")
    assert type(tokenizer) is GPT2Tokenizer and model.get_input_embeddings().weight.shape[0] == 300 > len(tokenizer)
    conversation = conv_templates[model.about.template].copy()
    conversation.append_message(conversation.roles[0], model.question_text("What is it?", "image", 1))
    conversation.append_message(conversation.roles[1], None)
    ids = model.prompt_ids(conversation.get_prompt(), tokenizer)
    assert conversation.get_prompt().endswith("USER: <image>\nWhat is it?<learnable> ASSISTANT:")
    assert (ids == LEARNABLE).sum() == (ids == IMAGE).sum() == 1
    assert (
        tokenizer.decode(ids[int((ids == IMAGE).nonzero()) + 1 : int((ids == LEARNABLE).nonzero())]) == "\nWhat is it?"
    )
    images = model.image_inputs([Image.new("RGB", (50, 90))], processor)
    (group,) = model.prepare_multimodal(ids[None], None, None, images).update.groups
    assert group.words[1] - group.words[0] == len(tokenizer("What is it?").input_ids) and group.start == group.words[1]


def test_answers_end_at_the_templates_separator(folder):
    """Phi-2's tokenizer has no such token: it is found in the text."""
    give_tokenizer(folder)
    tokenizer, model, *_ = load_pretrained_model(str(folder), torch_dtype="float32", device_map="cpu")
    words = tokenizer("is </s> and on").input_ids
    answer = {
        "prefix_allowed_tokens_fn": lambda sample, sent: [words[len(sent)]],
        **ASKED,
        "max_new_tokens": len(words),
    }
    (ids,) = model.generate(torch.tensor([prompt(6)]), images=pixels(1), **answer)
    assert tokenizer.decode(ids) == "is </s>"
    (ids,) = model.generate(input_ids=torch.tensor([[4, 5]]), **answer)
    assert tokenizer.decode(ids) == "is </s>"


def test_saved_and_loaded_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    shutil.copytree(FOLDER / "vision_tower", tmp_path / "vision_tower")
    ids = torch.tensor([prompt(5)])
    first, second = (m.generate(ids, images=pixels(1), **ASKED) for m in (model, load(tmp_path)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("change", ["missing", "more"])
def test_half_checkpoints_and_unknown_weights_are_errors(folder, change):
    weights = load_file(folder / "model.safetensors")
    if change == "missing":
        del weights["model.lqformer.up_projector.bias"]
    else:
        weights["model.lqformer.extra.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lqformer.up_projector.bias" if change == "missing" else "lqformer.extra"
    ):
        load(folder)


def test_too_few_layers_are_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYER}))
    with pytest.raises(CheckpointError, match="more than 7 decoder layers, got 7"):
        load(folder)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_are_padded_or_cut_in_quarters(model):
    processor = model.get_vision_tower().image_processor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8))
    (padded,) = model.image_inputs([picture], processor)
    assert padded.shape == (3, 384, 384) and torch.all(padded[:, :80] == padded[0, 0, 0])
    sharp = copy.copy(model.config)
    sharp.image_hd = True
    model = copy.copy(model)
    model.config = sharp
    views = model.image_inputs([picture, picture], processor)
    assert views.shape == (2, 5, 3, 384, 384) and torch.equal(views[0], views[1])
    squeezed = processor.preprocess(picture.resize((384, 384)))["pixel_values"]
    torch.testing.assert_close(views[0, 0], squeezed[0])
    assert torch.all(views[0, 1, :, :160] == padded[0, 0, 0])  # the upper left quarter begins with padding
    big = torch.cat([torch.cat([views[0, 1], views[0, 2]], -1), torch.cat([views[0, 3], views[0, 4]], -1)], -2)
    assert (torch.nn.functional.avg_pool2d(big, 2) - padded).abs().mean() < 0.1


def test_regions_at_the_edge_are_smaller():
    pooling = RegionPooling(4).eval()
    patches = torch.randn(1, 25, 4)
    tokens = pooling(patches)
    assert tokens.shape == (1, 4, 4)
    corner = patches[:, [18, 19, 23, 24]]
    weights = pooling.mlp(corner).softmax(1)
    torch.testing.assert_close(tokens[:, 3], (weights * corner).sum(1))
    with pytest.raises(ValueError, match="square views, got 24"):
        pooling(patches[:, :24])


# -- queries -----------------------------------------------------------------------------------------------------------


def test_a_query_is_repeated_in_prompts_with_an_image_alone():
    ids = torch.tensor([[5, IMAGE, LEARNABLE, 6], [5, LEARNABLE, 6, 0]])
    asked = with_query_ids(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), ids.clamp(min=0), LEARNABLE, 3)
    assert asked.input_ids[0].tolist() == [5, IMAGE, *[LEARNABLE] * 3, 6]
    assert asked.input_ids[1][asked.attention_mask[1]].tolist() == [5, LEARNABLE, 6]
    assert asked.labels[0].tolist() == [5, 0, -100, -100, -100, 6] and asked.groups == [(0, 2)]


def test_every_turn_of_a_chat_has_its_queries(model):
    chat = "A chat. USER: <image>\nWhat is it?<learnable> ASSISTANT: A dog.</s>USER: Where? ASSISTANT:"
    assert model.whole_prompt(chat) == chat.replace("Where?", "Where?<learnable>")
    text = "A chat. USER: Who are you? ASSISTANT:"
    assert model.whole_prompt(text) == text and model.whole_prompt("<image> alone") == "<image> alone"


def test_the_question_is_found_behind_a_system_text_of_any_length(model):
    for before in (32, 5, 50):
        (group,) = update_of(model, [prompt(6, before)], pixels(1)).groups
        assert (group.words, group.start) == ((before + 82, before + 88), before + 88)


def test_refreshing_changes_the_answer_and_reads_every_patch(model):
    ids, images = torch.tensor([prompt(6)]), pixels(1)
    update = model.prepare_multimodal(ids, None, None, images).update
    hidden = torch.randn(1, 132, 40)
    fresh = update(hidden, None)
    rows = slice(update.groups[0].start, update.groups[0].start + QUERIES)
    assert torch.equal(fresh[:, : rows.start], hidden[:, : rows.start]) and torch.equal(
        fresh[:, rows.stop :], hidden[:, rows.stop :]
    )
    other = copy.copy(update.image)
    other[0, 700] += 3.0
    again = type(update)(**{**vars(update), "image": other})(hidden, None)
    assert (again - fresh)[:, rows].abs().max() > 0


def test_queries_find_their_rows_where_others_are_gone(model):
    update = update_of(model, [prompt(6)], pixels(1))
    hidden = torch.randn(1, 132, 40)
    kept = torch.cat([torch.arange(40), torch.arange(100, 132)])[None]
    whole = update(hidden, None)
    torch.testing.assert_close(update(hidden[:, kept[0]], kept), whole[:, kept[0]])


def test_a_question_without_words_has_queries_all_the_same(model):
    (group,) = update_of(model, [prompt(0)], pixels(1)).groups
    assert group.words[0] == group.words[1]
    assert torch.isfinite(model(input_ids=torch.tensor([prompt(0)]), images=pixels(1)).logits).all()
    module = EmbeddedQuery(40, 32, 4)
    queries, image = torch.randn(2, 9, 40), torch.randn(2, 5, 32)
    none, padding = torch.zeros(2, 0, 40), torch.zeros(2, 3, 40)
    torch.testing.assert_close(
        module(queries, image, none, torch.zeros(2, 0)), module(queries, image, padding, torch.zeros(2, 3))
    )


def test_later_turns_read_their_own_question_in_training(model):
    row = [*prompt(6), *[7, 8, 9, 10, 11], LEARNABLE, 3]
    labels = torch.tensor([[-100] * (len(row) - 7) + [7, 8] + [-100] * 5])
    ids = torch.tensor([row])
    first, second = model.prepare_multimodal(ids, None, None, pixels(1)).update.groups
    assert first.words == second.words
    first, second = model.prepare_multimodal(ids, None, labels, pixels(1)).update.groups
    assert second.words == (first.start + QUERIES + 3 + 1 + 3, second.start) and first.words[1] == first.start


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_gives_the_answers_of_its_samples(model):
    """One view, five views and text alone, of different length."""
    rows, text = [prompt(6), prompt(11, before=20, seed=1)], [4, 5, LEARNABLE, 9]
    images = [pixels(1), pixels(5, seed=1)]
    ids, mask = batch(*rows, text)
    together = model.generate(ids, images=images, attention_mask=mask, **ASKED)
    alone = [
        model.generate(torch.tensor([row]), images=image[None], **ASKED)
        for row, image in zip(rows, images, strict=True)
    ]
    alone.append(model.generate(torch.tensor([text]), **ASKED))
    assert torch.equal(together, torch.cat(alone))


def test_forward_pads_on_the_right_and_gives_the_same_logits(model):
    rows, images = [prompt(6), prompt(11, before=20, seed=1)], pixels(2)
    ids, mask = batch(*rows)
    logits = model(input_ids=ids, attention_mask=mask, images=images).logits
    for row, image, together in zip(rows, images, logits, strict=True):
        own = model(input_ids=torch.tensor([row]), images=image[None]).logits[0]
        torch.testing.assert_close(together[: len(own)], own, atol=1e-4, rtol=1e-4)


def test_queries_read_all_images_of_their_prompt(model):
    row = [*range(1, 30), IMAGE, IMAGE, 5, 6, 7, LEARNABLE, 8]
    update = update_of(model, [row, prompt(3)], pixels(3))
    assert update.image.shape == (2, 2 * 729, 32) and update.mask.sum(1).tolist() == [2 * 729, 729]
    assert torch.isfinite(model(input_ids=torch.tensor([row]), images=pixels(2)).logits).all()


def test_beams_begin_with_refreshed_queries(model):
    rows = [prompt(6), prompt(6, seed=1)]
    ids, mask = batch(*rows)
    beams = model.generate(ids, images=pixels(2), attention_mask=mask, num_beams=3, **ASKED)
    alone = [model.generate(ids[i : i + 1], images=pixels(2)[i : i + 1], num_beams=3, **ASKED) for i in range(2)]
    assert torch.equal(beams, torch.cat(alone))


def test_text_alone_is_plain_phi(model):
    ids = torch.tensor([[4, 5, LEARNABLE, 9]])
    plain = super(FlashSlothForCausalLM, model).forward(input_ids=ids).logits
    with record() as requests:
        model.generate(ids, **ASKED)
    assert torch.equal(model(input_ids=ids).logits, plain) and requests[0].samples[0].length == 4


def test_weights_may_lie_elsewhere(model, tmp_path):
    places = {f"model.{name}": "disk" for name, _ in model.get_model().named_children()} | {"lm_head": "cpu"}
    offloaded = load(device_map=places | {"model.final_layernorm": "cpu"}, offload_folder=str(tmp_path))
    ids = torch.tensor([prompt(6)])
    first, second = (each.generate(ids, images=pixels(1), **ASKED) for each in (model, offloaded))
    assert torch.equal(first, second)


def test_half_precision(model):
    ids = torch.tensor([prompt(6)])
    exact = model(input_ids=ids, images=pixels(1)).logits
    for dtype, close in ((torch.float16, 0.3), (torch.bfloat16, 3.0)):
        logits = copy.deepcopy(model).to(dtype)(input_ids=ids, images=pixels(1).to(dtype)).logits
        assert logits.dtype == dtype and (logits.float() - exact).abs().max() < close


def test_training_reaches_queries_and_pooling(model):
    trained = copy.deepcopy(model).train()
    with torch.enable_grad():
        ids = torch.tensor([prompt(6)])
        labels = ids.clone()
        labels[:, :-2] = -100
        trained(input_ids=ids, images=pixels(1), labels=labels).loss.backward()
    decoder = trained.get_model()
    for weight in (decoder.learnable_tokens.token, decoder.lqformer.up_projector.weight, decoder.pooling.mlp[0].weight):
        assert weight.grad.abs().sum() > 0


def test_what_the_loop_cannot_give_is_refused(model):
    ids = torch.tensor([prompt(6)])
    with pytest.raises(MethodError, match="output_hidden_states is not available for prompts with images"):
        model(input_ids=ids, images=pixels(1), output_hidden_states=True)
    with pytest.raises(MethodError, match="FlashSloth needs a DynamicCache"):
        model.generate(ids, images=pixels(1), cache_implementation="static", **ASKED)
    with pytest.raises(ValueError, match="FlashSloth reads images, not videos"):
        model.generate(ids, images=[pixels(2)], modalities=["video"], **ASKED)


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_in_front_of_the_queries_and_behind_them(model):
    ids, asked = torch.tensor([prompt(6)]), {"images": pixels(1), **ASKED}
    dense = model.generate(ids, **asked)
    for layer in (2, LAYER, LAYER + 1):
        with accelerate(model, "fastv", k=layer, retention_ratio=1.0):
            assert torch.equal(model.generate(ids, **asked), dense)
    both = {"random.retention_ratio": 0.5, "fastv.k": 2, "fastv.r": 0.5}
    with accelerate(model, "random+fastv", **both), record() as requests:
        model.generate(ids, **asked)
    (sample,) = requests[0].samples
    assert (sample.visual_tokens_before, sample.visual_tokens_after) == (81, 40) and model.own_macs(sample) > 0
    assert requests[0].layer_lengths(0)[:3] == [91, 91, 71]


@pytest.mark.parametrize("method", [name for name in sorted(available()) if runs_on(name, "flashsloth")])
def test_methods_of_the_table_run(model, method):
    ids, mask = batch(prompt(6), prompt(9, before=11, seed=1))
    with accelerate(model, configured(method)), record() as requests:
        assert model.generate(ids, images=pixels(2), attention_mask=mask, **ASKED).shape == (2, 4)
    assert [sample.visual_tokens_before for sample in requests[0].samples] == [81, 81]


def test_a_picture_shows_regions_where_they_are(model):
    ids, picture = torch.tensor([prompt(6)]), Image.new("RGB", (60, 60))
    processor = model.get_vision_tower().image_processor
    with accelerate(model, "random", retention_ratio=0.5), record() as requests:
        model.generate(ids, images=model.image_inputs([picture], processor), **ASKED)
        panels = image_panels(picture, processor, "pad", None)
        (cells,) = token_cells(model, requests[0].samples[0].items[0], panels, "plain")
    assert cells.state.shape == (9, 9) and np.allclose(cells.xs, np.linspace(0, 1, 10), atol=0.02)


def test_the_work_of_pooling_and_queries_is_what_torch_counts(model):
    words = 7
    sample = SampleRecord(items=[ItemRecord("image", 162, 162)], dense_length=162 + QUERIES + words)
    features, decoder = torch.randn(2, 729, 32), model.get_model()
    with FlopCounterMode(display=False) as counter:
        model.project(features)
        decoder.lqformer(
            torch.randn(1, 9, 40), features.view(1, -1, 32), torch.randn(1, words, 40), torch.ones(1, words)
        )
    assert model.own_macs(sample) == pytest.approx(counter.get_total_flops() // 2, rel=0.01)  # the weighted sums


def test_a_cut_in_front_of_the_queries_leaves_a_batch_as_its_samples(model):
    rows = [prompt(6), prompt(11, before=20, seed=1)]
    ids, mask = batch(*rows)
    with accelerate(model, "fastv", k=2, retention_ratio=0.3):
        together = model.generate(ids, images=pixels(2), attention_mask=mask, **ASKED)
        alone = [
            model.generate(torch.tensor([r]), images=p[None], **ASKED) for r, p in zip(rows, pixels(2), strict=True)
        ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(("method", "says"), [("visionzip", "cls_attention"), ("framefusion", "video")])
def test_methods_without_their_signals_or_videos_are_refused(model, method, says):
    with pytest.raises(MethodError, match=f"{says}.*FlashSloth|FlashSloth.*{says}"):
        accelerate(model, method)
