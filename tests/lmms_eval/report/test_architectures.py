"""Reports of trained architectures: runs at other run parameters are settings of one section."""

import pytest

pytest.importorskip("lmms_eval_accelerate")

from lmms_eval_accelerate.report.accuracy import accuracy_sections
from lmms_eval_accelerate.report.columns import accuracy_columns
from lmms_eval_accelerate.report.results import find

from tests.lmms_eval.report.test_report import write_run


def test_run_parameters_are_settings_of_one_section(tmp_path):
    def write(name, methods, tokens, count, **more):
        settings = {"family": "mqt_llava", "pretrained": "x", "num_visual_tokens": count, **more}
        write_run(tmp_path / name, methods, [1.0, 0.0], tokens=tokens, settings=settings)

    write("dense", [], 100.0, 256)
    write("few", [], 20.0, 36)
    write("method", [{"method": "random", "retention_ratio": 0.5}], 10.0, 36)
    (section,) = accuracy_sections(find([tmp_path]).runs)
    (table,) = section.tables
    assert table.dense.label == "dense"
    assert [e.label for e in table.entries] == ["dense", "num_visual_tokens=36", "random@0.5(num_visual_tokens=36)"]
    assert [round(e.kept, 3) for e in table.entries] == [1.0, 0.2, 0.1]
    assert "num_visual_tokens" not in section.facts
    assert table.entries[1].change == 0.0 and table.entries[1].method == "num_visual_tokens"


def test_the_work_of_its_modules_is_a_column(tmp_path):
    write_run(tmp_path / "plain", [], [1.0])
    (section,) = accuracy_sections(find([tmp_path]).runs)
    headers = {column.header for column in accuracy_columns(section.tables[0])}
    assert not any(header.startswith("own ") for header in headers)
    section.tables[0].entries[0].costs["architecture_tflops"] = 0.25
    (own,) = [c for c in accuracy_columns(section.tables[0]) if c.header.startswith("own ")]
    assert own.text(section.tables[0].entries[0]) == "0.25"
