"""Errors that end the stock command line with exit code 1.

Whether the stock command runs is read off the program's name: it makes the model from ``--model_args`` alone, so that
nothing else tells it from a library user, who wants the error itself.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from loguru import logger


class failing_loudly:
    """Let an error end the stock command line with exit code 1.

    ``lmms-eval`` catches every ``Exception`` of a run, prints it and exits 0. ``SystemExit`` passes its handler and
    ends the process in the ordinary way. Used for that command only: library users get the error itself.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and _is_stock_command():
            traceback.print_exception(error)
            logger.error(f"the run failed: {type(error).__name__}: {error}")
            raise SystemExit(1) from error


def _is_stock_command() -> bool:
    program = Path(sys.argv[0])
    return program.stem == "lmms-eval" or program.parts[-2:] == ("lmms_eval", "__main__.py")
