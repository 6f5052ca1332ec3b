"""The outcome of a table for the terminal and as Markdown, made from the same grids of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from accelerate_methods.bench.matching import solution
from lmms_eval_accelerate.report.statistics import p_text
from lmms_eval_accelerate.runs import no_op
from lmms_eval_accelerate.runs.long_prompts import MARK, LongPrompts, explained, marked

#: width from which what is relative and what it cost stand in one table, and below which derived columns are left out
WIDE, NARROW = 150, 96
_NAME, _CELL = 22, 12  # columns that a row's name and a score take in the first table


@dataclasses.dataclass
class Grid:
    """A table of text. ``sections``: indices of rows after which a line is drawn."""

    title: str
    headers: list[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    sections: set[int] = dataclasses.field(default_factory=set)

    def rich(self) -> Table:
        view = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for index, header in enumerate(self.headers):
            # a long name folds, numbers never do
            longest = max((len(row[0]) for row in self.rows), default=0)
            wrap = {"no_wrap": True} if index else {"overflow": "fold", "min_width": min(longest, _NAME)}
            view.add_column(Text(header), justify="right" if index else "left", vertical="top", **wrap)
        for index, row in enumerate(self.rows):
            view.add_row(*map(Text, row), end_section=index in self.sections)
        return view

    def markdown(self) -> str:
        flat = [[cell.replace("\n", "<br>") for cell in row] for row in self.rows]
        head = [header.replace("\n", " ") for header in self.headers]
        lines = [f"**{self.title}**", "", _line(head), "|---|" + "---:|" * (len(head) - 1), *map(_line, flat)]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show(outcome: Mapping[str, Any], console: Console) -> None:
    """Print the tables of every part, what is to be known of them, and the warnings."""
    console.print(Text.assemble((str(outcome["title"]), "bold"), f"  ({outcome['paper']})"))
    for line in headings(outcome):
        console.print(Text(line))
    for part in outcome["parts"]:
        console.print(Text.assemble("\n", (str(part["name"]), "bold"), f": {part['pretrained']}"))
        for grid in grids(part, console.width):
            # above the table, not in it: a narrow table would fold its title
            console.print(Text(grid.title, "italic"))
            console.print(grid.rich())
        for note in notes(part):
            console.print(Text(note, "dim"))
    for warning in outcome["warnings"]:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))


def markdown(outcome: Mapping[str, Any]) -> str:
    """``outcome.md``."""
    lines = [f"# {outcome['title']}", "", f"{outcome['paper']}. Published numbers: {outcome['source']}.", ""]
    for line in headings(outcome):
        lines += [line, ""]
    machine, versions = outcome.get("machine") or {}, outcome.get("versions") or {}
    packages = [f"{name} {versions[name]}" for name in ("torch", "transformers", "lmms-eval") if name in versions]
    facts = [outcome.get("created"), machine.get("name"), *packages, f"code {outcome.get('code')}"]
    lines += [", ".join(map(str, filter(None, facts))), ""]
    if outcome.get("command"):
        lines += ["```bash", outcome["command"], "```", ""]
    for part in outcome["parts"]:
        lines += [f"## {part['name']}", "", f"`{part['pretrained']}`", ""]
        for grid in grids(part, WIDE):
            lines += [grid.markdown()]
        lines += [f"* {note}" for note in notes(part)] + [""]
    if outcome["warnings"]:
        lines += ["## Warnings", "", *(f"* {warning}" for warning in outcome["warnings"]), ""]
    return "\n".join(lines)


def headings(outcome: Mapping[str, Any]) -> list[str]:
    """What has to be known before any number is read."""
    lines = [outcome["note"]] if outcome["note"] else []
    if outcome["limit"] is not None:
        lines.append(f"First {outcome['limit']} documents of every task: not the paper's numbers.")
    if outcome["other_model"]:
        lines.append(
            f"Other model ({outcome['other_model']}): the published numbers are those of the paper's model, so no "
            "difference to them is shown."
        )
    return lines


def grids(part: Mapping[str, Any], width: int) -> list[Grid]:
    """The tables of a part for a terminal of ``width`` columns."""
    if not part["columns"]:
        return []
    made = _scores(part, width)
    if not any(_measured(row) for row in part["rows"]):
        return made
    costs = [cells for cells in _COSTS if cells is not _PAPER or not part["other_model"]]
    if width >= WIDE:
        both = "Relative to the measured dense run, and costs"
        return [*made, _details(part, both, [*_RELATIVE, *costs]), *_kept(part)]
    relative = [cells for cells in _RELATIVE if width >= NARROW or cells[0] not in _REPEATED]
    return [
        *made,
        _details(part, "Relative to the measured dense run", relative),
        _details(part, "Costs, means per document", costs),
        *_kept(part),
    ]


def _kept(part: Mapping[str, Any]) -> list[Grid]:
    """What was kept, per document and by layer; no table where the runs did not count it."""
    found = [cell.get("realised") for row in part["rows"] for cell in row["cells"].values()]
    return [_details(part, "Share of the visual tokens that was kept", _KEPT)] if any(found) else []


def _measured(row: Mapping[str, Any]) -> bool:
    return any(cell["measured"] is not None for cell in row["cells"].values())


def _scores(part: Mapping[str, Any], width: int) -> list[Grid]:
    """Rows x columns as in the paper; measured above, published and the difference below. Split where too wide."""
    columns = part["columns"]
    at_once = max(1, (width - _NAME - _CELL) // _CELL)
    count = -(-len(columns) // at_once)
    size = -(-len(columns) // count)
    pieces = [columns[begin : begin + size] for begin in range(0, len(columns), size)]
    made = []
    for number, piece in enumerate(pieces, 1):
        last = number == len(pieces)
        of = f" ({number} of {len(pieces)})" if len(pieces) > 1 else ""
        below = "published for another model" if part["other_model"] else "published and measured - published"
        grid = Grid(f"Measured; below it {below}{of}", ["", *(_title(c) for c in piece)])
        if last:
            grid.headers.append("mean,\n% of dense")
        for index, row in enumerate(part["rows"]):
            cells = [_score(row["cells"][c["title"]], c) for c in piece]
            grid.rows.append([_row_name(row), *cells, *([_mean(row)] if last else [])])
            grid.sections.add(index)
        made.append(grid)
    return made


def _title(column: Mapping[str, Any]) -> str:
    name = column["title"]
    return name if column["unit"] == "%" else f"{name}\n({column['unit']})"


def _row_name(row: Mapping[str, Any]) -> str:
    return row["name"] + (" °" if row["secondary"] else "")


def _score(cell: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    digits = 2 if column["unit"] == "of 5" else 1
    below = _number(cell["published"], digits)
    if cell["difference"] is not None:
        below += f" {cell['difference']:+.{digits}f}"
    return f"{no_op.marked(_number(cell['measured'], digits), cell.get('no_op'))}\n{below}"


def _mean(row: Mapping[str, Any]) -> str:
    """Mean relative score, published below; both over the columns that the paper prints, if it prints any."""
    published = row["mean_relative_published"]
    # a table may print its mean without the scores that it is made of
    some = published is not None and row["columns_in_mean_published"] > 0
    measured = row["mean_relative_of_published"] if some else row["mean_relative"]
    marks = ("†" if _fewer(row) else "") + ("‡" if row["mean_relative_printed"] else "")
    above = _number(measured)
    if measured is not None and not row["dense"] and not row.get("mean_comparable", True):
        above = f"{above} {MARK}"
    return f"{above}\n{_number(published)}{f' {marks}' if marks else ''}"


def _fewer(row: Mapping[str, Any]) -> bool:
    """Whether the mean leaves out columns that were measured but not published."""
    return 0 < row["columns_in_mean_published"] < row["columns_in_mean"]


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}%"


def _interval(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    if cell["low"] is None:
        return "" if row["dense"] else "none"
    return f"{cell['low']:+.{cell['digits']}f} to {cell['high']:+.{cell['digits']}f}"


def _interval_and_test(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """The interval, marked where the dense run is no baseline, and McNemar's p below it where there is one."""
    interval = marked(_interval(row, cell), cell.get("not_comparable"))
    if cell.get("p_value") is None:
        return interval
    return f"{interval}\np {p_text(cell['p_value'])} ({cell['lost']} : {cell['won']})"


