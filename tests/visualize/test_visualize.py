"""Pictures of what became of the visual tokens: states and places of cells, pixels, the page, the clip, the command."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from accelerate_methods.engine.recording import ItemRecord
from accelerate_methods.stages.errors import MethodError
from accelerate_methods.visualize import (
    DROPPED,
    KEPT,
    LEFT,
    MERGED,
    NOWHERE,
    Cells,
    Overlay,
    Panel,
    draw_kept_tokens,
    draw_sheet,
    numbered_on,
    paint,
    token_states,
    write_clip,
    write_page,
)
from accelerate_methods.visualize.cells import cells_of, even_cells
from accelerate_methods.visualize.painting import EMPTY, FRAME, fitted, font, wrapped
from tests.conftest import CHECKPOINTS
from tests.support.paths import ROOT

CLIP = ROOT / "assets" / "shapes_video" / "clips" / "0000.mp4"


def script():
    spec = importlib.util.spec_from_file_location("visualize_script", ROOT / "scripts" / "visualize.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


visualize = script()


def make_item() -> ItemRecord:
    owner = torch.tensor([[0, -1, 0, 1], [-1, -1, 2, 1]])
    kept = torch.tensor([[True, False, False, True], [False, False, True, False]])
    return ItemRecord("video", 8, 3, grid=(2, 2), owner=owner, kept=kept)


def make_cells(state, left=9, owner=None) -> Cells:
    state = np.array(state)
    rows, columns = state.shape
    owner = np.arange(state.size).reshape(state.shape) if owner is None else np.array(owner)
    edges = np.linspace(0, 1, columns + 1), np.linspace(0, 1, rows + 1)
    return Cells(*edges, state, np.broadcast_to(left, state.shape), owner)


def grey(size=(40, 40), level=200) -> Panel:
    return Panel("frame 0", Image.new("RGB", size, (level,) * 3), seconds=0.0)


# -- states --------------------------------------------------------------------------------------------------------


def test_states_tell_dropped_merged_and_kept_apart():
    expected = [[[2, 0], [1, 2]], [[0, 0], [2, 1]]]
    assert token_states(make_item()).tolist() == expected


def test_what_the_language_model_drops_is_dropped():
    item = make_item()
    item.left_at, item.num_layers = torch.tensor([[4, 0, 4, 2], [0, 0, 4, 2]]), 4
    assert token_states(item).tolist() == [[[2, 0], [1, 0]], [[0, 0], [2, 0]]]


def test_states_of_a_layer():
    cells = make_cells([[KEPT, MERGED], [DROPPED, NOWHERE]], left=[[2, 4], [0, 0]])
    assert cells.at(1).tolist() == [[KEPT, MERGED], [DROPPED, NOWHERE]]
    assert cells.at(2).tolist() == [[LEFT, MERGED], [DROPPED, NOWHERE]]
    overlay = Overlay("x", 4, 1, num_layers=4, cells=[cells])
    assert overlay.layers == [2] and overlay.alive(1) == 1 and overlay.alive(3) == 0 and not overlay.untouched


def test_output_tokens_of_two_items_have_different_numbers():
    first, second = [make_cells([[KEPT, DROPPED]], owner=[[3, -1]])], [make_cells([[KEPT, MERGED]], owner=[[0, 0]])]
    assert numbered_on(second, first)[0].owner.tolist() == [[4, 4]]
    assert numbered_on(first, [])[0].owner.tolist() == [[3, -1]]


def test_a_picture_without_tokens_has_one_empty_cell():
    owner = torch.tensor([[0, 1]])
    item = ItemRecord("image", 2, 2, owner=owner, kept=owner >= 0)
    places = np.array([[1, 0.25, 0.5], [1, 0.75, 0.5]])
    empty, there = cells_of(item, places, 2)
    assert empty.state.tolist() == [[NOWHERE]] and there.state.tolist() == [[KEPT, KEPT]]
    assert empty.at(3).tolist() == [[NOWHERE]]


# -- places ----------------------------------------------------------------------------------------------------------


def look(name, given, method, tiny, loaded, **config):
    """Overlay and panels of one method on a golden checkpoint."""
    looker = object.__new__(visualize.Looker)
    looker.model, looker.template = tiny(name, **config), None
    looker.tokenizer, _, looker.processor, _ = loaded(name)
    looker.template = visualize._template(looker.model)
    prepared = looker.prepare(given)
    panels = [p for item in prepared.panels for p in item]
    return looker.look(prepared, "What?", visualize.choices([method], "llava", False)[-1], 1), panels


def test_video_cells_are_the_pooled_patches(tiny, loaded):
    frames = np.random.default_rng(0).integers(0, 255, (2, 60, 90, 3), dtype=np.uint8)
    given = visualize.Input("v", frames=frames)
    overlay, panels = look("tiny-llava-onevision", given, "random@0.25", tiny, loaded)
    assert len(panels) == len(overlay.cells) == 2 and panels[1].picture.size == (90, 60)
    cells = overlay.cells[0]
    assert cells.state.shape == (14, 14)
    # 27 patches of 14 pixels out of 384, pooled to 14: the last 6 pixels are seen by no patch
    np.testing.assert_allclose(cells.xs[[0, 1, -1]], np.array([0, 27, 378]) / np.array([1, 384, 384]), atol=2e-3)
    assert sum((c.state == KEPT).sum() for c in overlay.cells) == overlay.tokens_after == 98
    # average pooling drops the last row and column of patches
    average, _ = look("tiny-llava-onevision", given, "random@0.25", tiny, loaded, mm_spatial_pool_mode="average")
    assert average.cells[0].state.shape == (13, 13)
    np.testing.assert_allclose(average.cells[0].xs[-1], 26 * 14 / 384)


@pytest.mark.parametrize("size", [(700, 300), (300, 700)])
def test_anyres_tokens_lie_on_the_unpadded_canvas(size, tiny, loaded):
    given = visualize.Input("i", images=[Image.new("RGB", size, (200, 10, 10))])
    overlay, (overview, tiles) = look("tiny-llava-1.6", given, "random@0.25", tiny, loaded)
    base, canvas = overlay.cells
    assert overview.picture.size == size and base.state.shape == (24, 24) and (base.state != NOWHERE).all()
    assert tiles.tiles == ((3, 1) if size[0] > size[1] else (1, 3))
    # the canvas shows the image between black bars; tokens cover the image, to a patch, and nothing else
    pixels = np.asarray(tiles.picture)[..., 0] > 100
    rows, columns = np.nonzero(pixels.any(1))[0], np.nonzero(pixels.any(0))[0]
    height, width = pixels.shape
    assert abs(canvas.ys[0] * height - rows[0]) <= 14 and abs(canvas.ys[-1] * height - rows[-1] - 1) <= 14
    assert abs(canvas.xs[0] * width - columns[0]) <= 14 and abs(canvas.xs[-1] * width - columns[-1] - 1) <= 14
    assert base.state.size + canvas.state.size == overlay.tokens_before


def test_kept_patches_of_views_are_where_the_method_kept_them(tiny, loaded):
    """FasterVLM by views (owner [V, P]) and in the checkpoint's layout (owner [1, N]) keep the same places."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (250, 900, 3), dtype=np.uint8))
    given = visualize.Input("i", images=[image])
    views, _ = look("tiny-llava-1.6", given, "fastervlm@0.25", tiny, loaded)
    unpad, _ = look("tiny-llava-1.6", given, "fastervlm(retention_ratio=0.25,merge=spatial_unpad)", tiny, loaded)
    np.testing.assert_array_equal(views.cells[0].state, unpad.cells[0].state)
    whole, part = views.cells[1], unpad.cells[1]
    assert whole.state.shape == (24, 72) and part.state.shape[0] < 24
    top = int(np.abs(whole.ys - part.ys[0]).argmin())
    np.testing.assert_array_equal(whole.state[top : top + part.state.shape[0]] == KEPT, part.state == KEPT)


