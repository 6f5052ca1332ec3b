"""All golden vectors, and the runner that runs them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conformance import adapters, runner
from tests.conftest import GOLDEN, skip_without_pillow_13

CASES = sorted(p for p in GOLDEN.glob("*/*.safetensors") if p.parent.name != "checkpoints")
TEXTS = [(p, section) for p in sorted(GOLDEN.glob("*/text.json")) for section in json.loads(p.read_text("utf-8"))]


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_golden(path):
    skip_without_pillow_13(path)
    case = runner.load_case(path)
    if case is None:
        pytest.skip("weights for other cases")
    with torch.no_grad():
        result = runner.run_case(case, GOLDEN)
    if result.status == "skipped":
        pytest.skip(result.detail)
    assert result.status == "passed", result.detail


@pytest.mark.parametrize(("path", "section"), TEXTS, ids=[f"{p.parent.name}:{s}" for p, s in TEXTS])
def test_golden_text(path, section, tmp_path):
    folder = tmp_path / path.parent.name
    folder.mkdir()
    part = folder / "text.json"
    part.write_text(json.dumps({section: json.loads(path.read_text("utf-8"))[section]}), encoding="utf-8")
    results = list(runner.run_text(part, adapters.TEXT_CHECKS, tmp_path))
    bad = [r for r in results if r.status != "passed"]
    assert not bad, bad[:3]


# -- the runner --------------------------------------------------------------------------------------------------------


def write(path, stage="dyseg", method="fastvid", params=None, inputs=None, outputs=None, **case):
    """A golden file; by default a correct dyseg case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if inputs is None:
        inputs = {"global_features": torch.eye(4)}
        outputs = outputs or {"segment_sizes": torch.tensor([1, 1, 1, 1])}
        params = params or {"c": 2, "tau": 0.9}
    tensors = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in outputs.items()}
    save_file(tensors, path, {"case": json.dumps({"method": method, "stage": stage, "params": params or {}, **case})})


def main(capsys, *args):
    code = runner.main([str(a) for a in args])
    return code, capsys.readouterr()


def test_correct_case_passes(tmp_path, capsys):
    write(tmp_path / "fastvid/a.safetensors")
    code, out = main(capsys, tmp_path)
    assert (code, out.out.strip()) == (0, "1 passed, 0 failed, 0 skipped")
    code, out = main(capsys, tmp_path, "-v")
    assert "PASSED  fastvid/a" in out.out


def test_wrong_integers_fail(tmp_path, capsys):
    write(tmp_path / "fastvid/a.safetensors", outputs={"segment_sizes": torch.tensor([1, 1, 2, 1])})
    code, out = main(capsys, tmp_path)
    assert code == 1 and "got 1, expected 2" in out.out and "1 of 4 differ" in out.out
    assert out.out.strip().endswith("0 passed, 1 failed, 0 skipped")


def test_wrong_floats_name_the_largest_error(tmp_path, capsys):
    attention = torch.rand(2, 16)
    pooled = torch.nn.functional.avg_pool2d(attention.view(2, 4, 4), 2).flatten(1)
    params = {"mode": "average", "stride": 2, "side": 4}
    for name, offset in (("right", 1e-6), ("wrong", 0.125)):
        wrong = pooled.clone()
        wrong[1, 3] += offset
        write(
            tmp_path / f"fastvid/{name}.safetensors", "attention_pool", params=params, inputs={"attention": attention},
            outputs={"attention": wrong}, atol=1e-5,
        )  # fmt: skip
    code, out = main(capsys, tmp_path)
    assert code == 1 and "largest error 0.125" in out.out and "1 passed, 1 failed, 0 skipped" in out.out


def test_what_no_adapter_reads_is_listed(tmp_path, capsys):
    params = {"c": 2, "tau": 0.9, "official": True, "seed": 3}
    write(tmp_path / "fastvid/a.safetensors", params=params)
    code, out = main(capsys, tmp_path, "--unread")
    assert code == 0 and "UNREAD  fastvid/a: official=True, seed=3\n" in out.out
    given = runner.Watched(params)
    made = given | {"c": 3}
    assert (made["c"], made.get("seed")) == (3, 3) and given.unread() == ("tau=0.9", "official=True")
    assert dict(**given) == params and given.unread() == ()


