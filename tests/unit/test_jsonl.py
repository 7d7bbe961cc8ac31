"""metrics.jsonl: strict JSON, whole lines, nothing doubled after a resume; and the safe fan-out."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_resnet.tracking.jsonl import MetricsFile, read_rows, rewind
from dist_resnet.tracking.tracker import Row, Tracker, Trackers


def _write(path: Path, steps: range) -> None:
    file = MetricsFile(path)
    for step in steps:
        file.log({"step": step, "epoch": step / 10, "train/loss": 1 / (step + 1)})
    file.close(0, {})


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(5))
    rows = read_rows(path)
    assert [row["step"] for row in rows] == list(range(5))
    assert rows[3]["train/loss"] == 1 / 4  # repr round-trips: not one bit lost


def test_not_finite_becomes_null_and_the_file_stays_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log({"step": 1, "a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 2.0})
    file.close(0, {})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": None, "c": None, "d": 2.0}


def test_numpy_and_torch_scalars_are_numbers(tmp_path: Path) -> None:
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log({"step": 1, "a": numpy.float32(0.5), "b": torch.tensor(0.25)})
    file.close(0, {})
    assert read_rows(path) == [{"step": 1, "a": 0.5, "b": 0.25}]


def test_a_torn_last_line_is_ignored_and_gone_after_a_rewind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(3))
    path.write_bytes(path.read_bytes() + b'{"step": 3, "tr')
    assert len(read_rows(path)) == 3
    rewind(path, 2)  # else the next row would be glued to it, and both be lost
    _write(path, range(3, 5))
    assert [row["step"] for row in read_rows(path)] == list(range(5))


def test_rewind_keeps_whole_rows_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(10))
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[2][:9] + b"\n"
    path.write_bytes(b"".join([*lines[:3], torn, b"[1]\n", b"{}\n", *lines[3:]]) + b'{"step": 4')
    rewind(path, 6)
    assert path.read_bytes() == b"".join(lines[:7])  # bytes untouched, torn lines gone
    _write(path, range(7, 10))
    assert path.read_bytes() == b"".join(lines)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_of_nothing(tmp_path: Path) -> None:
    rewind(tmp_path / "metrics.jsonl", 6)
    assert not list(tmp_path.iterdir())


def test_sigkill_leaves_every_row_that_was_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, pathlib, signal, sys\n"
        "from dist_resnet.tracking.jsonl import MetricsFile\n"
        "file = MetricsFile(pathlib.Path(sys.argv[1]))\n"
        "for step in range(100): file.log({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], timeout=240)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_rows(path)] == list(range(100))


def test_disk_that_fills_up_is_reported_once_and_tears_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    said: list[str] = []
    file = MetricsFile(path, said.append)
    trackers = Trackers([file], said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # a full disk, as far as write() shows
    try:
        for step in range(100):
            trackers.log({"step": step, "train/loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes().endswith(b"}\n")
    assert len(path.read_bytes()) <= 100
    assert len(said) == 1
    assert "metrics.jsonl" in said[0]
    assert "No space left" in said[0]
    trackers.log({"step": 100, "train/loss": 0.5})
    file.close(1, {})
    assert [row["step"] for row in read_rows(path)] == list(range(101))


class _Broken(Tracker):
    name = "broken"

    def log(self, row: Row) -> None:
        raise RuntimeError("of\nno use")


class _Recorder(Tracker):
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.closed: list[int] = []

    def log(self, row: Row) -> None:
        self.rows.append(row)

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        self.closed.append(exit_code)


def test_one_broken_tracker_hurts_neither_training_nor_the_others() -> None:
    said: list[str] = []
    good = _Recorder()
    trackers = Trackers([_Broken(), good], said.append)
    for step in range(3):
        trackers.log({"step": step})
    trackers.close(3, {})
    trackers.close(0, {})
    assert len(good.rows) == 3
    assert good.closed == [3]
    expected = "tracking: broken stopped and records no more: of no use; training goes on"
    assert said == [expected]


def test_a_say_that_fails_too_changes_nothing() -> None:
    def say(_: str) -> None:
        raise BrokenPipeError

    good = _Recorder()
    Trackers([_Broken(), good], say).log({"step": 1})
    assert len(good.rows) == 1