def test_tokens_of_a_shrunk_anyres_image_have_places(tiny, loaded):
    given = visualize.Input("i", images=[Image.new("RGB", (1000, 700))])
    overlay, _ = look("tiny-llava-onevision", given, "uniform@0.5", tiny, loaded, image_aspect_ratio="anyres_max_1")
    base, canvas = overlay.cells
    assert base.state.size + canvas.state.size == overlay.tokens_before and (canvas.state != NOWHERE).all()
    assert canvas.state.shape < (27, 27) and canvas.xs[-1] > 0.95


def test_smaller_input_has_larger_cells_and_clip_crops_the_centre(tiny, loaded):
    given = visualize.Input("i", images=[Image.new("RGB", (400, 300))])
    overlay, (panel,) = look("tiny-llava-1.5", given, "downsample@0.25", tiny, loaded)
    assert overlay.cells[0].state.shape == (12, 12) and (overlay.cells[0].state == KEPT).all()
    assert panel.picture.size == (400, 400) and not overlay.untouched  # padded to a square
    _, (panel,) = look("tiny-llava-1.5", given, "random@0.5", tiny, loaded, image_aspect_ratio="square")
    assert panel.picture.size == (300, 300)


def test_several_images_and_layers_inside_the_language_model(tiny, loaded):
    given = visualize.Input("i", images=[Image.new("RGB", (90, 60)), Image.new("RGB", (60, 90))])
    overlay, panels = look("tiny-llava-1.5", given, "fastv(k=2,r=0.75)", tiny, loaded)
    assert [p.caption for p in panels] == ["image 1", "image 2"] and overlay.tokens_after == 1152
    assert overlay.layers == [2] and overlay.alive(1) == 1152 and overlay.alive(2) == overlay.alive(5) == 288


