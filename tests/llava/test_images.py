"""Image processors, any-resolution grids and `process_images` of `llava` against the golden files and beyond."""

import base64
import io
import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from llava.image_processing import SigLipImageProcessor, load_clip_image_processor, load_image_processor
from llava.mm_utils import (
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    load_image_from_base64,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
)
from tests.conformance.adapters.base_text_image import ADAPTERS
from tests.conftest import skip_without_pillow_13
from tests.support.paths import TESTS as HERE

CHECKPOINTS = HERE / "golden/checkpoints"
CONTEXT = SimpleNamespace(checkpoint=lambda name: CHECKPOINTS / name)
CLIP_TOWER, SIGLIP_TOWER = (
    CHECKPOINTS / "tiny-llava-1.5/vision_tower",
    CHECKPOINTS / "tiny-llava-onevision/vision_tower",
)
GOLDEN = [path for kind in ("anyres_grid", "process") for path in sorted((HERE / "golden/base").glob(f"{kind}_*"))]


def _image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _config(mode, pinpoints=None):
    return SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=pinpoints)


# -- golden ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path):
    skip_without_pillow_13(path)
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    inputs = {name[3:]: t for name, t in tensors.items() if name.startswith("in.")}
    expected = {name[4:]: t for name, t in tensors.items() if name.startswith("out.")}
    outputs = ADAPTERS[case["method"], case["stage"]](inputs, case["params"], CONTEXT)
    assert outputs.keys() == expected.keys()
    for name, want in expected.items():
        # The files allow 2e-5; staying on Pillow and its arithmetic gives the very same bits.
        assert torch.equal(outputs[name].to(want.dtype), want), name


def test_there_are_golden_files():
    assert len(GOLDEN) >= 10


# -- grid --------------------------------------------------------------------------------------------------------------


def _best_by_the_letter(size, candidates):
    """The rule of docs/llava_tree.md, written as its sentences."""
    best, best_effective, least_wasted = None, 0, float("inf")
    for w, h in candidates:
        scale = min(w / size[0], h / size[1])
        effective = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = w * h - effective
        if effective > best_effective or (effective == best_effective and wasted < least_wasted):
            best, best_effective, least_wasted = (w, h), effective, wasted
    return best


def test_best_resolution_follows_the_rule():
    rng = random.Random(0)
    for _ in range(300):
        candidates = [(rng.randint(1, 8) * 28, rng.randint(1, 8) * 28) for _ in range(rng.randint(1, 12))]
        size = (rng.randint(1, 400), rng.randint(1, 400))
        assert select_best_resolution(size, candidates) == _best_by_the_letter(size, candidates)


def test_a_sliver_still_gets_a_canvas():
    # Scaled down the short side vanishes: every candidate keeps 0 pixels, the one that wastes least wins.
    assert select_best_resolution((10_000, 1), [(672, 672), (336, 336)]) == (336, 336)


@pytest.mark.parametrize(
    "pinpoints", ["(1x1),...,(2x3)", "[[112,112],[112,224],[112,336],[224,112],[224,224],[224,336]]"]
)
def test_pinpoints_as_text(pinpoints):
    # No side of a tower is special: the official range form knows five of them only.
    assert get_anyres_image_grid_shape((220, 330), pinpoints, 112) == (2, 3)
    assert get_anyres_image_grid_shape((5, 5), pinpoints, 112) == (1, 1)


@pytest.mark.parametrize("pinpoints", ["(axb)x", "not a list", [[1, 2, 3]], None, 5, "5"])
def test_bad_pinpoints_are_named(pinpoints):
    with pytest.raises(ValueError, match=r"neither|form"):
        get_anyres_image_grid_shape((10, 10), pinpoints, 336)


def test_no_candidates_and_empty_images():
    with pytest.raises(ValueError, match="candidate"):
        select_best_resolution((10, 10), [])
    with pytest.raises(ValueError, match="positive"):
        select_best_resolution((0, 10), [(336, 336)])


def test_resize_and_pad_centres_on_black():
    out = np.asarray(resize_and_pad_image(Image.new("RGB", (50, 20), (255, 255, 255)), (100, 80)))
    assert out.shape == (80, 100, 3)
    assert (out[20:60] == 255).all() and not out[:20].any() and not out[60:].any()


def test_tiles_are_row_major():
    image = _image(6, 4)
    tiles = divide_to_patches(image, 2)
    assert len(tiles) == 6
    assert np.array_equal(np.asarray(tiles[1]), np.asarray(image)[0:2, 2:4])
    assert np.array_equal(np.asarray(tiles[3]), np.asarray(image)[2:4, 0:2])


def test_expand2square():
    tall = np.asarray(expand2square(Image.new("RGB", (2, 5), (9, 9, 9)), (1, 2, 3)))
    assert tall.shape == (5, 5, 3)
    assert (tall[:, 1:3] == 9).all() and (tall[:, 0] == (1, 2, 3)).all() and (tall[:, 3:] == (1, 2, 3)).all()
    square = _image(4, 4)
    assert expand2square(square, (0, 0, 0)) is square


# -- process_images ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip", "siglip"])
def processor(request):
    return load_image_processor(CLIP_TOWER if request.param == "clip" else SIGLIP_TOWER)


