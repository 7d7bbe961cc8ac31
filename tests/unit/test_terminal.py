"""A line for people never decides how a command ends."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import ROOT

# What a training does that prints much more than a pipe or a terminal holds.
WORK = """
import sys
from pathlib import Path
from dist_resnet.base.cli import run_command
from dist_resnet.base.terminal import forgive, say

def main():
    forgive()
    for number in range(4000):
        say(f"Versuch-\\xe4 {number} " + 80 * "x")
        print("and a library: \\u2713", file=sys.stderr)
    Path(sys.argv[1]).write_text("done")
    return 7

run_command(main)
"""


@contextmanager
def _closed_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def _paused_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    yield writer
    os.close(reader)
    os.close(writer)


@contextmanager
def _closed_terminal() -> Iterator[int]:
    master, slave = pty.openpty()
    os.close(master)
    yield slave
    os.close(slave)


@contextmanager
def _paused_terminal() -> Iterator[int]:
    master, slave = pty.openpty()
    yield slave
    os.close(master)
    os.close(slave)


@contextmanager
def _full() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def _work(folder: Path, out: int, environment: dict[str, str] | None = None) -> int:
    done = folder / "done"
    process = subprocess.run(
        [sys.executable, "-c", WORK, str(done)], cwd=ROOT, stdout=out, stderr=out, timeout=240,
        env=os.environ | (environment or {}), start_new_session=True, check=False,
    )  # fmt: skip
    assert done.read_text() == "done"
    return process.returncode


@pytest.mark.parametrize(
    "place", [_closed_pipe, _paused_pipe, _closed_terminal, _paused_terminal, _full]
)
def test_a_stream_that_takes_nothing_ends_nothing(
    place: Callable[[], AbstractContextManager[int]], tmp_path: Path
) -> None:
    with place() as out:
        assert _work(tmp_path, out) == 7


def test_text_that_the_encoding_cannot_hold_is_escaped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
        assert _work(tmp_path, log.fileno(), ascii_only) == 7
    text = (tmp_path / "log").read_text("ascii")
    assert "Versuch-\\xe4 3999 " in text
    assert text.count("library: \\u2713") == 4000


def test_closed_descriptors_are_not_given_to_files(tmp_path: Path) -> None:
    command = f'exec {sys.executable} -c "$0" {tmp_path / "done"} >&- 2>&- <&-'
    code = subprocess.run(
        ["sh", "-c", command, WORK], cwd=ROOT, timeout=240, check=False
    ).returncode
    assert code == 7
    assert (tmp_path / "done").read_text() == "done"


def test_a_result_that_cannot_be_printed_is_no_success() -> None:
    for place in (_closed_pipe, _full):
        with place() as out:
            done = subprocess.run(
                [sys.executable, "-m", "dist_resnet.train", "--print-config"],
                cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, timeout=240, check=False,
            )  # fmt: skip
        assert done.returncode not in (0, 75)
        assert "Traceback" not in done.stderr
    assert done.stderr == "dist_resnet: the output: cannot be written: No space left on device\n"


def test_a_training_whose_reader_has_gone_is_done(tiny: Dataset, tmp_path: Path) -> None:
    arguments = [
        f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}",
        f"run.dir={tmp_path}", "run.name=Versuch-\xe4", "model.widths=[4,4,4]", "train.max_steps=3",
        "log.every_steps=1", "wandb.mode=disabled", "parallel.device=cpu", "train.epochs=40",
    ]  # fmt: skip
    with _closed_pipe() as out:
        code = subprocess.run(
            [sys.executable, "-m", "dist_resnet.train", *arguments],
            cwd=ROOT, stdout=out, stderr=out, timeout=240, check=False,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        ).returncode  # fmt: skip
    assert code == 0
    assert '"state": "done"' in (tmp_path / "Versuch-\xe4" / "status.json").read_text()
