"""The folder of one run: lock, status, configuration, plan, summary."""

import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.base.files import as_json, lock, write_atomically
from dist_resnet.base.terminal import say

_JOB = ".job"
_REFUSED = ".refused"
_ID = ("wandb", "run_id")
_CONTENTS = (
    _JOB,
    _REFUSED,
    "config.yaml",
    "plan.json",
    "metrics.jsonl",
    "status.json",
    "summary.json",
)
# What a training leaves in its two folders, be it finished, set aside or unfinished.
_CHECKPOINTS = ("step-*", "best-*", ".tmp.*")
_WANDB = ("run-*", "offline-run-*", "latest-run", "debug*.log", "run_id", "media", ".tmp.*")


class RunFolder:
    """Owned by rank 0 of one job at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.to_clear = False
        """Whether what lies here is to be deleted when the run begins."""
        self.begun = False
        """Whether the status is of this process's run."""
        self.ended = False
        """Whether the status is the last one."""
        self._lock: int | None = None

    def open(self) -> None:
        """Create the folder and take its lock, which the kernel releases when the process dies.

        Raises:
            UserError: not writable, somebody's own, or another job trains in it.
        """
        if foreign := self._foreign():
            raise UserError(
                f"{self.path}: holds {foreign}, which no training has left there; "
                "choose another run.name, or move it away"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            if not lock(self._lock):
                say(
                    f"warning: {self.path}: its file system has no locks: nothing keeps a second "
                    "training out of this folder",
                    sys.stderr,
                )
            os.truncate(self._lock, 0)
            os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            for pattern in (".tmp.*", "checkpoints/.tmp.*"):
                for left in self.path.glob(pattern):  # unfinished files of dead processes
                    with contextlib.suppress(OSError):
                        left.unlink()
        except BlockingIOError:
            assert self._lock is not None
            owner = os.pread(self._lock, 200, 0).decode(errors="replace")
            self.close()
            raise UserError(
                f"{self.path}: in use by {owner}; choose another run.name or wait for it to end"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; choose another run.dir"
            ) from None

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Delete an earlier run's files, and nothing else that may lie in the folder.

        Raises:
            UserError: one of them cannot be deleted.
        """
        try:
            for name in _CONTENTS:
                (self.path / name).unlink(missing_ok=True)
            for folder, names in ((self.checkpoints, _CHECKPOINTS), (self.path / "wandb", _WANDB)):
                for inside in [path for name in names for path in folder.glob(name)]:
                    real = inside.is_dir() and not inside.is_symlink()
                    shutil.rmtree(inside) if real else inside.unlink()
                # A link, to a larger disk, say, stays, and so does what is somebody's own.
                if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                    folder.rmdir()
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be deleted: {error.strerror}") from None

    def _foreign(self) -> str:
        """A file of somebody's own that a run would replace or delete; mostly empty."""
        if (self.path / ".lock").exists() or self.status().get("state"):
            return ""
        names = (name for name in (*_CONTENTS, "wandb") if not name.startswith("."))
        return next((name for name in names if os.path.lexists(self.path / name)), "")

    def is_of_job(self, job: str) -> bool:
        """Whether torchrun's job `job` has begun or continued this run already."""
        try:
            return job != "" and (self.path / _JOB).read_bytes() == job.encode()
        except OSError:
            return False

    def set_job(self, job: str) -> None:
        """Raises OSError: disk full, read-only."""
        self.write_text(_JOB, job)

    def write_json(self, name: str, values: Mapping[str, Any], durable: bool = True) -> None:
        """Raises OSError: disk full, read-only."""
        write_atomically(self.path / name, (as_json(values, indent=2) + "\n").encode(), durable)

    def write_text(self, name: str, text: str) -> None:
        """Raises OSError: disk full, read-only."""
        write_atomically(self.path / name, text.encode())

    def set_status(
        self, state: str, step: int, reason: str = "", exit_code: int | None = None
    ) -> None:
        """Publish what launchers read. A full disk is reported, not raised: training goes on."""
        if self.ended:
            return
        values: dict[str, Any] = {"state": state, "step": step, "reason": reason}
        if exit_code is not None:  # torchrun itself returns 1 for all of them
            values["exit_code"] = exit_code
        self.begun = True
        try:
            # A heartbeat may be lost with the power; how the run ended may not.
            self.write_json("status.json", values, durable=state != "running")
        except OSError as error:
            say(f"status.json cannot be written: {error.strerror}", sys.stderr)

    def refuse(self, reason: str, exit_code: int) -> None:
        """Tell launchers that a command was refused, beside the status, which stays the run's."""
        with contextlib.suppress(OSError):
            self.write_json(_REFUSED, {"reason": reason, "exit_code": exit_code})

    def refusal(self) -> dict[str, Any]:
        """What `refuse` told last; empty where it did not."""
        return _read_object(self.path / _REFUSED)

    def forget_refusal(self) -> None:
        """A new command begins."""
        with contextlib.suppress(OSError):
            (self.path / _REFUSED).unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        """The last status; empty where there is none."""
        return _read_object(self.path / "status.json")

    def summary(self) -> dict[str, Any]:
        """summary.json; empty where there is none."""
        return _read_object(self.path / "summary.json")

    def wandb_id(self, make: Callable[[], str], saved: str | None, anew: bool = False) -> str:
        """The id of this folder's W&B run: one run across restarts.

        A copy of a run folder gets an id of its own, or it would write into the original's record.

        Args:
            make: makes a new one.
            saved: that of the checkpoint.
            anew: whether a new one is wanted.
        """
        path, own = self.path.joinpath(*_ID), os.path.realpath(self.path)
        name, home = _read_id(path)
        name = saved or name
        if anew or not name or (home not in ("", own) and _read_id(Path(home, *_ID))[0] == name):
            name = make()
        try:
            path.parent.mkdir(exist_ok=True)
            # A folder's name may be no text; it is compared with itself only.
            write_atomically(path, f"{name}\n{own}\n".encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        return name


def _read_id(path: Path) -> tuple[str, str]:
    """The id, and the folder for which it was made; each may be empty."""
    try:
        text = path.read_bytes().decode(errors="surrogateescape")
        name, _, home = text.strip().partition("\n")
    except (OSError, ValueError):
        return "", ""
    return name, home


def _read_object(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