def test_modes_and_shapes(processor):
    side = processor.crop_size["height"]
    images = [_image(50, 30), _image(30, 40, 1)]
    for mode in ("pad", "square"):
        out = process_images(images, processor, _config(mode))
        assert out.shape == (2, 3, side, side) and out.dtype == torch.float32
    pinpoints = [[side, side], [2 * side, side]]
    wide, small = _image(2 * side, side), _image(20, 20)
    views = process_images([wide, small], processor, _config("anyres", pinpoints))
    assert isinstance(views, list) and [v.shape[0] for v in views] == [3, 2]
    assert torch.equal(views[0], process_anyres_image(wide, processor, pinpoints))
    assert process_images([wide], processor, _config("anyres_max_9", pinpoints)).shape == (1, 3, 3, side, side)
    # The tiles of an image that fills its canvas are the image's own pixels.
    assert torch.equal(
        views[0][1], processor.preprocess(wide.crop((0, 0, side, side)), return_tensors="pt").pixel_values[0]
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_colour_modes_are_converted(processor, mode):
    image = _image(30, 20).convert(mode)
    for ratio in ("pad", "square"):
        out = process_images([image], processor, _config(ratio))
        assert torch.equal(out, process_images([image.convert("RGB")], processor, _config(ratio)))


def test_errors_are_clear(processor):
    with pytest.raises(ValueError, match="empty list"):
        process_images([], processor, _config("pad"))
    with pytest.raises(ValueError, match=r"image_aspect_ratio.*'pad'"):
        process_images([_image(5, 5)], processor, _config(None))
    with pytest.raises(ValueError, match="image_aspect_ratio"):
        process_images([_image(5, 5)], processor, SimpleNamespace())
    for old in ("highres", "crop_split"):
        with pytest.raises(ValueError, match=rf"{old}.*'anyres'"):
            process_images([_image(5, 5)], processor, _config(old))


@pytest.mark.parametrize("header", ["", "data:image/png;base64,"])
def test_base64(header):
    image, buffer = _image(7, 5), io.BytesIO()
    image.save(buffer, format="PNG")
    text = header + base64.b64encode(buffer.getvalue()).decode()
    assert np.array_equal(np.asarray(load_image_from_base64(text)), np.asarray(image))
    assert load_image_from_base64(text.encode()).size == (7, 5)
    with pytest.raises(ValueError, match="base64"):
        load_image_from_base64("bm8gaW1hZ2U=")


# -- processors --------------------------------------------------------------------------------------------------------


def test_siglip_attributes_and_side():
    default = SigLipImageProcessor()
    assert default.image_mean == (0.5, 0.5, 0.5)
    assert default.size == (384, 384) and default.crop_size == {"height": 384, "width": 384}
    assert SigLipImageProcessor(size=112).size == (112, 112)
    assert SigLipImageProcessor(size=(56, 112)).preprocess(_image(9, 9)).pixel_values.shape == (1, 3, 56, 112)
    read = load_image_processor(SIGLIP_TOWER)
    assert isinstance(read, SigLipImageProcessor) and read.size == (384, 384)


def test_siglip_equals_transformers_on_pillow():
    transformers = pytest.importorskip("transformers", minversion="5")
    theirs = transformers.SiglipImageProcessorPil.from_pretrained(SIGLIP_TOWER)
    images = [_image(90, 61), _image(500, 401, 1), _image(384, 384, 2)]
    want = theirs.preprocess(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(SigLipImageProcessor().preprocess(images, return_tensors="pt")["pixel_values"], want)


@pytest.mark.parametrize("as_input", [list, np.stack, lambda frames: torch.from_numpy(np.stack(frames))])
def test_frames_in_every_form(processor, as_input):
    frames = [np.asarray(_image(48, 36, seed)) for seed in range(3)]
    want = processor.preprocess([Image.fromarray(f) for f in frames], return_tensors="pt")["pixel_values"]
    got = processor.preprocess(as_input(frames), return_tensors="pt")["pixel_values"]
    assert got.shape[0] == 3 and got.dtype == torch.float32 and torch.equal(got, want)


def test_siglip_single_image_forms():
    processor, image = SigLipImageProcessor(size=32), _image(20, 30)
    array = np.asarray(image)
    want = processor(image, return_tensors="pt")["pixel_values"]
    assert want.shape == (1, 3, 32, 32)
    for form in (array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1), array / 255, [array]):
        assert torch.equal(processor.preprocess(form, return_tensors="pt")["pixel_values"], want)
    assert isinstance(processor.preprocess(image, return_tensors="np")["pixel_values"], np.ndarray)
    assert processor.preprocess(np.zeros((1, 9, 9, 3)))["pixel_values"].shape == (1, 3, 32, 32)  # lmms-eval: no video


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "empty"),
        (np.zeros((4, 4)), "RGB"),
        (np.zeros((4, 4, 4), np.uint8), "RGB"),
        (np.full((4, 4, 3), 300.0), "0..255"),
        (np.full((4, 4, 3), np.nan), "0..255"),
        (np.full((4, 4, 3), -1), "0..255"),
    ],
)
def test_siglip_refuses_what_is_no_image(bad, message):
    with pytest.raises(ValueError, match=message):
        SigLipImageProcessor(size=8).preprocess(bad)
    with pytest.raises(ValueError, match="'tf'"):
        SigLipImageProcessor(size=8).preprocess(_image(4, 4), return_tensors="tf")


def test_clip_processor_is_on_pillow():
    processor = load_clip_image_processor(CLIP_TOWER)
    assert "Pil" in type(processor).__name__
    assert processor.crop_size["height"] == 336 and processor.size["shortest_edge"] == 336
    pixels = processor.preprocess(_image(400, 336), return_tensors="pt")["pixel_values"]
    image = np.asarray(_image(400, 336).crop((32, 0, 368, 336)), dtype=np.float32)
    mean, std = np.float32(processor.image_mean), np.float32(processor.image_std)
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), (image / 255 - mean) / std, atol=1e-5)


def test_loading_needs_the_config_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json"):
        load_image_processor(tmp_path)
    shutil.copyfile(SIGLIP_TOWER / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"size": {"height": 112, "width": 112}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_image_processor(tmp_path).size == (112, 112)
