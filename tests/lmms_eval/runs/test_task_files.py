"""Task files that libyaml reads are what lmms-eval itself makes of them."""

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("lmms_eval_accelerate")

import lmms_eval.utils as harness
import yaml
from lmms_eval.utils import load_yaml_config
from lmms_eval_accelerate.runs.task_files import read_by_libyaml

FILE = """
include: base.yaml
task: made_up
doc_to_text: !function utils.text
metric_list:
  - {metric: acc, share: 1.0e-1, higher_is_better: yes}
prompt: "\\nä: 猫"
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "base.yaml").write_text("dataset_path: json\ndoc_to_visual: !function utils.visual\n")
    (tmp_path / "utils.py").write_text("def text(doc): return doc\ndef visual(doc): return []\n")
    (tmp_path / "made_up.yaml").write_text(FILE, encoding="utf-8")
    return tmp_path / "made_up.yaml"


def test_the_same_configuration(file):
    expected = load_yaml_config(str(file))
    with read_by_libyaml():
        got = load_yaml_config(str(file))
        # of what the index of all tasks reads, functions are not imported
        assert set(load_yaml_config(str(file), mode="simple")) == set(expected)
    functions = [(one.pop("doc_to_text"), one.pop("doc_to_visual")) for one in (got, expected)]
    assert got == expected and [f.__name__ for f in functions[0]] == ["text", "visual"]
    assert [f.__code__.co_code for f in functions[0]] == [f.__code__.co_code for f in functions[1]]


def test_nothing_is_left_behind_and_mistakes_name_the_file(file):
    file.write_text("a: [1, 2\nb: 3\n")
    with pytest.raises(yaml.YAMLError, match=r'made_up\.yaml", line 2'), read_by_libyaml():
        assert harness.yaml.full_load is not yaml.full_load
        load_yaml_config(str(file))
    assert harness.yaml is yaml
