"""``python -m lmms_eval_accelerate.report RESULTS... --output DIR``: accuracy and cost as HTML, Markdown and CSV."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate_methods.stages.errors import MethodError, check_writable, one_line
from lmms_eval_accelerate.report.results import ReportError

PAGE, MARKDOWN, ACCURACY, EFFICIENCY = "report.html", "report.md", "accuracy.csv", "efficiency.csv"


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    try:
        written = write(args.results, args.output, args.title, args.samples, argv)
    except (MethodError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; start the same command again", file=sys.stderr)
        raise SystemExit(130) from None
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    for path in written:
        console.print(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True, highlight=False)


def write(paths: Sequence[Path], output: Path, title: str, samples: int, argv: Sequence[str] = ()) -> list[Path]:
    """Read the results and write the report; returns its files.

    Raises:
        ReportError: nothing to report, or ``output`` holds a report.
    """
    for name in (PAGE, MARKDOWN, ACCURACY, EFFICIENCY):
        if (output / name).exists():
            raise ReportError(f"{output / name} exists; choose another --output.")
    check_writable(output, f"--output {output}")
    # here, so that -h is quick
    from lmms_eval_accelerate.report import page, results, tables
    from lmms_eval_accelerate.report.accuracy import accuracy_sections
    from lmms_eval_accelerate.report.efficiency import bench_sections, join

    found = results.find(paths)
    sections, benches = accuracy_sections(found.runs), bench_sections(found.benches)
    join(sections, benches)
    created = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    command = shlex.join(["python", "-m", "lmms_eval_accelerate.report", *argv])
    files = {
        PAGE: page.render(title, created, command, sections, benches, found.left_out, samples),
        MARKDOWN: tables.markdown(title, sections, benches, found.left_out),
        ACCURACY: tables.accuracy_csv(sections),
        EFFICIENCY: tables.bench_csv(benches),
    }
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in files.items():
        if content:
            with open(output / name, "x", encoding="utf-8") as file:
                file.write(content)
            written.append(output / name)
    return written


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmms_eval_accelerate.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="run folders, folders of them, efficiency files")
    stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    parser.add_argument("--output", type=Path, default=Path("outputs") / f"report_{stamp}", help="default: %(default)s")
    parser.add_argument("--title", default="Accuracy and cost of visual-token compression")
    parser.add_argument("--samples", type=int, default=1000, help="documents per task in the page (default 1000)")
    return parser


if __name__ == "__main__":
    main()
