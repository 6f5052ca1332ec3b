"""How far a run is: a bar on a terminal, otherwise a line every so often, each with the time that is left.

The lines are also what a command that started the run follows (``runs/launch.py``).
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import IO, Any

#: environment variable: seconds between two lines, for who follows them
SECONDS = "LMMS_EVAL_ACCELERATE_PROGRESS_SECONDS"
_LINE = re.compile(r"^\S+: (\d+)/(\d+) answered, (?:.*, )?(.+ left|done|no answer yet)$")


def duration(seconds: float) -> str:
    """A time in words: "41 s", "4 min", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Pace:
    """When to write the next line: after 15 s, and the rarer the longer it takes (20 lines while a run doubles)."""

    def __init__(self, shortest: float = 15.0, share: float = 0.05):
        self.shortest, self.share = shortest, share
        self.began = self.last = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def is_due(self) -> bool:
        """True once per interval."""
        now = time.monotonic()
        if now - self.last < max(self.shortest, self.share * (now - self.began)):
            return False
        self.last = now
        return True


class Progress:
    """Counts answers.

    Args:
        total: how many there will be; ``done``: those that an interrupted run gave.
        name: what stands in front.
        shown: False for all processes but the first.
        stream: where to (default: stderr).
    """

    def __init__(self, total: int, name: str, done: int = 0, shown: bool = True, stream: IO[str] | None = None):
        self.total, self.name, self.done, self.before = total, name, done, done
        self.shown, self.stream = shown, stream or sys.stderr
        self._bar: Any = None
        if not shown:
            return
        if self.stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=name, file=self.stream)
        else:
            given = os.environ.get(SECONDS)
            self._pace = Pace(float(given), 0.0) if given else Pace()
            self._write()

    def update(self, answers: int = 1) -> None:
        self.done += answers
        if self._bar is not None:
            self._bar.update(answers)
        elif self.shown and (self._pace.is_due() or self.done == self.total):
            self._write()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _write(self) -> None:
        said = [f"{self.done}/{self.total} answered"]
        elapsed, own = self._pace.elapsed, self.done - self.before
        if own:
            said.append(duration(elapsed))
        if self.done == self.total:
            said.append("done")
        else:
            said.append(f"{duration(elapsed / own * (self.total - self.done))} left" if own else "no answer yet")
        self.stream.write(f"{self.name}: {', '.join(said)}\n")
        self.stream.flush()


def read_line(line: str) -> tuple[int, int, str] | None:
    """(answered, all, "4 min left") of a line that :class:`Progress` wrote; None for another one."""
    found = _LINE.match(line)
    return found and (int(found[1]), int(found[2]), found[3])
