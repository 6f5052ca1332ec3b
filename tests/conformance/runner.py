"""Run golden cases against our implementation.

``DIR/<method>/*.safetensors`` with a ``case`` in the metadata are run through the adapter of their (method, stage);
``DIR/base/text.json`` through the text checks. A case without an adapter counts as skipped and is listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.paths import GOLDEN as OWN_GOLDEN

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch
from safetensors import safe_open


@dataclasses.dataclass
class Case:
    """One golden file: inputs and expected outputs under their names without ``in.`` / ``out.``."""

    path: Path
    method: str
    stage: str
    params: dict[str, Any]
    atol: float
    rtol: float
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        return f"{self.method}/{self.path.stem}"


@dataclasses.dataclass
class Context:
    """What an adapter may need besides inputs and parameters; ``expected`` are the shapes of the recorded outputs."""

    root: Path
    method: str
    stage: str = ""
    expected: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def checkpoint(self, name: str) -> Path:
        """Folder of a tiny checkpoint: DIR/checkpoints, DIR/<method>, then the same two places of tests/golden."""
        tried = [base / part / name for base in (self.root, OWN_GOLDEN) for part in ("checkpoints", self.method)]
        for path in tried:
            if path.exists():
                return path.resolve()  # a relative one could be taken for one of the tests' own
        raise FileNotFoundError(f"checkpoint {name!r} is in none of {', '.join(map(str, tried))}")


@dataclasses.dataclass
class Result:
    name: str
    status: str  # passed | failed | skipped
    detail: str = ""
    unread: tuple[str, ...] = ()  # parameters of the case that no adapter looked at


class Watched(dict):
    """Parameters that remember which of them were looked at; what is made of them by ``|`` remembers for them."""

    def __init__(self, values: dict[str, Any], read: set[str] | None = None):
        super().__init__(values)
        self.read = set() if read is None else read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:  # said here, so that ``**`` looks at every value by the methods above
        return super().__iter__()

    def __or__(self, other: dict[str, Any]) -> Watched:
        return Watched({**dict(self.items()), **other}, self.read)

    def unread(self) -> tuple[str, ...]:
        return tuple(f"{key}={value!r}" for key, value in self.items() if key not in self.read)


def load_case(path: Path) -> Case | None:
    """The case of a file, or None if it carries none (weights that cases refer to)."""
    with safe_open(path, framework="pt") as source:
        metadata = source.metadata() or {}
        if "case" not in metadata:
            return None
        case = json.loads(metadata["case"])
        tensors = {key: source.get_tensor(key) for key in source.keys()}
    inputs = {k[3:]: v for k, v in tensors.items() if k.startswith("in.")}
    outputs = {k[4:]: v for k, v in tensors.items() if k.startswith("out.")}
    if "row_index" in outputs:  # says which rows were recorded: an input of the comparison, not a result
        inputs["row_index"] = outputs.pop("row_index")
    return Case(
        path=path,
        method=case["method"],
        stage=case["stage"],
        params=case.get("params", {}),
        atol=float(case.get("atol", 0.0)),
        rtol=float(case.get("rtol", 0.0)),
        inputs=inputs,
        outputs=outputs,
    )


def difference(name: str, got: Any, expected: torch.Tensor, atol: float, rtol: float) -> str | None:
    """What differs between one output and its golden value, or None. Integers and booleans must match exactly."""
    got = torch.as_tensor(got)
    if tuple(got.shape) != tuple(expected.shape):
        return f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    exact, got, expected = not expected.is_floating_point(), got.double(), expected.double()
    if exact:
        wrong = (got != expected).flatten()
        if wrong.any():
            first = wrong.nonzero()[0].item()
            return (
                f"{name}: {wrong.sum().item()} of {expected.numel()} differ, first at flat index {first}: "
                f"got {got.flatten()[first].item():.17g}, expected {expected.flatten()[first].item():.17g}"
            )
        return None
    finite = got.isfinite() & expected.isfinite()
    odd = ~finite & (got != expected) & ~(got.isnan() & expected.isnan())
    if odd.any():
        return f"{name}: {odd.sum().item()} non-finite values where others are expected, or the other way round"
    got, expected = got[finite], expected[finite]
    error = (got - expected).abs()
    excess = error - (atol + rtol * expected.abs())
    if (excess > 0).any():
        return (
            f"{name}: {(excess > 0).sum().item()} of {expected.numel()} beyond atol={atol:g} rtol={rtol:g}, "
            f"largest error {error.max().item():.3g}"
        )
    return None


def run_case(case: Case, root: Path) -> Result:
    """One case through its adapter, which is the method's own or the shared one of the stage."""
    from tests.conformance.adapters import find

    adapter = find(case.method, case.stage)
    if adapter is None:
        return Result(case.name, "skipped", f"no adapter for {case.method}.{case.stage}")
    shapes = {name: tuple(value.shape) for name, value in case.outputs.items()}
    params = Watched(case.params)
    try:
        outputs = adapter(case.inputs, params, Context(root, case.method, case.stage, shapes))
    except NotImplementedError as reason:
        return Result(case.name, "skipped", str(reason))
    except Exception:
        return Result(case.name, "failed", traceback.format_exc(limit=-4).strip())
    problems = []
    for key, expected in case.outputs.items():
        if key not in outputs:
            problems.append(f"{key}: the adapter gives no such output")
        elif (problem := difference(key, outputs[key], expected, case.atol, case.rtol)) is not None:
            problems.append(problem)
    return Result(case.name, "failed" if problems else "passed", "; ".join(problems), params.unread())