# -- pictures --------------------------------------------------------------------------------------------------------


def test_pixels_of_every_state():
    cells = make_cells([[KEPT, MERGED], [DROPPED, NOWHERE]], owner=[[0, 0], [-1, -1]])
    pixels = np.asarray(paint(grey(), cells, (80, 80), num_layers=9))
    middle = pixels[20:80:40, 20:80:40]
    assert middle[0, 0].tolist() == [200] * 3 and middle[0, 1].tolist() == [90] * 3
    assert middle[1, 0].tolist() == [36] * 3 and tuple(middle[1, 1]) == EMPTY
    assert tuple(pixels[0, 20]) == FRAME and tuple(pixels[39, 20]) == FRAME  # the frame lies inside the kept cell
    assert tuple(pixels[40, 20]) == (36, 36, 36)
    assert (np.asarray(paint(grey(), cells, (80, 80), 9, frame=False)) != FRAME).any(-1).all()


def test_tokens_that_left_are_coloured_by_layer():
    cells = make_cells([[KEPT, KEPT, KEPT]], left=[[1, 5, 9]])
    left, middle, right = np.asarray(paint(grey((90, 30)), cells, (90, 30), num_layers=9)).astype(int)[15, 15::30]
    assert right.tolist() == [200] * 3 and np.abs(left - middle).max() > 40 and left[2] > left[1]
    early = np.asarray(paint(grey((90, 30)), cells, (90, 30), num_layers=9, layer=4))[15, 15::30]
    assert early[1].tolist() == [200] * 3 and early[0].tolist() == left.tolist()


