"""HICom: its grammar, blocks and positions, the instruction, images of any resolution, checkpoints, methods on it."""

import copy
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from accelerate_methods import MethodError, accelerate, record
from accelerate_methods.hosts.tower_files import TowerError
from llava.model.architectures import architecture_of
from llava.model.architectures.hicom import HIComQwen2ForCausalLM
from llava.model.architectures.hicom.blocks import block_starts, in_blocks
from llava.model.architectures.hicom.compressors import GlobalCompressor, LocalCompressor, positions
from llava.model.architectures.hicom.grammar import Global, Local, branches, with_mode
from llava.model.architectures.hicom.instruction import instruction_in
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError, load_config
from tests.support.architectures import changed
from tests.support.paths import GOLDEN
from tests.support.several_devices import SeveralDevices
from tests.support.texts import tiny_text_tokenizer

FOLDER = GOLDEN / "hicom/tiny_hicom"
IMAGE, VIDEO = -200, -201
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ANYRES = {
    "image_aspect_ratio": "anyres_max_2",
    "image_grid_pinpoints": "[[384, 768], [768, 384], [768, 768]]",
}
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint with a tokenizer for its text tower."""
    target = tmp_path_factory.mktemp("hicom") / "checkpoint"
    shutil.copytree(FOLDER, target)
    tiny_text_tokenizer(target / "vision_tower")
    return target


def load(folder, dtype=torch.float32, **keys):
    return HIComQwen2ForCausalLM.from_pretrained(folder, config=config_of(folder, **keys), dtype=dtype).eval()


def config_of(folder, **keys):
    config = load_config(HIComQwen2ForCausalLM.config_class, folder)
    for key, value in keys.items():
        setattr(config, key, value)
    return config


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def tiled(folder, tmp_path_factory):
    """A model of any-resolution images."""
    weights = load_file(folder / "model.safetensors") | {"model.image_newline": torch.arange(48.0).half()}
    return load(changed(folder, tmp_path_factory.mktemp("tiled") / "checkpoint", weights, **ANYRES))


def pixels(*shape, seed=0):
    coarse = torch.randn(*shape, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return coarse.repeat_interleave(32, -2).repeat_interleave(32, -1)


def guide(count=1, seed=0):
    return torch.randint(3, 60, (count, 64), generator=torch.Generator().manual_seed(seed))


def spliced(model, ids, images, mask=None, **how):
    return model.prepare_multimodal(torch.tensor(ids), mask, None, images, **how)


# -- grammar -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "use_guide", "local", "whole"),
    [
        ("local43_global32", "direct", Local(4, 3, "", "direct"), Global(32, False, "direct")),
        ("local43_global32_coarse", "direct", Local(4, 3, "", "direct"), Global(32, False, "direct")),
        ("local43_global32_guidecoarse", "direct", Local(4, 3, "", "direct"), Global(32, False, "coarse")),
        ("local412_adaptkv_global8_adaptg", "off", Local(4, 12, "kv", "off"), Global(8, True, "off")),
        ("local13_adaptqkvg_guidefine", None, Local(1, 3, "qkvg", "fine"), None),
        ("global16_guideoff", "direct", None, Global(16, False, "off")),
    ],
)
def test_projector_types(kind, use_guide, local, whole):
    assert branches(kind, use_guide) == (local, whole)


@pytest.mark.parametrize(
    "kind", ["local4_global32", "local_global32", "local43_global", "local40", "local43_guidehard"]
)
def test_projector_types_that_say_too_little(kind):
    with pytest.raises(CheckpointError, match=r"mm_projector_type|ways off, direct"):
        branches(kind, "direct")


@pytest.mark.parametrize(
    ("branch", "expected"),
    [("local", "local43_adaptkv_guidecoarse_global32"), ("global", "local43_adaptkv_global32_guidecoarse")],
)
def test_a_mode_in_so_many_words(branch, expected):
    assert with_mode("local43_adaptkv_global32", branch, "coarse") == expected
    assert {x.mode for x in branches(expected, "direct")} == {"direct", "coarse"}


# -- blocks and positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kernel", "starts"),
    [
        (8, 4, [0, 4]),
        (7, 4, [0, 3]),
        (10, 3, [0, 3, 5, 7]),
        (2, 4, [0]),
        # an overlap of one does not make ends meet: evenly spaced
        (6, 4, [0, 2]),
        (5, 4, [0, 1]),
        (9, 4, [0, 3, 5]),
        (4, 3, [0, 1]),
    ],
)
def test_blocks_of_an_axis(size, kernel, starts):
    assert block_starts(size, kernel) == starts


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
def test_blocks_cover_every_patch(kernel):
    for size in range(1, 30):
        starts, length = block_starts(size, kernel), min(size, kernel)
        covered = {place for start in starts for place in range(start, start + length)}
        assert covered == set(range(size)) and len(starts) == -(-size // kernel)


def test_patches_of_a_block_are_in_the_order_of_time_row_column():
    grid = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6, 1)
    block = in_blocks(grid, (2, 2, 3))[0, 0, 1, 1, :, 0]
    assert block.tolist() == [15, 16, 17, 21, 22, 23, 39, 40, 41, 45, 46, 47]


def test_attention_stays_inside_the_block():
    """Against a loop over the blocks, with sizes that no kernel divides."""
    torch.manual_seed(0)
    module = LocalCompressor(Local(4, 3, "", "coarse"), 16, 16, 24, 16)
    features, embeds, asked = torch.randn(2, 6, 4, 8, 16), torch.randn(2, 6, 4, 8, 16), torch.randn(2, 1, 16)
    found = module(features, embeds, asked, still=False)
    mean = torch.nn.functional.interpolate(features.movedim(-1, 1), size=(2, 2, 3), mode="trilinear").movedim(1, -1)
    query = module.guide_injector(mean.flatten(1, 3), asked).view(2, 2, 2, 3, 16)
    starts = [block_starts(size, kernel) for size, kernel in zip((6, 4, 8), (4, 3, 3), strict=True)]
    for b, t, h, w in np.ndindex(2, 2, 2, 3):
        place = [slice(s[i], s[i] + k) for s, i, k in zip(starts, (t, h, w), (4, 3, 3), strict=True)]
        keys, values = embeds[b][tuple(place)].reshape(-1, 16), features[b][tuple(place)].reshape(-1, 16)
        weights = (keys @ query[b, t, h, w] / 4).softmax(0)
        torch.testing.assert_close(found[b, t, h, w], module.readout(weights @ values), atol=1e-5, rtol=1e-4)


def test_positions_are_sums_of_sines():
    frames, rows, columns, width = 3, 4, 5, 6
    found = positions((frames, rows, columns, width), torch.device("cpu"))

    def axis(place, channel):
        angle = place / 10000 ** (channel // 2 * 2 / width)
        return np.cos(angle) if channel % 2 else np.sin(angle)

    for t, h, w, c in [(2, 3, 4, 0), (1, 0, 2, 3), (0, 1, 1, 5)]:
        assert found[t, h, w, c].item() == pytest.approx(axis(t, c) + axis(h, c) + axis(w, c), abs=1e-6)


def test_direct_queries_are_all_the_instruction():
    torch.manual_seed(0)
    module = GlobalCompressor(Global(5, False, "direct"), 32, 32, 24, 16)
    tokens = module(torch.randn(1, 2, 3, 3, 32), torch.randn(1, 1, 32))
    assert torch.equal(tokens[0, 0].expand(5, -1), tokens[0])


def test_an_instruction_of_another_width_is_brought_to_the_queries():
    module = GlobalCompressor(Global(5, True, "coarse"), 32, 16, 24, 16)
    assert module(torch.randn(2, 2, 3, 3, 32), torch.randn(2, 1, 16)).shape == (2, 5, 24)
    with pytest.raises(CheckpointError, match="can only be injected 'direct', not 'coarse'"):
        LocalCompressor(Local(4, 3, "", "coarse"), 32, 16, 24, 16)


# -- the instruction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "What is it?",
        "<video>\nWhat is it?\nAnswer the question using a single word or phrase.",
        "Question: What is it?\nOptions:\n(A) a cat\n(B) a dog\nOnly give the best option.",
        "What is it?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly.",
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWhat is it?\nA. a cat\nB. a dog\nThe best answer is: ",
    ],
)
def test_the_bare_question(text):
    assert instruction_in(text) == "What is it?"


def test_a_text_without_a_question_stays():
    assert instruction_in("A. a cat\nB. a dog") == "A. a cat\nB. a dog"
    assert instruction_in("Who is A. Smith?") == "Who is A. Smith?"


def test_every_way_to_give_the_instruction(model):
    tokens, images, asked = model.get_vision_tower().tokens, pixels(1), [[1, IMAGE, 5]]
    ids = tokens.padded(["what is it ?"])
    assert ids.shape == (1, 64) and ids[0, -1] == 1
    found = [
        spliced(model, asked, images, guided_input=ids),
        spliced(model, asked, images, guided_input={"input_ids": ids, "attention_mask": ids != 1}),
        spliced(model, asked, images, guide_instruct="what is it ?"),
        spliced(model, asked, images, questions=["what is it ?\nA. a cat\nB. a dog"]),
    ]
    assert all(torch.equal(one.inputs_embeds, found[0].inputs_embeds) for one in found)
    other = spliced(model, asked, images, questions=["how many are there ?"])
    assert not torch.equal(other.inputs_embeds, found[0].inputs_embeds)


def test_an_instruction_is_needed(model):
    with pytest.raises(MethodError, match="HICom reads the question, and nothing says what it is"):
        model.generate(torch.tensor([[1, IMAGE, 5]]), images=pixels(1), **GREEDY)
    with pytest.raises(MethodError, match=r"ids \[n, 64\].*got \[3, 64\]"):
        spliced(model, [[1, IMAGE, 5]], pixels(1), guided_input=guide(3))


def test_a_tokenizer_that_is_not_there_is_told(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "checkpoint")
    with pytest.raises(MethodError, match=r"tokenizer of 'google/siglip.*folder vision_tower, or give guided_input"):
        spliced(load(tmp_path / "checkpoint"), [[1, IMAGE, 5]], pixels(1), questions=["what is it ?"])


# -- images and videos -------------------------------------------------------------------------------------------------


def test_a_batch_gives_the_tokens_of_its_samples(model):
    """Two videos of one form, one of another, an image, and text."""
    ids = torch.tensor([[1, IMAGE, 5, IMAGE, 6], [0, 1, IMAGE, IMAGE, 7], [0, 0, 4, 5, 6]])
    images = [pixels(4), pixels(4, seed=1), pixels(6, seed=2), pixels(seed=3)]
    kinds, questions = ["video", "video", "video", "image"], ["what is it ?", "how many are there ?", "who ?"]
    mask = (ids != 0).long()
    batch = model.generate(ids, images=images, modalities=kinds, questions=questions, attention_mask=mask, **GREEDY)
    one = model.generate(ids[:1], images=images[:2], modalities=kinds[:2], questions=questions[:1], **GREEDY)
    two = model.generate(ids[1:2, 1:], images=images[2:], modalities=kinds[2:], questions=questions[1:2], **GREEDY)
    text = model.generate(ids[2:, 2:], **GREEDY)
    assert torch.equal(batch, torch.cat([one, two, text]))


def test_official_forms(model):
    """Triples of views, size and kind, and the placeholder of videos."""
    video, asked = pixels(5), {"guided_input": guide()}
    ours = spliced(model, [[1, IMAGE, 5]], [video], modalities="video", **asked)
    assert ours.lengths == [2 + 2 * 81 + 32]
    official = spliced(model, [[1, VIDEO, 5]], [(video, None, "video")], **asked)
    by_placeholder = spliced(model, [[1, VIDEO, 5]], [video], **asked)
    assert torch.equal(official.inputs_embeds, ours.inputs_embeds)
    assert torch.equal(by_placeholder.inputs_embeds, ours.inputs_embeds)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_placeholder_without_a_video_is_an_error(model, call):
    with pytest.raises(ValueError, match="hold 1 <image> placeholders but 0 images or videos"):
        getattr(model, call)(torch.tensor([[1, VIDEO, 5]]))


def test_tiles_are_one_map_for_both_branches(tiled):
    """A wide image: the whole, a newline, then rows of blocks of the unpadded map with a newline each, then queries."""
    views, size = pixels(3), (800, 250)
    found = spliced(tiled, [[1, IMAGE, 5]], [views], image_sizes=[size], guided_input=guide())
    projector, newline = tiled.get_model().mm_projector, tiled.get_model().image_newline
    features, embeds = tiled.get_vision_tower().see(views)
    asked = tiled.get_vision_tower().read(guide(), False)

    def unpadded(states):
        whole = torch.cat([states[1], states[2]], dim=1)  # two tiles beside each other: 27 x 54
        return whole[(27 - 16) // 2 : 27 - (27 - 16) // 2]  # 54 * 250 / 800 = 16 rows

    big = [unpadded(states)[None, None] for states in (features, embeds)]
    base = projector("local", features[None, :1], embeds[None, :1], asked, True)[0].flatten(0, 2)
    blocks = projector("local", *big, asked, True)[0, 0]
    queries = projector("global", big[0], asked)[0]
    rows = torch.cat([blocks, newline.expand(len(blocks), 1, -1)], dim=1).flatten(0, 1)
    expected = torch.cat([base, newline[None], rows, queries])
    torch.testing.assert_close(found.inputs_embeds[0, 1:-1], expected)
    assert found.visual[0].sum() == len(base) + blocks.shape[0] * blocks.shape[1] + 32


def test_large_maps_are_shrunk(tiled):
    views = pixels(5)
    (item,) = spliced(tiled, [[1, IMAGE, 5]], [views], image_sizes=[(700, 700)], guided_input=guide()).spans[0]
    side = int(54 // 2**0.5)  # of at most two tiles' patches
    assert item.num_content == 81 + (-(-side // 3)) ** 2 + 32


def test_tiles_need_a_model_of_any_resolution(model):
    with pytest.raises(ValueError, match=r"3 views needs an any-resolution model.*modalities=\['video'\]"):
        spliced(model, [[1, IMAGE, 5]], [pixels(3)], image_sizes=[(800, 250)], guided_input=guide())


@pytest.mark.parametrize(("position", "newlines"), [("no_token", 0), ("one_token", 1), ("frame", 2), ("grid", 18)])
def test_newlines_of_videos(tiled, position, newlines):
    config = tiled.config
    before, config.mm_newline_position = config.mm_newline_position, position
    try:
        found = spliced(tiled, [[1, IMAGE, 5]], [pixels(8)], modalities="video", guided_input=guide())
    finally:
        config.mm_newline_position = before
    assert found.lengths == [2 + 2 * 81 + newlines + 32] and found.visual.sum() == 2 * 81 + 32
    newline = tiled.get_model().image_newline
    assert (found.inputs_embeds[0] == newline).all(-1).sum() == newlines


def test_a_model_without_newline_says_so(model):
    before, model.config.mm_newline_position = model.config.mm_newline_position, "frame"
    try:
        with pytest.raises(ValueError, match=r"'frame'.*no model\.image_newline"):
            spliced(model, [[1, IMAGE, 5]], [pixels(8)], modalities="video", guided_input=guide())
    finally:
        model.config.mm_newline_position = before


def test_frames_are_the_middles_of_equal_parts(model):
    assert model.frame_indices(101, 25.0, max_frames_num=4) == [13, 38, 63, 88]
    assert len(model.frame_indices(10, 25.0)) == 32
    assert model.frame_indices(1, 1.0, max_frames_num=3) == [0, 0, 0]


def test_frames_are_padded_in_grey_unless_images_are_tiled(model, tiled):
    frames = np.full((2, 40, 80, 3), 255, dtype=np.uint8)
    padded, squeezed = (m.video_inputs(frames, m.get_vision_tower().image_processor) for m in (model, tiled))
    assert padded.shape == squeezed.shape == (2, 3, 384, 384)
    assert padded[0, 0, 192].min() == 1 and padded[0, 0, 10].max().abs() < 0.01  # white, and grey above it
    assert squeezed.min() == 1


def test_several_pictures_are_padded_also_where_one_is_tiled(tiled):
    processor, picture = tiled.get_vision_tower().image_processor, Image.new("RGB", (80, 20), "white")
    assert tiled.image_inputs([picture], processor).shape == (1, 3, 3, 384, 384)
    assert tiled.image_inputs([picture] * 2, processor).shape == (2, 3, 384, 384)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_told_by_their_config():
    for config in ({"mm_projector_type": "local43_global32"}, {"architectures": ["HIComQwen2ForCausalLM"]}):
        assert architecture_of(config) is HIComQwen2ForCausalLM
    assert architecture_of({"mm_projector_type": "mlp2x_gelu"}) is None


def test_the_weights_say_how_the_instruction_is_injected(folder, model):
    """Released scripts write a mode that the grammar does not know."""
    with pytest.warns(UserWarning, match="says 'direct' for the global branch, and its weights are for 'coarse'"):
        followed = load(folder, mm_projector_type="local43_global32_coarse")
    assert followed.config.mm_projector_type == "local43_global32_coarse_guidecoarse"
    images, asked = pixels(1), {"guided_input": guide()}
    assert torch.equal(
        spliced(followed, [[1, IMAGE, 5]], images, **asked).inputs_embeds,
        spliced(model, [[1, IMAGE, 5]], images, **asked).inputs_embeds,
    )


def test_loaded_as_any_checkpoint_and_saved_in_the_official_format(folder, tmp_path):
    source, again = tmp_path / "source", tmp_path / "again"
    shutil.copytree(folder, source)
    for path in (GOLDEN / "checkpoints/tiny-llava-onevision").glob("*"):
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            shutil.copy(path, source)
    how = {"torch_dtype": "float32", "device_map": "cpu"}
    tokenizer, loaded, processor, _ = load_pretrained_model(str(source), None, "llava_qwen", **how)
    assert processor.crop_size == {"height": 384, "width": 384}
    loaded.resize_token_embeddings(300)
    loaded.save_pretrained(again)
    assert set(load_file(again / "model.safetensors")) == set(load_file(FOLDER / "model.safetensors"))
    shutil.copytree(folder / "vision_tower", again / "vision_tower")
    tokenizer.save_pretrained(again)
    _, once_more, *_ = load_pretrained_model(str(again), **how)
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    assert torch.equal(
        once_more.generate(ids, images=pixels(1), guided_input=guide(), **GREEDY),
        loaded.generate(ids, images=pixels(1), guided_input=guide(), **GREEDY),
    )
    # the question is read out of the prompt
    text = tokenizer("what is it ?").input_ids
    asked = torch.tensor([[1, IMAGE, *text]])
    read = spliced(once_more, asked.tolist(), pixels(1))
    given = spliced(once_more, asked.tolist(), pixels(1), questions=[tokenizer.decode(text)])
    assert torch.equal(read.inputs_embeds, given.inputs_embeds)


def test_towers_come_from_their_own_files_where_the_checkpoint_has_none(folder, tmp_path, model):
    weights = load_file(folder / "model.safetensors")
    start = ("model.vision_tower.vision_tower.", "model.vision_tower.guide_encoder.")
    own = {
        name.removeprefix(start[0]).removeprefix(start[1]): v for name, v in weights.items() if name.startswith(start)
    }
    rest = {name: value for name, value in weights.items() if not name.startswith(start)}
    target = changed(folder, tmp_path / "bare", rest)
    save_file(own, target / "vision_tower/model.safetensors", {"format": "pt"})
    bare, asked = load(target), {"guided_input": guide()}
    with pytest.raises(RuntimeError, match="vision tower is not loaded"):
        spliced(bare, [[1, IMAGE, 5]], pixels(1), **asked)
    bare.get_vision_tower().load_model()
    assert torch.equal(
        spliced(bare, [[1, IMAGE, 5]], pixels(1), **asked).inputs_embeds,
        spliced(model, [[1, IMAGE, 5]], pixels(1), **asked).inputs_embeds,
    )


@pytest.mark.parametrize("name", ["global_compressor.query", "text_model.head", "vision_model.encoder.layers.2"])
def test_half_checkpoints_are_refused(folder, tmp_path, name):
    weights = load_file(folder / "model.safetensors")
    half = {key: value for key, value in weights.items() if name not in key}
    with pytest.raises(CheckpointError, match="weights missing"):
        load(changed(folder, tmp_path / "half", half))


@pytest.mark.parametrize("name", ["model.mm_projector.local_compressor.k_alpha", "model.vision_tower.logit_scale"])
def test_weights_without_a_place_are_refused(folder, tmp_path, name):
    weights = load_file(folder / "model.safetensors") | {name: torch.zeros(1)}
    with pytest.raises(CheckpointError, match="no place for 1 of its weights"):
        load(changed(folder, tmp_path / "more", weights))


def test_configs_that_contradict_themselves_are_refused(folder):
    with pytest.raises(CheckpointError, match="use_guide 'off' switches its reader off"):
        load(folder, use_guide="off")
    with pytest.raises(CheckpointError, match="HIComLlamaForCausalLM; released are models on Qwen2"):
        load(folder, architectures=["HIComLlamaForCausalLM"])
    clip = str(GOLDEN / "checkpoints/tiny-llava-1.5/vision_tower")
    with pytest.raises(TowerError, match="released is a model with SigLIP"):
        HIComQwen2ForCausalLM(config_of(folder, mm_vision_tower=clip, name_or_path="", tower_checkpoint=clip))


@pytest.mark.parametrize(
    ("kind", "use_guide", "scale"),
    [
        ("local43_adaptqkv_global8", "off", ""),
        ("local23_adaptkvg_guidefine_global8_adaptg_guidefine", "fine", "local,global"),
        ("local43_global8_guidefine", "direct", "global"),
        ("local43", "coarse", "local"),
        ("global8", "coarse", ""),
        ("mlp2x_gelu", "off", ""),
        ("linear", "off", ""),
    ],
)
def test_every_kind_of_projector_runs(folder, kind, use_guide, scale):
    torch.manual_seed(0)
    built = HIComQwen2ForCausalLM(
        config_of(folder, mm_projector_type=kind, use_guide=use_guide, use_clip_scale=scale, delay_load=False)
    ).eval()
    ids, asked = torch.tensor([[1, IMAGE, 5, IMAGE, 6]]), {"guided_input": guide(2)}
    images = [pixels(3), pixels(seed=1)]
    exact = built(input_ids=ids, images=images, modalities=["video", "image"], **asked).logits
    assert exact.isfinite().all() and exact.shape[1] > 4
    for dtype in (torch.float16, torch.bfloat16):
        near = built.to(dtype)(input_ids=ids, images=images, modalities=["video", "image"], **asked).logits
        assert (near.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(folder, model, dtype):
    ids, video = torch.tensor([[1, VIDEO, 5, 6]]), pixels(3)
    asked = {"guided_input": guide()}
    half = load(folder, dtype=dtype)
    near = half(input_ids=ids, images=[video.to(dtype)], **asked).logits
    exact = model(input_ids=ids, images=[video], **asked).logits
    assert near.dtype == dtype and (near.float() - exact).norm() < 0.05 * exact.norm()
    assert half.generate(ids, images=[video.to(dtype)], **asked, **GREEDY).shape == (1, 4)


def test_copies_answer_alike_and_beams_run(model):
    ids, asked = torch.tensor([[1, VIDEO, 5]]), {"images": [pixels(4)], "guided_input": guide()}
    assert torch.equal(copy.deepcopy(model).generate(ids, **asked, **GREEDY), model.generate(ids, **asked, **GREEDY))
    assert model.generate(ids, **asked, **{**GREEDY, "num_beams": 3}).shape == (1, 4)


def spread(copied, vision):
    """Layers, head and vision side on devices of their own."""
    places = {f"model.layers.{index}": f"cuda:{index % 2}" for index in range(3)}
    places |= {
        "model.embed_tokens": "cuda:0",
        "model.norm": "cuda:1",
        "model.rotary_emb": "cuda:0",
        "lm_head": "cuda:1",
    }
    dispatch_model(copied, places | vision | {"lm_head": "cuda:1"}, main_device="cuda:0", skip_keys="past_key_values")


def test_weights_may_lie_elsewhere(model):
    ids, asked = torch.tensor([[1, VIDEO, 5]]), {"images": [pixels(4)], "guided_input": guide()}
    expected = model.generate(ids, **asked, **GREEDY)
    away = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert away.get_model().mm_projector.global_compressor.query.is_meta
    assert torch.equal(away.generate(ids, **asked, **GREEDY), expected)
    copied = copy.deepcopy(model)
    with SeveralDevices():
        spread(copied, {"model.vision_tower": "cuda:2", "model.mm_projector": "cuda:3"})
        got = copied.generate(ids, **asked, **GREEDY)
    assert torch.equal(got.as_subclass(torch.Tensor), expected)


# -- methods -----------------------------------------------------------------------------------------------------------


def test_methods_on_tokens_and_inside_the_llm(model):
    ids, asked = torch.tensor([[1, VIDEO, 5, 6]]), {"images": [pixels(4)], "guided_input": guide()}
    dense = model.generate(ids, **asked, **GREEDY)
    with accelerate(model, "fastv", k=1, retention_ratio=1.0):
        assert torch.equal(model.generate(ids, **asked, **GREEDY), dense)
    both = {"divprune.retention_ratio": 0.5, "fastv.k": 1, "fastv.r": 0.5}
    with accelerate(model, "divprune+fastv", **both), record() as requests:
        model.generate(ids, **asked, **GREEDY)
    (sample,) = requests[0].samples
    assert (sample.visual_tokens_before, sample.visual_tokens_after) == (113, 56)
    assert requests[0].layer_lengths(0) == [59, 31, 31]


def test_methods_that_read_patches_are_refused(model):
    with pytest.raises(MethodError, match="HICom"):
        accelerate(model, "fastervlm")


@pytest.mark.parametrize("frames", [4, 8])
def test_own_work_is_what_torch_counts(model, frames):
    model = copy.deepcopy(model).requires_grad_(False)  # torch's counter fails on views of parameters
    ids, asked = torch.tensor([[1, VIDEO, 5]]), {"images": [pixels(frames)], "guided_input": guide()}
    with record() as requests:
        model.generate(ids, **asked, **GREEDY)
    with FlopCounterMode(display=False) as counter:
        spliced(model, ids.tolist(), **asked)
    with FlopCounterMode(display=False) as vision:
        model.get_vision_tower().see(pixels(frames))
    own = model.own_macs(requests[0].samples[0])
    assert own == pytest.approx(
        (counter.get_total_flops() - vision.get_total_flops()) // 2, rel=0.01
    )  # the text's head