def run_text(path: Path, checks: dict, root: Path) -> Iterator[Result]:
    """Every item of every section of a text.json."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for section, value in content.items():
        if section in ("format", "source"):
            continue
        label = f"{path.parent.name}/text.json:{section}"
        if section not in checks:
            yield Result(label, "skipped", "no check for this section")
            continue
        try:
            for name, ok, detail in checks[section](value, Context(root, path.parent.name)):
                yield Result(f"{label}:{name}", "passed" if ok else "failed", "" if ok else detail)
        except Exception:
            yield Result(label, "failed", traceback.format_exc(limit=-4).strip())


def run(root: Path, method: str | None = None, stage: str | None = None) -> Iterator[Result]:
    """All results below ``root``, filtered by method folder and stage."""
    from tests.conformance.adapters import TEXT_CHECKS

    if not root.is_dir():
        raise SystemExit(f"{root} is not a folder")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name != "checkpoints")
    if method is not None:
        if method not in {p.name for p in folders}:
            raise SystemExit(f"no method {method!r} below {root}; there are: {', '.join(p.name for p in folders)}")
        folders = [p for p in folders if p.name == method]
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            case = load_case(path)
            if case is not None and stage in (None, case.stage):
                yield run_case(case, root)
        text = folder / "text.json"
        if text.is_file() and stage in (None, "text"):
            yield from run_text(text, TEXT_CHECKS, root)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("directory", type=Path, help="folder with <method>/*.safetensors")
    parser.add_argument("--method", help="only this method's folder")
    parser.add_argument("--stage", help='only this stage ("text" for text.json)')
    parser.add_argument("--unread", action="store_true", help="list the parameters of each case that no adapter reads")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line per case, not only per failure")
    args = parser.parse_args(argv)
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    skipped: dict[str, int] = {}
    with torch.no_grad():
        for result in run(args.directory, args.method, args.stage):
            counts[result.status] += 1
            if result.status == "skipped":
                skipped[result.detail] = skipped.get(result.detail, 0) + 1
            if result.status == "failed" or args.verbose:
                detail = f": {result.detail}" if result.detail else ""
                print(f"{result.status.upper():8}{result.name}{detail}", flush=True)
            if args.unread and result.unread:
                print(f"UNREAD  {result.name}: {', '.join(result.unread)}", flush=True)
    for reason, count in sorted(skipped.items()):
        print(f"SKIPPED {count}: {reason}")
    if not sum(counts.values()):
        print(f"no case found below {args.directory}", file=sys.stderr)
        return 1
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if counts["failed"] else 0