def test_picture_shows_kept_cells_as_they_are_and_darkens_the_rest(tmp_path):
    frames = np.full((2, 20, 20, 3), 200, dtype=np.uint8)
    path = draw_kept_tokens(frames, make_item(), tmp_path / "kept.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    levels, counts = np.unique(pixels[(pixels == pixels[:, :1]).all(1)][:, 0], return_counts=True)
    shown = {int(level): int(count) for level, count in zip(levels, counts, strict=True)}
    for level in (36, 90, 200):  # dropped, merged, kept shades of the frame
        assert shown.get(level, 0) > 500


def test_wrong_number_of_frames_and_missing_provenance_are_errors(tmp_path):
    with pytest.raises(MethodError, match="3 frames given for the 2"):
        draw_kept_tokens(np.zeros((3, 8, 8, 3), np.uint8), make_item(), tmp_path / "x.png")
    with pytest.raises(MethodError, match="no provenance"):
        token_states(ItemRecord("image", 4, 4))


def overlays():
    cells = make_cells([[KEPT, MERGED], [DROPPED, DROPPED]], owner=[[0, 0], [-1, -1]])
    dense = Overlay("dense", 8, 8, 9, [make_cells([[KEPT, KEPT], [KEPT, KEPT]])] * 2, answer="a </script> b")
    return [dense, Overlay("m@0.25", 8, 2, 9, [cells, cells], answer="yes")]


def test_sheet_has_a_block_per_method(tmp_path):
    panels = [grey(), grey()]
    both = Image.open(draw_sheet(panels, overlays() * 2, tmp_path / "both.png", "q?"))
    one = Image.open(draw_sheet(panels, overlays(), tmp_path / "one.png", "q?"))
    assert both.size[1] > one.size[1] * 1.5  # two blocks of two panels stand side by side, then comes the next row
    assert (np.asarray(one)[..., 0] == 36).sum() > 1000


def test_page_holds_the_states_and_needs_no_other_file(tmp_path):
    text = write_page([grey(), grey()], overlays(), tmp_path / "p.html", "q <b>?", "tiny").read_text(encoding="utf-8")
    content = json.loads(re.search(r'id="content">(.*?)</script>', text, re.S)[1])
    assert content["methods"][1]["cells"][0]["state"] == [[KEPT, MERGED], [DROPPED, DROPPED]]
    assert content["methods"][0]["untouched"] and content["methods"][0]["answer"] == "a </script> b"
    assert content["panels"][0]["src"].startswith("data:image/jpeg;base64,") and "q &lt;b&gt;?" in text
    assert not re.search(r'(src|href)="?https?:', text) and "@@" not in text


def test_clip_holds_each_frame_as_long_as_it_stands_for(tmp_path):
    av = pytest.importorskip("av")
    panels = [grey(), Panel("frame 1", grey(level=60).picture, seconds=0.8)]
    path = write_clip(panels, overlays(), tmp_path / "c.mp4", "q?")
    with av.open(str(path)) as file:
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
    assert len(frames) == 16
    height = frames[0].shape[0]
    assert abs(int(frames[7][height // 3, 100, 0]) - 200) < 12 and abs(int(frames[8][height // 3, 100, 0]) - 60) < 12


def test_clip_without_a_writer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate_methods.visualize.clip.find_spec", lambda name: None)
    with pytest.raises(MethodError, match="pip install av"):
        write_clip([grey(), grey()], overlays(), tmp_path / "c.mp4")


# -- the command -----------------------------------------------------------------------------------------------------


def run(*words):
    visualize.main([str(w) for w in words])


def test_command_on_the_embedded_model(tmp_path, capsys):
    """Cells of the page are those of the record; the answer is the model's."""
    pytest.importorskip("av")
    out = tmp_path / "new" / "out.html"
    run("--input", CLIP, "--question", "what shape is brown?", "--frames", 16, "--method", "fastvid@0.1",
        "--method", "prunevid", "--output", out)  # fmt: skip
    assert capsys.readouterr().out.strip() == str(out)
    content = json.loads(re.search(r'id="content">(.*?)</script>', out.read_text(encoding="utf-8"), re.S)[1])
    dense, fastvid, prunevid = content["methods"]
    assert [m["label"] for m in content["methods"]] == ["dense", "fastvid@0.1", "prunevid"]
    assert dense["untouched"] and dense["answer"] == "ring"
    states = np.array([c["state"] for c in fastvid["cells"]])
    assert states.shape == (16, 7, 7) and (states == KEPT).sum() == 64 and (states == MERGED).any()
    assert prunevid["layers"] == [4]  # configs/prunevid/embedded.yaml: after layer 3


def test_folder_of_frames_is_a_video(tmp_path):
    for number in range(3):
        Image.new("RGB", (20, 10), (number * 50, 0, 0)).save(tmp_path / f"{number}.png")
    given = visualize.read_input([str(tmp_path)], 2)
    assert given.frames.shape == (2, 10, 20, 3) and given.frames[1, 0, 0, 0] == 100
    Image.new("RGB", (30, 10)).save(tmp_path / "9.png")
    with pytest.raises(visualize.InputError, match="differ in size"):
        visualize.read_input([str(tmp_path)], 2)


def test_what_is_a_picture_is_told_by_content(tmp_path):
    pictures = [Image.new("RGB", (20, 10), (number * 50, 0, 0)) for number in range(3)]
    for name, kind in (("a.jfif", "JPEG"), ("a.ppm", "PPM"), ("a.mp4", "PNG"), ("a.gif", "GIF")):
        pictures[0].save(tmp_path / name, format=kind)
        assert len(visualize.read_input([str(tmp_path / name)], 16).images) == 1
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:])
    assert len(visualize.read_input([str(tmp_path / "moving.gif")], 3).frames) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input", "nowhere.mp4", "--method", "fastvid"), "no such file: nowhere.mp4"),
        (("--input", "{bad}.png", "--method", "fastv"), "cannot read image"),
        (("--input", "{bad}.mp4", "--method", "fastv"), "cannot read video"),
        (("--input", "{good}.png", "--method", "fastvdi@0.1"), "Did you mean 'fastvid'"),
        (("--input", "{good}.png", "--method", "fastvid@much"), "not a retention ratio"),
        (("--input", "{good}.png", "--method", "fastvid"), "acts on video only"),
        (("--input", "{good}.png", "--method", "fastv(k=7)"), "the decoder has 6 layers"),
        (("--input", "{good}.png", "{good}.png", "--question", "<image>?", "--method", "fastv"), "has 1 <image>"),
        (("--input", "{good}.png", "--method", "fastv", "--pretrained", str(CHECKPOINTS / "tiny-qwen3-vl")), "not a"),
    ],
)
def test_errors_are_one_clear_line(words, message, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    words = [w.format(bad=tmp_path / "bad", good=tmp_path / "good") for w in words]
    words = words if "--question" in words else [*words, "--question", "?"]
    with pytest.raises(SystemExit) as stop:
        run(*words, "--output", tmp_path / "out.png")
    *_, said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said.startswith("error: ") and message in said
    assert not (tmp_path / "out.png").exists()


def test_output_must_be_known_and_fit_the_input(tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    common = ("--input", tmp_path / "good.png", "--question", "?", "--method", "fastv", "--output")
    with pytest.raises(SystemExit):
        run(*common, tmp_path / "out.gif")
    assert "must end in .png, .html, .mp4" in capsys.readouterr().err
    for output, message in (
        ("out.mp4", "the input is not"),
        ("good.png/out.png", "good.png is no folder"),
        ("folder.png", "is a folder"),
    ):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match="2"):
            run(*common, tmp_path / output)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--device", "cuda:99"), "device cuda:99: torch sees"),
        (("--frames", "few"), "'few' is not a whole number of at least 1"),
        (("--frames", "0"), "'0' is not a whole number of at least 1"),
    ],
)
def test_wrong_words_load_nothing(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "Looker", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match="2"):
        run("--input", CLIP, "--question", "?", "--method", "fastvid", "--output", tmp_path / "out.png", *words)
    assert message in capsys.readouterr().err


