"""What a person sees, on a terminal and in a file."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest

from dist_resnet.data.images import progress
from dist_resnet.tracking.console import Console, duration


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _train_row(step: int) -> dict[str, float | int]:
    return {
        "step": step,
        "epoch": step / 390,
        "seconds": step * 0.01,
        "train/loss": 1.2344,
        "train/top1": 0.543,
        "train/lr": 0.0498,
        "perf/images_per_second": 5312.4,
    }


EVAL_ROW = {"step": 390, "epoch": 1.0, "val/top1": 0.612, "val/loss": 1.1, "val/images": 10_000}


def test_plain_line_says_what_matters() -> None:
    out, clock = io.StringIO(), _Clock()
    console = Console(58_500, stream=out, every_seconds=0, clock=clock)
    for step in (400, 800, 1200):
        clock.now += 5
        console.log(_train_row(step))
    assert out.getvalue().splitlines()[-1] == (
        "step 1,200/58,500  epoch 3.1  loss 1.234  top1 54.3%  lr 0.0498  5,312 img/s  eta 11m56s"
    )


def test_plain_lines_are_throttled_but_evaluations_and_the_last_step_never_are() -> None:
    out, clock = io.StringIO(), _Clock()
    console = Console(1000, stream=out, every_seconds=10, clock=clock)
    for step in range(50, 1001, 50):
        clock.now += 1
        console.log(_train_row(step))
        if step == 400:
            console.log(EVAL_ROW)
    lines = out.getvalue().splitlines()
    steps = [line.split("/")[0] for line in lines if line.startswith("step")]
    assert steps == ["step 50", "step 550", "step 1,000"]
    assert "epoch 1  val top1 61.20%  best so far  val loss 1.1000  (10,000 images)" in lines
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_time_left_holds_evaluations_but_not_the_warm_up() -> None:
    out, clock = io.StringIO(), _Clock()
    console = Console(1000, stream=out, every_seconds=0, clock=clock)
    clock.now = 100.0  # compilation
    console.log(_train_row(100))
    for step in (200, 300, 400):
        clock.now += 10
        console.log(_train_row(step))
        clock.now += 20  # an evaluation, twice as long as its epoch
        console.log({"step": step, "epoch": 1.0, "val/top1": 0.5})
    clock.now += 10
    console.log(_train_row(500))
    # 400 steps in 100 s since the warm-up ended, 500 steps to go
    assert out.getvalue().splitlines()[-1].endswith("eta 2m05s")


def test_a_resumed_run_counts_from_its_first_step() -> None:
    out, clock = io.StringIO(), _Clock()
    console = Console(1000, start_step=900, stream=out, every_seconds=0, clock=clock)
    clock.now = 10.0
    console.log(_train_row(950))
    assert out.getvalue().strip().endswith("eta 10s")


def test_best_is_remembered() -> None:
    out = io.StringIO()
    console = Console(1000, stream=out)
    for top1 in (0.5, 0.4):
        console.log({"step": 1, "epoch": 1.0, "val/top1": top1, "gap/top1": -0.0123})
    first, second = out.getvalue().splitlines()
    assert "best so far" in first
    assert "train minus val -1.23%" in first
    assert "best 50.00%" in second


def test_a_continued_run_calls_best_only_what_is() -> None:
    out = io.StringIO()
    console = Console(1000, 900, stream=out, best=0.6)
    for top1 in (0.5, 0.45, 0.7):
        console.log({"step": 950, "epoch": 9.5, "val/top1": top1})
    verdicts = [line.split("  ")[2] for line in out.getvalue().splitlines()]
    assert verdicts == ["best 60.00%", "best 60.00%", "best so far"]


def test_not_finite_loss_and_missing_figures_do_not_raise() -> None:
    out = io.StringIO()
    console = Console(1000, stream=out, every_seconds=0)
    console.log({"step": 1, "train/loss": float("nan")})
    console.log({"step": 2, "epoch": 0.0, "val/loss": float("inf")})
    console.log({"step": 3, "perf/step_ms": 1.0})
    console.close(0, {})
    assert "loss nan" in out.getvalue()
    assert "val loss inf" in out.getvalue()


def test_a_terminal_gets_one_live_line_and_scrolling_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out, clock = _Terminal(), _Clock()
    console = Console(1000, stream=out, clock=clock)
    for step in range(50, 501, 50):
        clock.now += 1
        console.log(_train_row(step))
        if step == 400:
            console.log(EVAL_ROW)
    console.message("saved")
    console.close(0, {})
    text = out.getvalue()
    last = text.rstrip("\n").split("\n")[-1].split("\r")[-1]
    for part in ("50%|", "step 500/1,000", "loss 1.234", "top1 54.3%", "val 61.20%", "eta 10s"):
        assert part in last, last
    assert "5,312 img/s" in last
    assert "lr" not in last
    assert text.count("val top1 61.20%") == 1
    assert "saved\n" in text
    assert text.count("\n") == 3  # the evaluation, the message, and the end of the live line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (45.4, "45s"), (723, "12m03s"), (59.9, "1m00s"), (11_100, "3h05m")]
    + [(187_200, "2d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@contextlib.contextmanager
def _pseudo_terminal(columns: int) -> Iterator[tuple[TextIO, Callable[[str], str]]]:
    """Its stream, and what reads it up to a word: to the end of the test's time if none comes."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def read(word: str) -> str:
        text = ""
        while word not in text:
            text += os.read(master, 10_000).decode()
        return text

    with os.fdopen(slave, "w") as stream:
        yield stream, read
    os.close(master)


