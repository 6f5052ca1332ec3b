"""``examples/``: a method and a host from outside do everywhere what those of the project do."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from accelerate_methods import MethodError, UnknownNameError, accelerate, available, get, record
from accelerate_methods.registry import families as native_families
from accelerate_methods.registry import names as registry
from accelerate_methods.registry import plugins
from accelerate_methods.registry.compatibility import FAMILIES, why_not
from accelerate_methods.stages.compress import VisualItem
from tests.conftest import CHECKPOINTS
from tests.methods import test_every_method as every
from tests.support import hand_cut
from tests.support import native_questions as native
from tests.support.configured import configured
from tests.support.paths import ROOT

METHOD, HOST = ROOT / "examples" / "new_method.py", ROOT / "examples" / "new_host.py"
RATIO = 0.3

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def named(monkeypatch):
    """named(file): the environment variable names it, as a user would write it; nothing of it stays."""
    modules, registered, families = set(sys.modules), dict(registry._registered), list(native_families._added)

    def name(path: Path) -> None:
        monkeypatch.setenv(plugins.VARIABLE, str(path))

    yield name
    registry._registered.clear()
    registry._registered.update(registered)
    native_families._added[:] = families
    plugins._imported.difference_update({str(METHOD), str(HOST)})
    for module in set(sys.modules) - modules:
        if module.startswith((METHOD.stem, HOST.stem)):
            del sys.modules[module]


@pytest.fixture
def outliers(named):
    named(METHOD)
    assert "outliers" in available()


def most_different(features: torch.Tensor, count: int) -> torch.Tensor:
    """The example's rule, token by token: [F, N, D] -> [F, N] bool."""
    far = torch.stack([(frame - sum(frame) / len(frame)).pow(2).sum(-1) for frame in features])
    kept = torch.zeros(far.numel(), dtype=torch.bool)
    kept[sorted(range(far.numel()), key=lambda i: -far.flatten()[i])[:count]] = True
    return kept.view(far.shape)


# -- the new method ----------------------------------------------------------------------------------------------------


def test_without_the_file_there_is_no_such_method():
    with pytest.raises(UnknownNameError, match="outliers"):
        get("outliers", retention_ratio=0.1)


def test_it_is_as_short_as_the_docs_say_and_what_they_show():
    code = METHOD.read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_method.md").read_text("utf-8"), re.DOTALL)[1]
    assert shown.strip() in code and len(shown.strip().splitlines()) <= 30


def test_it_keeps_what_it_says(outliers):
    features = torch.randn(3, 7, 5)
    item = VisualItem("video", features, torch.arange(21).view(3, 7), 21)
    kept = get("outliers", tokens_per_frame=2).compress(item).owner >= 0
    assert torch.equal(kept, most_different(features, 6))


def test_it_fits_every_family(outliers):
    method = registry.method_class("outliers")
    assert [why_not(method, family) for family in FAMILIES] == [None] * len(FAMILIES)


@pytest.mark.parametrize("name", every.FAMILY)
def test_it_runs_on_the_models_of_the_tree(name, outliers, tiny):
    model, questions = tiny(name), [every.QUESTIONS[name][every.MAIN[name]], every.TEXT]
    with accelerate(model, None), record() as plain:
        dense = every.answer(model, questions[0])
        every.answer(model, *questions)
    with accelerate(model, configured("outliers", RATIO)), record() as requests:
        every.answer(model, *questions)
    every.check_records(configured("outliers", RATIO), requests[0], plain[1].samples, questions)
    with accelerate(model, configured("outliers", 1.0)):
        every.assert_close(every.answer(model, questions[0]), dense, 1e-5)


@pytest.mark.parametrize("name", native.MAIN)
def test_it_does_the_same_on_transformers_models(name, outliers, tiny):
    question, tree, model = native.QUESTIONS[name][native.MAIN[name]], tiny(name), native.native(name)
    with accelerate(tree, configured("outliers", RATIO)), record() as one:
        expected = every.answer(tree, question)
    with accelerate(model, configured("outliers", RATIO)), record() as two:
        got = native.answer(model, native.inputs(name, question))
    every.assert_close(got, expected, 1e-4)
    for item, same in zip(two[0].samples[0].items, one[0].samples[0].items, strict=True):
        every.assert_same_tokens(item, same)
        assert item.tokens_after == int(RATIO * item.tokens_before)