def test_an_interrupted_drawing(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(visualize, "read_input", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run("--input", CLIP, "--question", "?", "--method", "fastv", "--output", tmp_path / "out.png")
    assert capsys.readouterr().err == "interrupted; nothing was drawn\n"


def test_all_leaves_out_what_cannot_act_and_says_so(tmp_path, capsys, monkeypatch):
    """A method that was named is an error instead, whatever "all" would have said of it."""
    named = {c.label: c.named for c in visualize.choices(["all@0.25 fastv@0.25"], "llava_onevision", True)}
    assert named["fastv@0.25"] and not named["fastvid@0.25"] and named["dense"]
    wanted, choices = ("dense", "fastvid@0.25", "fastv@0.25"), visualize.choices  # every one of them takes its time
    monkeypatch.setattr(visualize, "choices", lambda *args: [c for c in choices(*args) if c.label in wanted])
    Image.new("RGB", (40, 20), (200, 0, 0)).save(tmp_path / "good.png")
    common = ("--input", tmp_path / "good.png", "--question", "?", "--max-new-tokens", 1)
    run(*common, "--method", "all@0.25", "--output", tmp_path / "out.html")
    said = capsys.readouterr().err
    assert "fastvid@0.25 is left out: fastvid@0.25 acts on video only" in said
    assert "fastv@0.25: " in said and (tmp_path / "out.html").is_file()


def test_pictures_are_shown_as_the_camera_was_held(tmp_path):
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert visualize.read_input([str(tmp_path / "turned.jpg")], 1).images[0].size == (20, 40)


# -- data are no markup ------------------------------------------------------------------------------------------------

ODD = "[/b] [INST] <script>alert(1)</script> @@CONTENT@@ <!-- {{x}} $x$ </script> & :warning:"


def test_page_shows_names_and_answers_as_they_are(tmp_path):
    odd = [dataclasses.replace(each, label=ODD, answer=ODD, note=ODD) for each in overlays()]
    panels = [dataclasses.replace(grey(), caption=ODD) for _ in odd[0].cells]
    text = write_page(panels, odd, tmp_path / "p.html", title=ODD, model=ODD).read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<!--" not in text
    content = json.loads(re.search(r'id="content">(.*?)</script>', text, re.S)[1])
    assert {m["label"] for m in content["methods"]} == {m["answer"] for m in content["methods"]} == {ODD}
    assert html.unescape(re.search("<h1>(.*?)</h1>", text)[1]) == ODD == html.unescape(
        re.search("<title>(.*?)</title>", text)[1]
    )


def test_long_questions_are_cut(tmp_path):
    """In no more time than it takes to draw them."""
    title = "why " * 20_000 + "x" * 50_000
    panels = [grey() for _ in overlays()[0].cells]
    short, long = (draw_sheet(panels, overlays(), tmp_path / f"{t[:1]}.png", title=t) for t in ("a b", title))
    heights = [Image.open(path).height for path in (short, long)]
    assert heights[0] < heights[1] < heights[0] + 150
    face = font(20)
    lines = wrapped(title, face, 300, lines=3)
    assert len(lines) == 3 and lines[-1].endswith("...") and all(face.getlength(line) <= 300 for line in lines)
    assert fitted("", face, 10) == "" and fitted("short", face, 300) == "short" and fitted("mmm", face, 1) == "..."


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    panels = [grey() for _ in overlays()[0].cells]
    for write, name in ((draw_sheet, "p.png"), (write_page, "p.html")):
        with pytest.raises(MethodError, match=r"cannot write .*file/p"):
            write(panels, overlays(), tmp_path / "file" / name)


def test_a_token_that_a_decoder_layer_merged_is_shown_as_merged_from_there_on():
    item = make_item()
    item.num_layers, item.left_at = 4, torch.tensor([[4, 0, 4, 4], [0, 0, 2, 4]])
    item.merged_at = torch.tensor([[4, 4, 4, 2], [4, 4, 4, 2]])  # the row of owner 1 goes into that of owner 0
    item.held_by = torch.tensor([[0, -1, 0, 0], [-1, -1, -1, 0]])
    first, second = even_cells(item)
    assert first.at(1).tolist() == [[KEPT, DROPPED], [MERGED, KEPT]]
    assert first.at(2).tolist() == [[KEPT, DROPPED], [MERGED, MERGED]]
    assert second.at(2).tolist() == [[DROPPED, DROPPED], [LEFT, MERGED]]
    overlay = Overlay("m", 8, 3, 4, [first, second])
    assert [overlay.alive(layer) for layer in range(4)] == [3, 3, 1, 1]
    assert (overlay.layers, overlay.drops) == ([2], [2])


def test_tokens_of_queries_are_drawn_in_their_order(tmp_path, capsys):
    from tests.support.architectures import tiny_checkpoint

    folder, output = tiny_checkpoint("mqt", tmp_path / "mqt"), tmp_path / "out.html"
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    words = ["--input", str(tmp_path / "red.png"), "--question", "what?", "--pretrained", str(folder)]
    words += ["--model-args", "num_visual_tokens=10", "--method", "uniform@0.5", "--output", str(output)]
    visualize.main([*words, "--max-new-tokens", "2"])
    text = output.read_text(encoding="utf-8")
    assert "cells are tokens in the order of the prompt, not places" in text
    assert "uniform@0.5: 5 of 10 visual tokens" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        visualize.main([*words[:-4], "--model-args", "num_visual_tokens=0", "--method", "random@0.5", *words[-2:]])
    assert "outside the allowed range" in capsys.readouterr().err
