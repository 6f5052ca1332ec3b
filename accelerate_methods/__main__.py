"""What methods and trained architectures there are, what one of them can be told, and where a method runs.

    python -m accelerate_methods list
    python -m accelerate_methods show fastvid
    python -m accelerate_methods show mqt_llava
    python -m accelerate_methods check fastvid LLaVA-1.5
    python -m accelerate_methods check fastv mqt_llava

`check` ends with 0 if the method can run on the model, with 1 and the reason if not, and with 2 if a name is unknown.
A model is a name of configs/models/ or a title out of `list`. Methods joined by "+" are checked together.
"""

# Nothing is imported here but what parsing the arguments takes: -h answers at once.
from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import accelerate_methods

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from accelerate_methods.registry.architectures import Architecture, Argument
    from accelerate_methods.registry.families import ModelFamily
    from accelerate_methods.registry.pipeline import Pipeline
    from accelerate_methods.stages.fields import Parameter
    from accelerate_methods.stages.method import Method


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accelerate_methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"accelerate_methods {accelerate_methods.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("list", help="all methods and trained architectures: stages, what they act on, models")
    show = commands.add_parser("show", help="parameters, published settings, models, paper and licence")
    show.add_argument("method", metavar="NAME", help="a method, or the model id of a trained architecture")
    check = commands.add_parser("check", help="whether a method runs on a model, and why not")
    check.add_argument("method", metavar="METHOD", help='e.g. fastvid, or "visionzip+fastv"')
    check.add_argument("model", metavar="MODEL", help="e.g. llava_onevision or LLaVA-1.5")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from accelerate_methods.stages.errors import MethodError

    try:
        if args.command == "list":
            return _list()
        return _show(args.method) if args.command == "show" else _check(args.method, args.model)
    except MethodError as error:  # a name that does not exist, or a plug-in that cannot be imported
        print(f"error: {error}", file=sys.stderr)
        return 2


# -- commands ---------------------------------------------------------------------------------------------------------


def _list() -> int:
    from accelerate_methods.registry import available, method_class

    methods = sorted(map(method_class, available()), key=lambda m: (m.baseline, m.name))
    rows = []
    for method in methods:
        title = f"{method.title} (baseline)" if method.baseline else method.title
        models = ", ".join(family.name for family in _families(method))
        rows.append([method.name, title, ", ".join(method.class_stages()), _modalities(method), models])
    _table("", ["name", "title", "stages", "acts on", "models"], rows)
    from accelerate_methods.registry.architectures import ARCHITECTURES

    columns = ["model id", "name", "visual tokens", "checkpoint", "paper"]
    about = [[e.key, e.name, e.tokens, next(iter(e.checkpoints), "none released"), e.paper] for e in ARCHITECTURES]
    _table("Trained architectures (models of their own)", columns, about)
    return 0


def _show_architecture(entry: Architecture) -> int:
    from accelerate_methods.registry import available, method_class
    from accelerate_methods.registry.compatibility import adaptation, why_not

    facts = {
        "model id": entry.key,
        "paper": f"{entry.paper} ({entry.venue})" if entry.venue else entry.paper,
        "official code": entry.code,
        "licence": entry.licence,
        "checkpoints": ", ".join(entry.checkpoints) or "none released",
        "licence of the weights": entry.weights_licence or "not said",
        "visual tokens": entry.tokens,
        "reads": ", ".join(f"{modality}s" for modality in sorted(entry.modalities)),
        "conversation template": entry.template,
    }
    _table(f"{entry.name} (trained architecture)", [], [[key, value] for key, value in facts.items()])
    arguments = [
        [a.name, "-" if a.default is None else str(a.default), _rule(a), a.meaning.replace("``", "`")]
        for a in entry.arguments
    ]
    _table("Run parameters", ["name", "default", "allowed", "meaning"], arguments)
    rows = []
    for method in map(method_class, available()):
        reason = why_not(method, entry)
        adapted = adaptation(method, entry) if reason is None else None
        rows.append([method.name, f"no: {reason}" if reason else f"adaptation: {adapted}" if adapted else "yes"])
    _table("Methods", ["method", "runs"], rows)
    return 0


def _rule(argument: Argument) -> str:
    shown = argument.rule.allowed.replace("(-inf, inf)", "")
    return f"{argument.rule.kind} {shown}".strip() if argument.rule.kind in ("number", "integer") else shown


def _show(name: str) -> int:
    from accelerate_methods.registry.architectures import ARCHITECTURES

    for entry in ARCHITECTURES:
        if name.lower() in (entry.key, entry.file, entry.name.lower()):
            return _show_architecture(entry)
    return _show_method(name)