def test_it_runs_on_qwen(outliers):
    """Tiny Qwen2.5-VL with random weights: a video of 6 frames of 4 x 6 tokens."""
    torch.manual_seed(0)
    path = CHECKPOINTS / "tiny-qwen2.5-vl"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    config, frames, rows, columns = model.config, 6, 8, 12
    number, side = frames * rows * columns // 4, config.vision_config.patch_size
    prompt = [5, 6, config.vision_start_token_id, *[config.video_token_id] * number, config.vision_end_token_id, 30]
    ids = torch.tensor([prompt])
    asked = {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(frames * rows * columns, 3 * 2 * side * side),
        "video_grid_thw": torch.tensor([[frames, rows, columns]]),
        "mm_token_type_ids": (ids == config.video_token_id).long() * 2,
    }
    dense, plain = native.answer(model, asked), hand_cut.dense_inputs(model, asked)
    with accelerate(model, "outliers", retention_ratio=RATIO), record() as requests:
        native.answer(model, asked)
    (item,) = requests[0].samples[0].items
    features = plain.embeds[0, 3 : 3 + number].view(frames, -1, plain.embeds.shape[-1])
    assert torch.equal(item.kept, most_different(features, int(RATIO * number)))
    with accelerate(model, "outliers", retention_ratio=1.0):
        every.assert_close(native.answer(model, asked), dense, 1e-5)
        ours = two_calls(model, asked)
    torch.testing.assert_close(ours, two_calls(model, asked), atol=1e-5, rtol=1e-5)


def two_calls(model, asked: dict) -> torch.Tensor:
    """Logits of a token behind the prompt, without ``generate``."""
    first = model(**asked, use_cache=True)
    return model(input_ids=torch.tensor([[31]]), past_key_values=first.past_key_values, use_cache=True).logits


