"""Table files that say something impossible: one line that names file, part, row and what is allowed."""

import copy

import pytest
import yaml
from lmms_eval_accelerate.reproduce.tables import TableError, load

from accelerate_methods.stages.errors import MethodError, UnknownNameError

GOOD = {
    "table": "bad",
    "title": "A table",
    "paper": "A paper",
    "source": "a README",
    "parts": [
        {
            "name": "one",
            "model": {"family": "llava_onevision", "pretrained": "org/model", "max_frames_num": 32},
            "checkpoint": {"hidden_size": 64, "num_hidden_layers": 6},
            "columns": {"VideoMME": {"benchmark": "videomme"}},
            "unmeasured": {"other": "not here"},
            "rows": [
                {"name": "dense", "published": {"VideoMME": 58.6}},
                {"name": "FastVID", "method": "fastvid", "params": {"retention_ratio": 0.25}},
                {"name": "PruMerge", "not_run": "not in this project yet", "published": {"VideoMME": 1, "other": 2}},
            ],
        }
    ],
}


def written(tmp_path, change=None):
    content = copy.deepcopy(GOOD)
    if change is not None:
        change(content, content["parts"][0], content["parts"][0]["rows"])
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_good_file(tmp_path):
    table = load(written(tmp_path))
    dense, fastvid, prumerge = table.parts[0].rows
    assert dense.dense and dense.model_args() == {} and dense.published == {"VideoMME": 58.6}
    assert fastvid.model_args() == {"method": "fastvid", "retention_ratio": 0.25} and fastvid.source == "a README"
    assert prumerge.unmeasured == {"other": 2} and not prumerge.secondary
    with pytest.raises(MethodError, match="'PruMerge' is not run: not in this project yet"):
        prumerge.model_args()