def _tokens(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    tokens = cell["costs"].get("visual_tokens_per_layer")
    return "" if tokens is None else f"{tokens:.0f} ({_percent(cell['visual_tokens_share'])})"


def _flops(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    tera = cell["costs"].get("llm_tflops")
    if tera is None:
        return ""
    return marked(f"{tera:.3g} ({_percent(cell['flops_share'])})", cell.get("not_comparable"))


def _cost(key: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
    return lambda row, cell: "" if cell["costs"].get(key) is None else f"{cell['costs'][key]:.1f}"


def _optional(key: str, form: str) -> Callable[[Mapping[str, Any], Mapping[str, Any]], str]:
    return lambda row, cell: "" if cell[key] is None else format(cell[key], form)


def _of_dense(text: Callable[[Mapping[str, Any], Mapping[str, Any]], str]) -> Callable[..., str]:
    """A cell relative to the dense run, marked where that run is no baseline."""
    return lambda row, cell: marked(text(row, cell), cell.get("not_comparable"))


def _change(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    return "" if cell["change"] is None else f"{cell['change']:+.{cell['digits']}f}"


def _layers(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    found = cell.get("realised") or {}
    return no_op.layers_text(found["by_layer"]) if found else ""


def _too_long(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    return LongPrompts(**(cell.get("long_prompts") or {})).count


Cells = Sequence[tuple[str, Callable[[Mapping[str, Any], Mapping[str, Any]], str]]]
_RELATIVE: Cells = (
    ("score", lambda row, cell: _number(cell["measured"], cell["digits"])),
    ("prompts\ntoo long", _too_long),
    ("% of\ndense", _of_dense(_optional("relative", ".1f"))),
    ("pub-\nlished", _optional("relative_published", ".1f")),
    ("vs\ndense", _of_dense(_change)),
    ("95 % interval,\nMcNemar", _interval_and_test),
    ("same\nanswers", _of_dense(lambda row, cell: _percent(cell["agreement"]))),
    ("KL first\ntoken", _of_dense(_optional("kl", ".3f"))),
)
_REPEATED = ("score", "pub-\nlished")  # what the first table says, too
_PAPER = ("paper\n1e12", lambda row, cell: "" if row["published_tflops"] is None else f"{row['published_tflops']:g}")
_COSTS: Cells = (
    ("visual\ntokens", _tokens),
    ("LLM FLOPs\n1e12", _flops),
    _PAPER,
    ("compress\nms", _cost("compress_ms")),
    ("prefill\nms", _cost("prefill_ms")),
    ("speed\nup", _of_dense(lambda row, cell: "" if cell["speedup"] is None else f"{cell['speedup']:.2f}x")),
)


_KEPT: Cells = (
    ("mean", lambda row, cell: _percent((cell.get("realised") or {}).get("kept"), 1)),
    ("least of a\ndocument", lambda row, cell: _percent((cell.get("realised") or {}).get("least"), 1)),
    ("most of a\ndocument", lambda row, cell: _percent((cell.get("realised") or {}).get("most"), 1)),
    ("by layer", _layers),
)


def _details(part: Mapping[str, Any], title: str, cells: Cells) -> Grid:
    """A line per column and measured row. Columns of cells that are empty everywhere are left out."""
    every = [(column, row) for column in part["columns"] for row in part["rows"]]
    lines = [(column, row) for column, row in every if row["cells"][column["title"]]["measured"] is not None]
    # marks of a judge go from 0 to 5: one digit would hide every difference
    of_five = {c["title"]: 2 if c["unit"] == "of 5" else 1 for c in part["columns"]}
    given = [(row, {**row["cells"][c["title"]], "digits": of_five[c["title"]]}) for c, row in lines]
    texts = {header: [of(row, cell) for row, cell in given] for header, of in cells}
    headers = [header for header, column in texts.items() if any(column)]
    grid = Grid(title, ["benchmark, row", *headers])
    before = None
    for index, (column, row) in enumerate(lines):
        if column["title"] != before:
            if grid.rows:
                grid.sections.add(len(grid.rows) - 1)
            counts = {c["documents"] for c in (r["cells"][column["title"]] for r in part["rows"]) if c["documents"]}
            unit = "" if column["unit"] == "%" else f" ({column['unit']})"
            number = f"n={min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")
            grid.rows.append([f"{column['title']}{unit}, {number}", *("" for _ in headers)])
            before = column["title"]
        name = no_op.marked(_row_name(row), row["cells"][column["title"]].get("no_op"))
        grid.rows.append([f"  {name}", *(texts[header][index] for header in headers)])
    return grid


def notes(part: Mapping[str, Any]) -> list[str]:
    """What the numbers of a part mean, and why some are missing."""
    made = [part["note"]] if part["note"] else []
    if part["not_run"]:
        made.append(f"not run: {part['not_run']}")
    rows = part["rows"]
    made += [f"{row['name']}: not run ({row['not_run']})" for row in rows if row["not_run"] and not part["not_run"]]
    if any(row["secondary"] for row in rows):
        made.append("°: published by others than the method's authors.")
    if any(map(_fewer, rows)):
        made.append("†: the measured mean is over the columns that the paper prints.")
    if any(row["mean_relative_printed"] for row in rows):
        made.append("‡: as the table prints it, over its own columns (see what is not measured here).")
    made += _solved(part)
    if part["columns"]:
        made.append(_mean_explained(part))
    units = sorted({f"{c['title']} in {c['unit']}" for c in part["columns"] if c["unit"] != "%"})
    made.append("Scores in per cent" + (f", {', '.join(units)}." if units else "."))
    if any(map(_measured, rows)):
        made.append(_explained(part))
        made += _without_interval(part)
        made += _not_comparable(part)
    made += [f"{c['title']}: {c['note']}" for c in part["columns"] if c["note"]]
    if part["unmeasured"]:
        made.append("Not measured here: " + "; ".join(f"{name} ({why})" for name, why in part["unmeasured"].items()))
    return made + [f"{row['name']}: {row['note']}" for row in rows if row["note"]]


def _solved(part: Mapping[str, Any]) -> Iterable[str]:
    """The budgets that were solved."""
    for row in part["rows"]:
        found = {title: cell.get("matched") for title, cell in row["cells"].items() if cell.get("matched")}
        if found:
            yield f"{row['name']}: " + "; ".join(f"{title}: {solution(each)}" for title, each in found.items())


def _mean_explained(part: Mapping[str, Any]) -> str:
    how = "ratio of the mean scores" if part["relative"] == "ratio_of_means" else "mean of the columns' ratios"
    without = [column["title"] for column in part["columns"] if not column["in_mean"]]
    return f"mean, % of dense: {how}" + (f", without {', '.join(without)} (said by other columns)." if without else ".")


def _explained(part: Mapping[str, Any]) -> str:
    per = {c["interval"] for r in part["rows"] for c in r["cells"].values() if c["low"] is not None}
    images = " (of MME: the images with both questions)" if any(text.endswith("images") for text in per) else ""
    return (
        f"vs dense, interval: measured row - measured dense, paired bootstrap over the documents{images}. "
        "McNemar: exact two-sided p; in brackets the documents that dense alone and the row alone has right. "
        "same answers, KL: answers and first-token distributions against those of the dense run (KL: lower bound, "
        "nats). visual tokens: mean over the LLM's layers; kept: of a document over all layers, "
        "of a layer over all documents; FLOPs: multiply-accumulates of its prefill. speed up: "
        "(compress + prefill) of dense / of the row. An interval of 0 to 0 says that no document's score differs; it "
        "proves nothing."
    )


def closing(outcome: Mapping[str, Any]) -> str:
    """The last line: which rows are the dense model in effect; empty if none is."""
    claimed = {
        f"{row['name']} on {title}": cell["no_op"]
        for part in outcome["parts"]
        for row in part["rows"]
        for title, cell in row["cells"].items()
        if cell["measured"] is not None and not row["dense"]
    }
    return no_op.closing(claimed, len(claimed))


def _not_comparable(part: Mapping[str, Any]) -> list[str]:
    reasons = {
        f"{row['name']}, {title}": cell.get("not_comparable")
        for row in part["rows"]
        for title, cell in row["cells"].items()
    }
    return explained(reasons)


def _without_interval(part: Mapping[str, Any]) -> Iterable[str]:
    reasons: dict[str, list[str]] = {}
    for row in part["rows"]:
        for title, cell in row["cells"].items():
            if cell["interval"] is not None and cell["low"] is None:
                reason = f"{title}: no interval, {cell['interval'].removeprefix('none: ')}"
                reasons.setdefault(reason, []).append(row["name"])
    return [f"{reason} ({', '.join(names)})" for reason, names in reasons.items()]