@pytest.mark.parametrize(
    ("got", "expected", "wrong"),
    [
        ([1.5, 2.0], [1, 2], "1 of 2 differ"),
        ([float("nan"), 1.0], [float("-inf"), 1.0], "1 non-finite"),
        ([0.0, 1.0], [float("-inf"), 1.0], "1 non-finite"),
        ([float("-inf"), 1.5], [float("-inf"), 1.0], "largest error 0.5"),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], None),
        ([True, False], [1, 0], None),
    ],
)
def test_no_difference_is_overlooked(got, expected, wrong):
    found = runner.difference("out", torch.tensor(got), torch.tensor(expected), 1e-5, 0.0)
    assert found is None if wrong is None else wrong in found


def test_unknown_stage_is_skipped_and_listed(tmp_path, capsys):
    write(tmp_path / "fastvid/a.safetensors", stage="nonsense")
    write(tmp_path / "newmethod/a.safetensors", method="newmethod")
    code, out = main(capsys, tmp_path)
    assert code == 0 and "SKIPPED 1: no adapter for fastvid.nonsense" in out.out
    assert "no adapter for newmethod.dyseg" in out.out
    assert out.out.splitlines()[-1] == "0 passed, 0 failed, 2 skipped"


def test_crash_shape_and_missing_output_are_failures(tmp_path, capsys):
    write(tmp_path / "fastvid/crash.safetensors", params={"c": 2})
    write(tmp_path / "fastvid/shape.safetensors", outputs={"segment_sizes": torch.tensor([4])})
    write(tmp_path / "fastvid/missing.safetensors", outputs={"more": torch.zeros(1)})
    code, out = main(capsys, tmp_path)
    assert code == 1 and "KeyError" in out.out and "shape (4,), expected (1,)" in out.out
    assert "gives no such output" in out.out and "0 passed, 3 failed" in out.out


def test_filters(tmp_path, capsys):
    write(tmp_path / "fastvid/a.safetensors")
    write(tmp_path / "fastvid/b.safetensors", stage="other")
    write(tmp_path / "base/c.safetensors", method="base", stage="other")
    assert main(capsys, tmp_path, "--method", "fastvid")[1].out.splitlines()[-1] == "1 passed, 0 failed, 1 skipped"
    assert main(capsys, tmp_path, "--stage", "dyseg")[1].out.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"
    with pytest.raises(SystemExit, match="no method 'fastvd'"):
        main(capsys, tmp_path, "--method", "fastvd")
    with pytest.raises(SystemExit, match="not a folder"):
        main(capsys, tmp_path / "nothing")


def test_nothing_found_is_an_error(tmp_path, capsys):
    save_file({"w": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "fastvid").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "fastvid/weights.safetensors")
    code, out = main(capsys, tmp_path)
    assert code == 1 and "no case found" in out.err


def test_checkpoints_are_found_beside_the_method(tmp_path, monkeypatch):
    for folder in ("checkpoints/one", "fastvid/two", "fastvid/one"):
        (tmp_path / folder).mkdir(parents=True)
    context = runner.Context(tmp_path, "fastvid")
    assert context.checkpoint("one") == tmp_path / "checkpoints/one"
    assert context.checkpoint("two") == tmp_path / "fastvid/two"
    monkeypatch.chdir(tmp_path)
    assert runner.Context(Path("../") / tmp_path.name, "fastvid").checkpoint("one") == tmp_path / "checkpoints/one"
    assert context.checkpoint("tiny-llava-1.5") == GOLDEN / "checkpoints/tiny-llava-1.5"
    with pytest.raises(FileNotFoundError, match="three"):
        context.checkpoint("three")


# -- adapters that every method shares ---------------------------------------------------------------------------------


def test_selection_needs_no_adapter_of_the_method(tmp_path, capsys):
    """The case's names for a budget and for indices are understood; its other parameters are no parameters of ours."""
    features = torch.arange(24.0).view(2, 4, 3)
    kept = torch.tensor([1, 3, 5, 7])
    given = {"method": "uniform", "stage": "select", "params": {"keep_ratio": 0.5, "seed": 3, "n_tokens": 4}}
    outputs = {"index": kept, "tokens": features.flatten(0, 1)[kept], "counts": torch.tensor([2, 2])}
    write(tmp_path / "uniform/flat.safetensors", inputs={"features": features}, outputs=outputs, **given)
    within = {"index": torch.tensor([[1, 3], [1, 3]]), "tokens": outputs["tokens"].view(2, 2, 3)}
    write(tmp_path / "uniform/frames.safetensors", inputs={"features": features}, outputs=within, **given)
    wrong = {"index": torch.tensor([1, 3, 5, 6])}
    write(tmp_path / "uniform/wrong.safetensors", inputs={"features": features}, outputs=wrong, **given)
    code, out = main(capsys, tmp_path)
    assert code == 1 and out.out.strip().endswith("2 passed, 1 failed, 0 skipped")
    assert "uniform/wrong: index: 1 of 4 differ" in out.out


