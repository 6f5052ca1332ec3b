"""Fail if a request of an evaluation through a server came to nothing.

    python scripts/serve/check_answers.py FOLDER

lmms-eval 0.7.3 puts the error's text in the place of the answer and goes on; such an answer must not be scored.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

MARK = "[LMMS_EVAL_REQUEST_FAILED"


def failed(folder: Path) -> tuple[int, int]:
    """(answers that are errors, answers) in the sample files below ``folder``."""
    errors = total = 0
    for path in folder.rglob("*samples*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            total += 1
            errors += MARK in line
    return errors, total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    errors, total = failed(parser.parse_args().folder)
    if not total:
        print("error: no samples were written", file=sys.stderr)
        return 1
    if errors:
        print(f"error: {errors} of {total} requests failed; their scores mean nothing", file=sys.stderr)
        return 1
    print(f"{total} answers, no failed request")
    return 0


if __name__ == "__main__":
    sys.exit(main())
