"""Following a started series of runs by what it prints: bars on a terminal, otherwise a line every so often."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmms_eval_accelerate.progress import Pace, duration, read_line

#: what the started command prints for us to follow it: begin, end and reuse of run i of n
MARKS = {"begin": "== run {}/{} begins: {}", "end": "== run {}/{} done: {}", "reused": "== run {}/{} is there: {}"}
_MARK = re.compile(r"^== run (\d+)/(\d+) (begins|done|is there): (.*)$")
_TICK = 0.5  # seconds between two looks at whether a line is due


class Follower:
    """Shows how far the runs are, and how long the one that goes on and all of them will take.

    A terminal shows bars. Elsewhere there is a line per run, and while one goes on a line every so often, also while it
    prints nothing itself (loading a model takes minutes).
    """

    def __init__(self, total: int, console: Console):
        self.console, self.total = console, total
        self.running: str | None = None
        self._began, self._pace = time.monotonic(), Pace()
        self._state, self._number, self._took = "starting", 0, []
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._tell, daemon=True)
        self._progress = Progress(
            TextColumn("{task.description:32}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("all runs", total=total)
        self._bar: Any = None

    def __enter__(self) -> Follower:
        self._progress.start()
        if not self.console.is_terminal:
            self._lines.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        self._progress.stop()

    def see(self, line: str) -> bool:
        """Take note of a line; whether it is one of those that only say how far a run is."""
        if match := _MARK.match(line):
            self._mark(int(match[1]), match[3], match[4])
        elif far := read_line(line):
            answered, total, left = far
            self._state = f"{answered}/{total} answered, {left}"
            if self._bar is not None:
                self._progress.update(self._bar, completed=answered, total=total)
            return True
        return False

    def _mark(self, number: int, what: str, name: str) -> None:
        if what == "begins":
            self.running, self._number, self._state = name, number, "loading"
            self._began, self._pace = time.monotonic(), Pace()
            self._bar = self._progress.add_task(name, total=None)
            return
        if self._bar is not None:
            self._progress.remove_task(self._bar)
        self._bar, self.running, self._state = None, None, "between two runs"
        self._progress.update(self._all, completed=number)
        took = time.monotonic() - self._began
        if what == "done":
            self._took.append(took)
        if not self.console.is_terminal:
            how = "there already" if what == "is there" else f"{took:.0f} s"
            print(f"{number}/{self.total} {name}: {how}{self._left(number)}", flush=True)

    def _left(self, number: int) -> str:
        """Of the runs that are to come, if each takes as long as those did that were made here."""
        if not self._took or number == self.total:
            return ""
        return f"; all runs: about {duration(sum(self._took) / len(self._took) * (self.total - number))} left"

    def _tell(self) -> None:
        while not self._ended.wait(_TICK):
            if self._pace.is_due():
                where = f"{self._number}/{self.total} {self.running}" if self.running else f"{self.total} runs"
                print(f"{where}: {self._state}; {duration(self._pace.elapsed)} so far", flush=True)
