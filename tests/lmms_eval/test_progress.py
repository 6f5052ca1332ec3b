"""How far a run is: lines with the time that is left where there is no terminal, and what reads them."""

from __future__ import annotations

import io

import pytest
from lmms_eval_accelerate import progress
from lmms_eval_accelerate.progress import Pace, Progress, duration, read_line


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""

    class Clock:
        now = 1000.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.delenv(progress.SECONDS, raising=False)
    return made


def answer(clock, counted: Progress, answers: int, seconds: float) -> None:
    for _ in range(answers):
        clock.now += seconds
        counted.update()
    counted.close()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (41.4, "41 s"), (99, "99 s"), (240, "4 min"), (7800, "2 h 10 min")]
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words


def test_a_log_gets_a_line_every_so_often_with_the_time_left(clock):
    stream = io.StringIO()
    answer(clock, Progress(100, "m", stream=stream), 100, seconds=2.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "m: 0/100 answered, no answer yet"
    assert lines[1] == "m: 8/100 answered, 16 s, 3 min left"
    assert lines[-1] == "m: 100/100 answered, 3 min, done"
    assert 10 < len(lines) < 16


def test_answers_of_an_interrupted_run_took_no_time_here(clock):
    stream = io.StringIO()
    answer(clock, Progress(100, "m", done=90, stream=stream), 2, seconds=10.0)
    assert stream.getvalue().splitlines() == [
        "m: 90/100 answered, no answer yet",
        "m: 92/100 answered, 20 s, 80 s left",
    ]


def test_a_long_run_fills_no_log(clock):
    stream = io.StringIO()
    answer(clock, Progress(10_000, "m", stream=stream), 10_000, seconds=4.0)  # 11 hours
    assert len(stream.getvalue().splitlines()) < 200


def test_who_follows_says_how_often(clock, monkeypatch):
    monkeypatch.setenv(progress.SECONDS, "1")
    stream = io.StringIO()
    answer(clock, Progress(50, "m", stream=stream), 50, seconds=1.0)
    assert len(stream.getvalue().splitlines()) == 51


def test_other_processes_are_silent(clock):
    stream = io.StringIO()
    answer(clock, Progress(3, "m", shown=False, stream=stream), 3, seconds=60.0)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    counted = Progress(4, "m", done=1, stream=stream)
    counted.update(3)
    counted.close()
    assert "4/4" in stream.getvalue() and "answered" not in stream.getvalue()


def test_what_is_written_is_read(clock):
    stream = io.StringIO()
    answer(clock, Progress(3, "llava_onevision_fastvid", stream=stream), 3, seconds=20.0)
    read = [read_line(line) for line in stream.getvalue().splitlines()]
    assert read == [(0, 3, "no answer yet"), (1, 3, "40 s left"), (2, 3, "20 s left"), (3, 3, "done")]
    for other in ("== run 1/2 begins: x", "m: 3/6 [00:01<00:01]", "answered 3/4", ""):
        assert read_line(other) is None


def test_a_pace_slows_down(clock):
    pace, due = Pace(), []
    for second in range(1, 1001):
        clock.now += 1
        if pace.is_due():
            due.append(second)
    assert due[:3] == [15, 30, 45] and due[-1] - due[-2] > 40
