"""`metrics.jsonl`: the record of a run, one strict JSON object a line, out of W&B's reach."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_resnet.base.files import as_json, write_atomically
from dist_resnet.tracking.tracker import Row, Say, Tracker, say_on_stderr


class MetricsFile(Tracker):
    """Appends rows to a file; a killed process leaves at most one torn last line, for `rewind`.

    A number that is not finite is written as null: JSON has no NaN, and a reader that meets one
    (jq, a browser, pandas) refuses the whole file. Each line is one write() without a buffer in
    between, so that a row is with the kernel, safe from a SIGKILL, when `log` returns.
    It is not fsynced (about 1 to 10 ms a row on a disk): a power cut may cost the last seconds.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, say: Say = say_on_stderr) -> None:
        self.path = path
        self._say = say
        self._waiting: list[bytes] = []
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def log(self, row: Row) -> None:
        """Append one row, after those that a full disk has kept waiting; the first one is told."""
        line = as_json(row)
        told = bool(self._waiting)
        self._waiting.append(line.encode() + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            if not told:
                self._say(f"{self.path}: {error.strerror}; rows wait in memory for room")

    def _write_waiting(self) -> None:
        while self._waiting:
            size = os.fstat(self._fd).st_size
            written = os.write(self._fd, self._waiting[0])
            if written != len(self._waiting[0]):  # the disk filled up inside this line
                os.ftruncate(self._fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            del self._waiting[0]

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Flush to the disk and close; `summary` has a file of its own."""
        if self._fd < 0:
            return
        try:
            self._write_waiting()
            os.fsync(self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1


def read_rows(path: Path) -> list[dict[str, float | int | None]]:
    """Every whole row of the file, in order; lines that a kill or a full disk tore are left out."""
    return [row for _, row in _whole_lines(path)]


def rewind(path: Path, step: int) -> None:
    """Keep only the whole rows with row["step"] <= step, so that a resume doubles nothing.

    The file is replaced atomically: killed here, the old one is still whole.
    """
    if path.exists():
        kept = [line for line, row in _whole_lines(path) if _step_of(row) <= step]
        write_atomically(path, b"".join(line + b"\n" for line in kept))


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, float | int | None]]]:
    data = path.read_bytes()
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


def _step_of(row: dict[str, float | int | None]) -> float:
    step = row.get("step")
    return math.inf if step is None else step  # a row that belongs to no step cannot be kept safely