@pytest.mark.parametrize(("columns", "live"), [(0, False), (80, True)])
def test_a_terminal_without_a_size_gets_plain_lines(columns: int, live: bool) -> None:
    with _pseudo_terminal(columns) as (stream, read):
        console = Console(1200, stream=stream, every_seconds=0, clock=_Clock())
        console.log(_train_row(400))
        console.close(0, {})
        stream.flush()
        assert ("|" in read("step 400/1,200")) == live


@pytest.mark.parametrize(("columns", "word"), [(0, "reading images: 3 in"), (80, "3/3")])
def test_a_preparation_shows_lines_there_too(
    columns: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _pseudo_terminal(columns) as (stream, read):
        monkeypatch.setattr("sys.stderr", stream)
        assert list(progress(range(3), "reading images", 3)) == [0, 1, 2]
        stream.write("3/3 end")  # the bar goes when it is full
        stream.flush()
        assert ("|" in read(word)) == (columns > 0)


class _Gone(io.StringIO):
    """A terminal that closes under the run, or a stream that holds ASCII only."""

    def __init__(self, error: Exception, terminal: bool) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._closes, self._terminal = error, terminal

    def isatty(self) -> bool:
        return self._terminal

    def close_up(self) -> None:
        self.error = self._closes

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(5, "Input/output error"), ValueError("closed file")]
)
def test_a_stream_that_has_gone_is_nothing_to_the_caller(
    error: Exception, terminal: bool, before: bool
) -> None:
    out = _Gone(error, terminal)
    if before:
        out.close_up()
    console = Console(1000, stream=out, every_seconds=0)
    out.close_up()
    console.log(_train_row(50) | EVAL_ROW)
    console.message("saved")
    console.close(0, {})


def test_a_line_that_the_stream_cannot_hold_is_escaped() -> None:
    raw = io.BytesIO()
    console = Console(1000, stream=io.TextIOWrapper(raw, "ascii"))
    console.message("Versuch-\xe4")
    assert raw.getvalue() == b"Versuch-\\xe4\n"
    console.message("more")


@pytest.mark.parametrize("stream", [None, "closed"])
def test_without_a_stream_there_is_a_console_all_the_same(
    stream: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed if stream else None)
    console = Console(1000)
    console.message("saved")
    console.close(0, {})