def _show_method(name: str) -> int:
    from accelerate_methods.registry import method_class
    from accelerate_methods.registry.compatibility import adaptation, why_not
    from accelerate_methods.registry.families import families
    from accelerate_methods.stages.fields import parameters_of

    method = method_class(name)
    facts = {
        "name": method.name,
        "paper": method.paper,
        "official code": method.code,
        "licence": method.licence,
        "stages": ", ".join(method.class_stages()),
        "acts on": _modalities(method),
        "reads": ", ".join(sorted(method.signals)) or "no signals of the encoder",
        "position ids": "of the uncompressed prompt" if method.positions == "original" else "re-numbered",
    }
    title = f"{method.title} (baseline)" if method.baseline else method.title
    _table(title, [], [[key, value] for key, value in facts.items() if value])
    parameters = [[p.name, _default(p), _allowed(p), p.meaning.replace("``", "`")] for p in parameters_of(method)]
    _table("Parameters", ["name", "default", "allowed", "meaning"], parameters)
    _table("Settings below configs/ (each file says what was published)", _SETTING_COLUMNS, _settings(method.name))
    models = []
    for family in families():
        reason = why_not(method, family)
        adapted = adaptation(method, family) if reason is None else None
        note = f"no: {reason}" if reason else f"adaptation: {adapted}" if adapted else "yes"
        models.append([family.name, note])
    _table("Models", ["model", "runs"], models)
    return 0


def _alone(spec: str) -> Pipeline:
    """One method or config. Whether it runs does not hang on its budget: a method that has no default one gets one."""
    from accelerate_methods.registry.names import available
    from accelerate_methods.registry.pipeline import resolve
    from accelerate_methods.registry.settings import has_budget
    from accelerate_methods.stages.errors import MethodError, UnknownNameError

    try:
        return resolve(spec)
    except UnknownNameError:
        raise
    except MethodError:
        if spec.strip() not in available() or not has_budget(spec.strip()):
            raise
        return resolve(spec, retention_ratio=0.5)


def _check(spec: str, model: str) -> int:
    from accelerate_methods.registry.compatibility import adaptation, why_not
    from accelerate_methods.registry.models import families_of
    from accelerate_methods.registry.pipeline import resolve
    from accelerate_methods.stages.errors import MethodError

    candidates = families_of(model)
    parts = [_alone(part) for part in ([spec] if "/" in spec or spec.endswith((".yaml", ".yml")) else spec.split("+"))]
    try:
        pipeline = resolve(parts)
        methods = [type(method) for method in pipeline.methods]
    except MethodError as error:  # methods that cannot be combined
        print(f"{spec} cannot run on {model}: {error}")
        return 1
    for written_for in pipeline.models:
        if not {family.name for family in candidates} & set(written_for.families):
            print(f"{spec} cannot run on {model}: the config is for {written_for.title}")
            return 1
    adapted = []
    for method in methods:
        reasons = [why_not(method, family) for family in candidates]
        if all(reasons):
            print(f"{method.name} cannot run on {model}: it {reasons[0]}")
            return 1
        adapted += filter(None, (adaptation(method, f) for f, r in zip(candidates, reasons, strict=True) if r is None))
    print(f"{spec} runs on {model}" + (f" (adaptation: {'; '.join(dict.fromkeys(adapted))})" if adapted else ""))
    return 0


# -- words ------------------------------------------------------------------------------------------------------------


def _families(method: type[Method]) -> list[ModelFamily]:
    from accelerate_methods.registry.compatibility import why_not
    from accelerate_methods.registry.families import families

    return [family for family in families() if why_not(method, family) is None]


def _modalities(method: type[Method]) -> str:
    return ", ".join(f"{modality}s" for modality in sorted(method.modalities))


def _default(parameter: Parameter) -> str:
    return "-" if parameter.default is None else str(parameter.default)


def _allowed(parameter: Parameter) -> str:
    kind = {"number": "number", "integer": "integer"}.get(parameter.kind, "")
    bounds = parameter.allowed.replace("(-inf, inf)", "")
    return " ".join(filter(None, (kind, bounds, "(budget)" if parameter.budget else "")))


_SETTING_COLUMNS = ("config", "parameters", "description")


def _settings(name: str) -> list[list[str]]:
    """Rows of a method's configs: one for its parameters, one for every further level."""
    from accelerate_methods.registry.configs import config_names, read_config

    rows = []
    for config in config_names():
        if config.partition("/")[0] != name:
            continue
        content = read_config(config)
        rows.append([config, _pairs(content.get("params") or {}), str(content.get("description", ""))])
        rows += [["", _pairs(level), "(level)"] for level in content.get("levels") or ()]
    return rows


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items()) or "defaults"


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A titled table: with rich on a terminal, otherwise as aligned plain text. Cells are never read as markup."""
    rows = [list(row) for row in rows]
    if not rows:
        return
    if sys.stdout.isatty():
        _rich_table(title, head, rows)
        return
    if title:
        print(title)
    lines = [list(head), *rows] if head else rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def _rich_table(title: str, head: Sequence[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(box=box.SIMPLE_HEAD, show_header=bool(head), title=Text(title) if title else None)
    view.title_justify = "left"
    for index in range(len(rows[0])):
        view.add_column(Text(head[index]) if head else "", no_wrap=index == 0)
    for row in rows:
        view.add_row(*map(Text, row))
    Console(markup=False, emoji=False).print(view)


if __name__ == "__main__":
    raise SystemExit(main())