def _set(target, **values):
    target.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p, r: _set(t, table="other"), "table is 'other'; it must be the file's name, 'bad'"),
        (lambda t, p, r: _set(t, titel="x"), "unknown key 'titel'. Did you mean 'title'"),
        (lambda t, p, r: t.pop("paper"), "bad.yaml: paper is missing"),
        (lambda t, p, r: _set(t, parts=[]), "parts is missing"),
        (lambda t, p, r: _set(t, parts={"name": "one"}), "parts: expected a list"),
        (lambda t, p, r: t["parts"].append(p), "part one is there twice"),
        (lambda t, p, r: p.pop("name"), "part without a name"),
        (lambda t, p, r: _set(p, name=192), "name must be text, got 192"),
        (lambda t, p, r: _set(p, colums={}), "part one: unknown key 'colums'. Did you mean 'columns'"),
        (lambda t, p, r: _set(p["model"], family="llava_one"), "unknown family 'llava_one'. Did you mean 'llava_on"),
        (lambda t, p, r: _set(p["model"], max_frames=8), "unknown key 'max_frames'. Did you mean 'max_frames_num'"),
        (lambda t, p, r: _set(p["model"], method="fastv"), "model: unknown key 'method'"),
        (lambda t, p, r: _set(p["model"], force_sample=True), "model: unknown key 'force_sample'"),
        (lambda t, p, r: _set(p["model"], device_map="auto"), "model: unknown key 'device_map'"),
        (lambda t, p, r: p["model"].pop("pretrained"), "pretrained is missing"),
        (lambda t, p, r: p.pop("checkpoint"), "checkpoint needs hidden_size and num_hidden_layers"),
        (lambda t, p, r: _set(p["checkpoint"], num_layers=3), "'num_layers'. Did you mean 'num_hidden_layers'"),
        (lambda t, p, r: _set(p, model_class="Llava"), "unknown model_class of the family llava_onevision: 'Llava'"),
        (
            lambda t, p, r: _set(p, model={"family": "hf", "pretrained": "org/model"}),
            "part one: unknown model_class of the family hf: 'None'",
        ),
        (
            lambda t, p, r: _set(
                p, model={"family": "hf", "pretrained": "x"}, model_class="InternVLForConditionalGeneration"
            ),
            "row FastVID: fastvid cannot run on InternVL",
        ),
        (lambda t, p, r: p.pop("columns"), "no columns"),
        (lambda t, p, r: _set(p["columns"], MLVU={"benchmark": "mlvu"}), "column MLVU: unknown benchmark.*mlvu_dev"),
        (lambda t, p, r: _set(p["columns"]["VideoMME"], task="x"), "column VideoMME: unknown key 'task'"),
        (lambda t, p, r: _set(p["columns"]["VideoMME"], scale=0), "scale must be a number above 0"),
        (lambda t, p, r: _set(p["unmeasured"], VideoMME="why"), "column VideoMME is there twice"),
        (lambda t, p, r: _set(p["unmeasured"], MVBench=None), "unmeasured: MVBench needs a reason"),
        (lambda t, p, r: _set(p, relative="mean"), "unknown value of relative: 'mean'"),
        (lambda t, p, r: r.pop(0), "the first row is 'FastVID'; it must be 'dense'"),
        (lambda t, p, r: r.append(dict(r[0])), "row dense is there twice"),
        (lambda t, p, r: r.append({**r[1], "name": "FastVID %"}), "row FastVID is there twice"),
        (lambda t, p, r: _set(r[0], method="fastvid"), "row dense: the dense row has no method"),
        (lambda t, p, r: (r[0].clear(), _set(r[0], name="dense", not_run="no")), "the dense row is not run"),
        (lambda t, p, r: _set(r[1], published={"VideoMM": 1}), "row FastVID: published: unknown key.*'VideoMME'"),
        (lambda t, p, r: _set(r[1], published={"VideoMME": "58.0"}), "VideoMME must be a number, got '58.0'"),
        (lambda t, p, r: _set(r[1], published={"VideoMME": float("nan")}), "VideoMME must be a number, got nan"),
        (lambda t, p, r: _set(r[1], tflops=True), "tflops must be a number, got True"),
        (lambda t, p, r: _set(r[1], secondary="yes"), "secondary must be true or false"),
        (lambda t, p, r: _set(r[1], note=["x"]), "note must be text"),
        (lambda t, p, r: _set(r[1], method="fastvit"), "row FastVID: unknown method 'fastvit'. Did you mean 'fastvid'"),
        (lambda t, p, r: _set(r[1], config="fastvid/llava_video"), "give one of method, config, arguments and not_run"),
        (lambda t, p, r: r[1].pop("method"), "give one of method, config, arguments and not_run"),
        (lambda t, p, r: _set(r[1], method="none", params={}), "'none' is no method"),
        (lambda t, p, r: _set(r[1], arguments={"num_visual_tokens": 3}), "run parameters of a trained architecture"),
        (lambda t, p, r: (r[1].pop("method"), _set(r[1], config="fastvid/llava_video")), "for the family llava_video"),
        (lambda t, p, r: _set(r[1], params={"retention": 1}), "'retention'. Did you mean 'retention_ratio'"),
        (lambda t, p, r: _set(r[1], params={"retention_ratio": 1.5}), "retention_ratio=1.5 is outside the allowed"),
        (lambda t, p, r: _set(r[1], not_run="no"), "a row with not_run has no method"),
        (lambda t, p, r: _set(r[1], method="prunevid", params={}), "=10, but the decoder has layers 0..5"),
        (
            lambda t, p, r: _set(p, model={"family": "llava", "pretrained": "org/model"}),
            "row FastVID: fastvid cannot run on LLaVA-1.5 or LLaVA-NeXT",
        ),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, change, message):
    with pytest.raises(TableError, match=message) as error:
        load(written(tmp_path, change))
    assert str(error.value).startswith("bad.yaml: ") and "\n" not in str(error.value)


def test_a_model_of_transformers_names_its_class(tmp_path):
    def qwen(table, part, rows):
        part.update(model={"family": "hf", "pretrained": "Qwen/Qwen2.5-VL-7B-Instruct", "max_num_frames": 8})
        part.update(model_class="Qwen2_5_VLForConditionalGeneration")

    part = load(written(tmp_path, qwen)).parts[0]
    assert part.model_class == "Qwen2_5_VLForConditionalGeneration" and part.rows[1].pipeline.name == "fastvid"


def test_part_that_is_not_run(tmp_path):
    def other_model(table, part, rows):
        part.update(model={"family": "pllava"}, not_run="no host")
        rows[1] = {"name": "PruneVid", "published": {"VideoMME": 45.3}}

    part = load(written(tmp_path, other_model)).parts[0]
    assert [row.not_run for row in part.rows] == ["no host", "no host", "not in this project yet"]
    assert part.row("PruneVid").published == {"VideoMME": 45.3}


def test_a_number_given_twice(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("VideoMME: 58.6", "VideoMME: 58.6\n      VideoMME: 58.0"))
    with pytest.raises(TableError, match=r"bad\.yaml: key 'VideoMME' twice, again in line \d+"):
        load(path)


def test_no_such_table(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown table 'fastvit'"):
        load("fastvit")
    with pytest.raises(TableError, match="no such file; tables here: dycoke"):
        load(tmp_path / "none.yaml")
