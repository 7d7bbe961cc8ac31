"""The checkpoints of a run folder: written whole, named by their own checksum, checked when read.

torch.load does not verify its archive's checksums (192 of 200 flipped bits loaded silently), so the
first 16 digits of the file's SHA-256 stand in its name: one rename publishes data and checksum.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch

from dist_resnet.base.errors import UserError
from dist_resnet.base.files import sync_folder, write_atomically
from dist_resnet.runs.checkpoint import FORMAT, NAME, Checkpoint, read_checkpoint

_LOOKS = 100  # at a folder in which a running training replaces its files


class CheckpointStore:
    """The checkpoints of one run folder. One process writes; any may read."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, checkpoint: Checkpoint, best: bool) -> Path:
        """Write a checkpoint, in place of another of its step; keep the newest `keep`.

        Args:
            best: also keep it as the best one, by a hard link.

        Raises:
            OSError: disk full or read-only; every older checkpoint is still there.
        """
        buffer = io.BytesIO()
        content = vars(checkpoint) | {"state": vars(checkpoint.state)}
        torch.save({"format": FORMAT, **content}, buffer)
        data = buffer.getvalue()
        name = f"{checkpoint.state.step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._delete_old()  # before, too: a lower checkpoint.keep makes room on a full disk
        path = self.folder / f"step-{name}"
        write_atomically(path, data)
        for other in self._named("step"):  # which of two is the newest would be chance
            if other != path and _step(other) == checkpoint.state.step and not other.is_dir():
                other.unlink(missing_ok=True)
        if best:
            self._keep_as_best(path, self.folder / f"best-{name}", data)
        self._delete_old()
        return path

    def newest(
        self, report: Callable[[str], None], set_aside: bool = True
    ) -> tuple[Path, Checkpoint] | None:
        """The valid checkpoint of the highest step, or None where there has been none.

        Damaged ones are told to `report`. Times of files play no part: clocks differ.

        Args:
            set_aside: rename damaged ones to *.corrupt; only for the holder of the run's lock.

        Raises:
            UserError: there are checkpoints, and none of them is valid.
        """
        for _ in range(_LOOKS):
            candidates = self._by_step()
            for path in candidates:
                try:
                    return path, read_checkpoint(path)
                except UserError as error:
                    if not os.path.lexists(path):
                        break  # a run that goes on has written a newer one: look again
                    # A file that cannot be read now may be whole.
                    unread = isinstance(error.__context__, OSError) and path.is_file()
                    if set_aside and not unread:
                        with contextlib.suppress(OSError):
                            path.rename(path.with_suffix(".pt.corrupt"))
                    report(f"{error}; using the one before it")
            else:
                break
        damaged = self._by_step() or list(self.folder.glob("*.corrupt"))
        if damaged:
            names = ", ".join(sorted(path.name for path in damaged))
            raise UserError(
                f"{self.folder}: no checkpoint is valid ({names}); restore one from a copy; "
                "only where there is none, start anew with run.overwrite=true"
            )
        return None

    def newest_path(self) -> Path | None:
        """The file of the highest step, not read."""
        return next(iter(self._named("step")), None)

    def best(self) -> tuple[Path, Checkpoint] | None:
        """The checkpoint of the best evaluation, or None where there is none.

        Raises:
            UserError: it is damaged.
        """
        for look in range(_LOOKS):
            path = self.best_path()
            if path is None:
                return None
            try:
                return path, read_checkpoint(path)
            except UserError:
                if path.exists() or look == _LOOKS - 1:  # else a better one has taken its place
                    raise
        return None

    def best_path(self) -> Path | None:
        """The file of the best evaluation, not read."""
        return next(iter(self._named("best")), None)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to *.superseded: the run is taken back to `step`."""
        for path in [*self._named("step"), *self._named("best")]:
            if _step(path) > step:
                path.rename(path.with_suffix(".pt.superseded"))

    def _by_step(self) -> list[Path]:
        return sorted([*self._named("step"), *self._named("best")], key=_step, reverse=True)

    def _delete_old(self) -> None:
        for old in self._named("step")[self.keep :]:
            if not old.is_dir():  # not ours: `newest` sets it aside
                old.unlink(missing_ok=True)

    def _keep_as_best(self, path: Path, best: Path, data: bytes) -> None:
        try:
            os.link(path, best)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            write_atomically(best, data)
        for old in self._named("best"):
            if old != best:
                old.unlink(missing_ok=True)
        sync_folder(self.folder)

    def _named(self, kind: str) -> list[Path]:
        """Files of one kind, the highest step first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if (m := NAME.fullmatch(p.name)) and m[1] == kind]
        return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[2])
