"""YAML files that people write: read with one error that names the file, whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from accelerate_methods.stages.errors import MethodError, one_line


def read_yaml(path: str | Path, error: type[MethodError] = MethodError) -> Any:
    """The content of a YAML file.

    Args:
        error: what is raised.

    Raises:
        MethodError: the file cannot be read or is no YAML, gives a key twice, or has a part that contains itself.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
        if _contains_itself(content, ()):
            raise ValueError("a part of it contains itself (an anchor that is used below itself)")
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as reason:
        raise error(f"cannot read {path}: {one_line(reason)}") from reason
    return content


class _Loader(yaml.SafeLoader):
    """A key given twice is an error; YAML would silently take the second value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise ValueError(f"key {key!r} twice, again in line {mark.line + 1}")
            seen.append(key)
        return super().construct_mapping(node, deep)


def _contains_itself(content: Any, above: tuple[int, ...]) -> bool:
    if not isinstance(content, (dict, list)):
        return False
    if id(content) in above:
        return True
    parts = content.values() if isinstance(content, dict) else content
    return any(_contains_itself(part, (*above, id(content))) for part in parts)