def test_prefill_needs_no_adapter_of_the_method(tmp_path, capsys):
    attention = torch.rand(2, 12)
    best = attention.mean(0)[3:9].topk(2).indices + 3
    kept = torch.cat([torch.arange(3), best.sort().values, torch.arange(9, 12)])
    write(
        tmp_path / "fastv/a.safetensors", "prefill", "fastv", {"k": 2, "keep": 2, "v_start": 3, "n_visual": 6},
        {"attn_last": attention}, {"keep_index": kept, "position_ids": kept.clone()},
    )  # fmt: skip
    code, out = main(capsys, tmp_path)
    assert (code, out.out.strip()) == (0, "1 passed, 0 failed, 0 skipped")


def test_whole_model_needs_no_adapter_of_the_method(tmp_path, capsys):
    small, ids = torch.rand(1, 3, 48, 48), torch.tensor([5, -200, 7, 8])
    params = {"checkpoint": "tiny-llava-1.5", "keep_ratio": 0.25, "new_tokens": 2}
    outputs = {"n_visual": torch.tensor(144), "kv_len_prefill": torch.full((6,), 147)}
    inputs = {"pixel_small": small, "input_ids": ids}
    write(tmp_path / "uniform/e2e.safetensors", "e2e", "uniform", params, inputs, outputs)
    code, out = main(capsys, tmp_path)
    assert (code, out.out.strip().splitlines()[-1]) == (0, "1 passed, 0 failed, 0 skipped")


def test_variants_of_contracts_that_no_recorded_case_holds(tmp_path, capsys):
    """Each with numbers that follow from the contract by hand."""
    full = {"attn_text_visual": torch.eye(3)[None], "rater_index": torch.arange(3)}  # of rank 3: all 3 tokens stay
    kept = {"keep_mask": torch.ones(3, dtype=torch.uint8), "score": torch.full((3,), 1 / 3)}
    kept |= {"rank": torch.tensor(3), "merge": torch.tensor(0)}
    write(
        tmp_path / "sparsevlm/full_rank.safetensors", "rank_adaptive_keep", "sparsevlm",
        {"scale": 1, "bias": 0, "n_visual": 3}, full, kept, atol=1e-6,
    )  # fmt: skip
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [1.0, 0.0]]])  # the first token goes into the last
    x = torch.tensor([[[5.0, -1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]])
    write(
        tmp_path / "tome/amax.safetensors", "merge", "tome",
        {"r": 1, "mode": "amax", "class_token": False, "distill_token": False}, {"metric": metric, "x": x},
        {"x": torch.tensor([[[3.0, 3.0], [2.0, 2.0], [5.0, 4.0]]])},
    )  # fmt: skip
    query, key = torch.ones(1, 12, 2), torch.zeros(1, 12, 2)
    key[:, 4:] = 10  # all rows would look at the second segment, and pay the same to all of their own
    write(
        tmp_path / "hiprune/segments.safetensors", "qwen_scores", "hiprune", {"merge": 2},
        {"query": query, "key": key, "window_index": torch.arange(3), "segments": torch.tensor([0, 4, 12])},
        {"score": torch.ones(3)}, atol=1e-6,
    )  # fmt: skip
    retain = {"image_len": torch.tensor([103]), "pivot_image": torch.tensor([4]), "pivot_text": torch.tensor([4])}
    retain |= {"variant": torch.tensor([2]), "value": torch.tensor([640.0])}
    counted = {"tokens_per_pivot": torch.tensor([12]), "kept": torch.tensor([100])}  # 8 pivots share 99
    write(tmp_path / "dart/all.safetensors", "keep_count", "dart", {"variants": []}, retain, counted)
    code, out = main(capsys, tmp_path)
    assert (code, out.out.strip().splitlines()[-1]) == (0, "4 passed, 0 failed, 0 skipped"), out.out


def test_case_that_no_shared_adapter_understands_is_skipped_with_the_reason(tmp_path, capsys):
    write(tmp_path / "uniform/a.safetensors", "compress", "uniform", {"keep": 1}, {"clouds": torch.zeros(1)}, {})
    code, out = main(capsys, tmp_path)
    assert code == 0 and "SKIPPED 1: the case has none of features, frames, x" in out.out


def test_case_without_metadata_is_no_case():
    path = GOLDEN / "checkpoints/tiny-llava-1.5/model.safetensors"
    with safe_open(path, framework="pt") as source:
        assert "case" not in (source.metadata() or {})
    assert runner.load_case(path) is None