def test_it_is_measured_by_the_bench(outliers, tmp_path, capsys):
    from accelerate_methods.bench import cli, results

    quick = ["--device", "cpu", "--repeats", "1", "--warmup", "0", "--new-tokens", "1", "--frames", "2"]
    assert cli.main(["--model", "tiny", "--methods", "all@0.25", *quick, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = {row["label"]: row for row in results.read(path)["rows"]}
    row = rows["outliers@0.25"]
    assert row["status"] == "ok" and row["visual_tokens"]["after"] == row["visual_tokens"]["before"] * 0.25
    assert "outliers@0.25" in capsys.readouterr().out


def test_it_is_evaluated_and_reported(outliers, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval")
    pytest.importorskip("plotly")
    from lmms_eval_accelerate.manifest import model_ids
    from lmms_eval_accelerate.models import model_class

    from tests.lmms_eval.report.test_report import report, write_run
    from tests.support.lmms_tasks import evaluate, lines, standard_tasks

    assert model_ids()["llava_video_outliers"] == ("llava_video", "outliers")
    tasks = standard_tasks(tmp_path / "tasks")
    pretrained = CHECKPOINTS / "tiny-llava-onevision"
    model = model_class("llava_onevision_outliers").create_from_arg_string(
        f"pretrained={pretrained},max_frames_num=4,retention_ratio=0.25"
    )
    results = evaluate(model, ["video"], tasks, model_name="llava_onevision_outliers")
    for line in lines(results, "video"):
        assert (line["method"], line["visual_tokens_after"]) == ("outliers", 4 * 196 // 4)
    # what the report makes of a run's folder, in a process that knows the method and in one that does not
    methods = json.loads(json.dumps(model.args.pipeline.to_dict()))
    write_run(tmp_path / "runs" / "dense", [], [1.0, 1.0, 0.0, 1.0])
    write_run(tmp_path / "runs" / "outliers", methods, [1.0, 0.0, 0.0, 1.0], tokens=25.0, prefill=4.0)
    rows, page = report(tmp_path / "runs", output=tmp_path / "report")
    assert [row["setting"] for row in rows] == ["dense", "outliers@0.25"] and "outliers@0.25" in page
    monkeypatch.delenv(plugins.VARIABLE)
    del registry._registered["outliers"]
    again, _ = report(tmp_path / "runs", output=tmp_path / "another")
    assert [row["setting"] for row in again] == ["dense", "outliers@0.25"]


def test_it_is_drawn(outliers, tmp_path):
    pytest.importorskip("av")
    from tests.visualize.test_visualize import CLIP, KEPT
    from tests.visualize.test_visualize import run as visualize

    out = tmp_path / "out.html"
    visualize("--input", CLIP, "--question", "what?", "--frames", 8, "--method", "outliers@0.25", "--output", out)
    content = json.loads(re.search(r'id="content">(.*?)</script>', out.read_text(encoding="utf-8"), re.S)[1])
    _, drawn = content["methods"]
    assert drawn["label"] == "outliers@0.25"
    assert (np.array([cells["state"] for cells in drawn["cells"]]) == KEPT).sum() == len(drawn["cells"]) * 49 // 4


def test_code_of_the_docs_about_transformers_models_runs(tmp_path, capsys):
    """docs/native_models.md, with a tiny Qwen2.5-VL."""
    from PIL import Image

    from tests.support.native_processors import qwen

    text = (ROOT / "docs" / "native_models.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    name = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert code.count(name) == 1
    known = {"picture": Image.new("RGB", (96, 64), (200, 30, 30))}
    with torch.no_grad():
        exec(code.replace(name, str(qwen(tmp_path))), known)
    before, after = map(int, capsys.readouterr().out.split())
    assert after == round(before * 0.2) and isinstance(known["answer"], str)
    assert "forward" not in vars(known["model"])


# -- the new host ------------------------------------------------------------------------------------------------------

PATCHES, TEXT = 16, [5, 8, 9]
#: methods that act on videos alone; the model has none
VIDEOS = {m for m in available() if "image" not in registry.method_class(m).modalities}
FIT = [m for m in available() if m not in {"downsample", "evit", "pixelprune", "tome"} | VIDEOS]


@pytest.fixture
def vip(named):
    named(HOST)
    plugins.import_named()
    (module,) = (sys.modules[name] for name in sys.modules if name.startswith(HOST.stem + "_"))
    return module.tiny()


def prompt(*images: int) -> dict:
    """A batch of prompts with so many images each, padded on the left."""
    rows = [[5, *([7] * PATCHES + [11]) * number, 8, 9] for number in images]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    pixels = torch.randn(sum(images), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def one_of(batch: dict, row: int, images: slice) -> dict:
    real = batch["attention_mask"][row].bool()
    return {
        "input_ids": batch["input_ids"][row : row + 1, real],
        "attention_mask": batch["attention_mask"][row : row + 1, real],
        "pixel_values": batch["pixel_values"][images],
    }


def test_the_docs_show_it():
    text = (ROOT / "docs" / "adding_a_host.md").read_text("utf-8")
    shown = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = HOST.read_text("utf-8").splitlines()
    lines = [re.sub(r"  # .*", "", line) for line in shown.splitlines()]
    assert len(lines) > 5 and not [line for line in lines if line not in code]


def test_without_the_file_there_is_no_such_host(vip, monkeypatch):
    monkeypatch.setattr(native_families, "_added", [])
    with pytest.raises(MethodError, match=r"no host for .*VipLlavaForConditionalGeneration"):
        accelerate(vip, "random", retention_ratio=0.5)


def test_methods_that_do_not_fit_are_refused(vip):
    assert {"aks", "dycoke", "fastvid", "holitom", "prunevid"} <= VIDEOS
    with pytest.raises(MethodError, match="tome acts at the encode stage"):
        accelerate(vip, "tome", r=1)
    with pytest.raises(MethodError, match="downsample acts at the sample stage"):
        accelerate(vip, "downsample")
    with pytest.raises(MethodError, match=r"fastvid needs frame_features, pooling_attention, .*VipLLaVA"):
        accelerate(vip, "fastvid", retention_ratio=0.5)
    for name in ("dycoke", "prunevid"):
        with pytest.raises(MethodError, match=f"{name} cannot act on VipLLaVA models: it acts on video only"):
            accelerate(vip, name)
    assert "forward" not in vars(vip)


@pytest.mark.parametrize("name", FIT)
def test_every_method_that_fits(name, vip):
    """A batch equals its samples alone; a full budget is the uncompressed model; nothing stays on it."""
    batch, method = prompt(1, 2), configured(name, RATIO)
    dense = native.answer(vip, batch)
    with accelerate(vip, method), record() as requests:
        together = native.answer(vip, batch)
        alone = [native.answer(vip, one_of(batch, 0, slice(0, 1))), native.answer(vip, one_of(batch, 1, slice(1, 3)))]
        beams = native.answer(vip, one_of(batch, 1, slice(1, 3)), num_beams=2)
    assert torch.isfinite(beams[1]).all()
    every.assert_close(together, tuple(map(torch.cat, zip(*alone, strict=True))), 1e-4)
    for row, sample in enumerate(requests[0].samples):
        assert sample.visual_tokens_before == PATCHES * (row + 1)
        assert requests[0].layer_lengths(row)[-1] < sample.dense_length or set(method.stages) == {"decode"}
        if "compress" in method.stages:
            assert sample.visual_tokens_after <= round(RATIO * PATCHES) * (row + 1)
    if "retention_ratio" in method.parameters():
        with accelerate(vip, configured(name, 1.0)):
            every.assert_close(native.answer(vip, batch), dense, 1e-5)
    assert torch.equal(native.answer(vip, batch)[1], dense[1]) and "forward" not in vars(vip)


def signals_by_hand(vip) -> dict[str, torch.Tensor]:
    """From all attention maps of an eager tower: the deepest of the layers -2, -3 and 2 is the fifth of six."""
    tower = vip.model.vision_tower
    tower.set_attn_implementation("eager")
    out = tower(prompt(1)["pixel_values"], output_attentions=True, output_hidden_states=True)
    layer, before = tower.encoder.layers[4], out.hidden_states[4]
    keys = layer.self_attn.k_proj(layer.layer_norm1(before)).unflatten(-1, (4, -1)).mean(2)
    maps = out.attentions[4].mean(1)
    tower.set_attn_implementation("sdpa")
    return {
        "cls_attention": maps[:, 0, 1:],
        "received_attention": maps.mean(1)[:, 1:],
        "key_states": keys[:, 1:],
    }


@pytest.mark.parametrize("name", ["fastervlm", "outliers", "pool", "uniform", "visionzip"])
def test_it_gives_what_the_hand_cut_prompt_gives(name, vip, named):
    named(METHOD)
    asked, method = prompt(1), configured(name, RATIO)
    dense = hand_cut.dense_inputs(vip, asked)
    rows = torch.arange(1, 1 + PATCHES)
    item = VisualItem(
        "image", dense.embeds[:1, rows], torch.arange(PATCHES)[None], PATCHES, grid=(4, 4), signals=signals_by_hand(vip)
    )
    logits, ids = hand_cut.language_model(vip, hand_cut.cut(dense, 0, [(rows, item)], method), 3)
    with accelerate(vip, method):
        got = native.answer(vip, asked)
    torch.testing.assert_close(got[1][0], logits, atol=1e-5, rtol=1e-5)
    assert got[0][0].tolist() == ids


def test_prefill_methods_drop_what_the_record_says(vip):
    asked = prompt(1)
    dense = hand_cut.dense_inputs(vip, asked)
    with accelerate(vip, "fastv", k=2, r=0.5), record() as requests:
        got = native.answer(vip, asked)
    (item,) = requests[0].samples[0].items
    gone = [1 + int(n) for n in (item.left_at[0] == 2).nonzero()]
    assert len(gone) == PATCHES // 2
    logits, ids, maps = hand_cut.layer_by_layer(vip, hand_cut.cut(dense, 0, [], None), 3, {2: gone})
    torch.testing.assert_close(got[1][0], logits, atol=1e-5, rtol=1e-5)
    assert got[0][0].tolist() == ids
    scores = maps[1].mean(0)[-1, 1 : 1 + PATCHES]  # the last prompt token's, in the layer before
    assert sorted(gone) == sorted((scores.argsort()[: PATCHES // 2] + 1).tolist())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: delattr(m.model, "language_model"), "not built as this host expects"),
        (lambda m: delattr(m.model, "vision_tower"), "not built as this host expects .*vision_tower"),
        (lambda m: setattr(m.model.vision_tower.config, "model_type", "dinov2"), "only CLIP and SigLIP"),
        (lambda m: delattr(m.model.vision_tower.encoder.layers[4].self_attn, "k_proj"), "not built as this host"),
    ],
)
def test_a_model_that_is_built_otherwise_is_refused_when_attaching(change, says, vip):
    change(vip)
    with pytest.raises(MethodError, match=says):
        accelerate(vip, "fastv")


def test_both_examples_run_as_scripts(tmp_path, capsys, monkeypatch, named):
    import runpy

    named(HOST)  # the host of a script that runs is that of the file that is named
    runpy.run_path(str(HOST), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(available())
    assert "random 4 of 16 tokens, layers [7, 7, 7, 7]" in [" ".join(line.split()) for line in shown]
    quick = ["--repeats", "1", "--warmup", "0", "--frames", "2", "--new-tokens", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(METHOD), *quick])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(METHOD), run_name="__main__")
    assert stop.value.code == 0 and "outliers@0.25" in capsys.readouterr().out


# -- the quick start ---------------------------------------------------------------------------------------------------


def test_the_quick_start_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """The README's code and the notebook are this file (tests/project/test_generated.py)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart", "exec"), names)
    said = capsys.readouterr().out
    assert "dense:   ring\nfastvid: ring\n192 of 784 visual tokens" in said
    assert (tmp_path / "outputs" / "quickstart.png").stat().st_size > 10_000
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in readme
