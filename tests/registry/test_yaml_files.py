"""YAML files of users: whatever is wrong with one, the error is one line that names it."""

import pytest

from accelerate_methods.registry.configs import read_config
from accelerate_methods.registry.yaml_files import read_yaml
from accelerate_methods.stages.errors import MethodError, check_writable


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"method: [", "expected the node content"),
        (b"method: fastvid\nmethod: fastv\n", "key 'method' twice, again in line 2"),
        (b"method: fastvid\nparams: {p: 1, p: 2}\n", "key 'p' twice"),
        (b"method: fastvid\nparams: &p\n  p: *p\n", "contains itself"),
        (b"&all [*all]", "contains itself"),
        ("method: caf\xe9".encode("latin-1"), "can't decode byte"),
        (b"method: fast\x00vid", "special characters are not allowed"),
        (b"method: !!python/object:os.system x", "could not determine a constructor"),
        (b"", "expected a mapping"),
        (b"- fastvid", "expected a mapping"),
        (b"method: [fastvid]", "'method' must be a name"),
        (b"method: fastvid\nparams: [1]", "'params' must be a mapping"),
        (b"method: fastvid\nlevels: 3", "'levels' must be a list"),
        (b"method: fastvid\nlevels: [0.1]", "every entry of 'levels' must be a mapping"),
    ],
)
def test_damaged_config(content, reason, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(MethodError) as caught:
        read_config(file)
    message = str(caught.value)
    assert str(file) in message and reason in message and "\n" not in message


def test_what_is_allowed(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: &x {k: 1}\nb: *x\nc: {<<: *x, k: 2}\n")  # a BOM, an anchor, a merge
    assert read_yaml(file) == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 2}}
    with pytest.raises(MethodError, match="Is a directory"):
        read_yaml(tmp_path)


def test_output_folders(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder", "--output")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(MethodError, match=r"^--output: .*file is no folder"):
        check_writable(tmp_path / "file" / "below", "--output")
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(MethodError, match="no permission to write into"):
        check_writable(tmp_path / "new", "--output")
