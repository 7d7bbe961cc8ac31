"""Checkpoints: nothing is lost on the way, and nothing damaged is ever believed."""

import errno
import hashlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_resnet.base import files
from dist_resnet.base.errors import Preempted, UserError
from dist_resnet.runs.checkpoint import Checkpoint, read_checkpoint
from dist_resnet.runs.folder import RunFolder
from dist_resnet.runs.store import CheckpointStore
from dist_resnet.step.state import weights_sha256
from tests.helpers.checkpoints import checkpoint_of
from tests.helpers.training import batch_of, small_config, train_step


def _store(folder: Path, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep)


def _names(store: CheckpointStore) -> list[str]:
    """Kind and step of every file, the checksum left out."""
    return sorted(path.name.rsplit("-", 1)[0] for path in store.folder.iterdir())


def _newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    """Step of the checkpoint that would be used, and what was told about others."""
    told: list[str] = []
    found = store.newest(told.append)
    return (found[1].state.step if found else None), told


def _assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif is_dataclass(one):
        _assert_same(vars(one), vars(other))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    else:
        assert one == other


def test_round_trip(tmp_path: Path) -> None:
    path = _store(tmp_path).save(checkpoint_of(7), best=False)
    _assert_same(read_checkpoint(path), checkpoint_of(7))
    content = torch.load(path, weights_only=True)  # nothing of ours is needed to read it
    _assert_same(content, {"format": 2, **asdict(checkpoint_of(7))})


def test_a_lower_keep_makes_room_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10, 15):
        _store(tmp_path).save(checkpoint_of(step), best=step == 5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dist_resnet.runs.store.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        _store(tmp_path).save(checkpoint_of(20), best=False)
    assert _names(_store(tmp_path)) == [
        "best-00000005", "step-00000005", "step-00000010", "step-00000015"
    ]  # fmt: skip
    with pytest.raises(OSError, match="No space left"):
        _store(tmp_path, keep=1).save(checkpoint_of(20), best=False)
    assert _names(_store(tmp_path)) == ["best-00000005", "step-00000015"]


def test_the_name_carries_step_and_checksum(tmp_path: Path) -> None:
    path = _store(tmp_path).save(checkpoint_of(12345), best=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert path.name == f"step-00012345-{digest}.pt"


def test_the_whole_state_of_training_round_trips(tmp_path: Path) -> None:
    config = small_config("train.ema_decay=0.9", "optim.nesterov=true")
    first, second = train_step(config, 2), train_step(config, 2)
    for number in range(3):
        first(batch_of(number, 2))
    first.state.best = {"val/top1": 0.5, "step": 2}
    content = replace(checkpoint_of(3), state=first.state.snapshot())
    path = _store(tmp_path).save(content, best=False)
    saved = torch.load(path, weights_only=True)["state"]
    second.state.restore(read_checkpoint(path).state)
    one, other = first.state, second.state
    _assert_same(one.snapshot(), other.snapshot())
    assert (other.step, other.best) == (3, {"val/top1": 0.5, "step": 2})
    assert torch.equal(one.flat.values, other.flat.values)
    assert torch.equal(one.flat.statistics, other.flat.statistics)
    # Parameters by name and in their own shapes: a plain model can load them.
    shapes = {name: p.shape for name, p in one.flat.model.named_parameters()}
    for part in ("model", "ema"):
        for name, shape in shapes.items():
            assert saved[part][name].shape == shape
            assert saved[part][name].is_contiguous()
    kept = saved["optimizer"]["parameters"]
    assert {name: kept[name]["momentum_buffer"].shape for name in kept} == shapes


def test_loading_does_not_alias_what_was_loaded() -> None:
    step = train_step(small_config("train.ema_decay=0.9"), 1)
    saved = step.state.snapshot()
    kept = {name: tensor.clone() for name, tensor in saved.model.items()}
    step.state.restore(saved)
    step(batch_of(0, 1))
    for name, tensor in kept.items():
        assert torch.equal(saved.model[name], tensor), name


def test_a_state_of_another_model_is_refused() -> None:
    saved = train_step(small_config(), 1).state.snapshot()
    other = train_step(small_config("model.widths=[8,10,16]"), 1)
    with pytest.raises(UserError, match="another model"):
        other.state.restore(saved)


def test_the_newest_is_chosen_by_its_step_not_its_age(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=9)
    paths = {step: store.save(checkpoint_of(step), best=False) for step in (5, 100, 40)}
    os.utime(paths[5], (time.time() + 9999,) * 2)
    assert _newest(store) == (100, [])
    assert store.newest_path() == paths[100]


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    store = _store(tmp_path)
    assert _newest(store) == (None, [])
    store.folder.mkdir()
    (store.folder / "notes.txt").write_text("not ours")
    (store.folder / "step-abc.pt").write_bytes(b"")
    assert _newest(store) == (None, [])
    assert store.newest_path() is None


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_k_and_the_best_are_kept(keep: int, tmp_path: Path) -> None:
    store = _store(tmp_path, keep)
    for step in range(1, 8):
        store.save(checkpoint_of(step), best=step in (1, 3))
    steps = [f"step-{step:08d}" for step in range(8 - keep, 8)]
    assert _names(store) == sorted(["best-00000003", *steps])
    best = next(store.folder.glob("best-*"))
    assert read_checkpoint(best).state.step == 3


def test_a_step_saved_again_is_fine(tmp_path: Path) -> None:
    store = _store(tmp_path)
    for _ in range(2):
        store.save(checkpoint_of(4), best=True)
    assert _newest(store) == (4, [])
    assert _names(store) == ["best-00000004", "step-00000004"]


@pytest.mark.parametrize("keep", [1, 3])
def test_of_two_of_one_step_the_last_written_is_there(tmp_path: Path, keep: int) -> None:
    """Whatever their checksums are."""
    store = _store(tmp_path, keep)
    store.save(checkpoint_of(3), best=False)
    for seconds in range(8):
        path = store.save(replace(checkpoint_of(4), seconds=float(seconds)), best=seconds == 5)
        assert _names(store)[-1] == "step-00000004"
        found = store.newest(pytest.fail)
        assert found is not None
        assert (found[0], found[1].seconds) == (path, seconds)
    assert _names(store).count("step-00000004") == 1


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, bytes]:
    path = _store(tmp_path).save(checkpoint_of(9), best=False)
    return path, path.read_bytes()


def test_every_flipped_bit_is_detected(saved: tuple[Path, bytes]) -> None:
    path, content = saved
    rng, silent = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            torch.load(path, weights_only=True)
            silent += 1
        except Exception:
            pass
        with pytest.raises(UserError, match=r"step-00000009-.*damaged"):
            read_checkpoint(path)
    assert silent > 50  # torch alone would have believed them: the checksum is needed
    path.write_bytes(content)
    assert read_checkpoint(path).state.step == 9


def test_every_truncation_is_detected(saved: tuple[Path, bytes]) -> None:
    path, content = saved
    for length in [0, 1, 2, 100, len(content) // 2, len(content) - 100, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(path)


def _named_after_content(folder: Path, content: bytes, step: int = 9) -> Path:
    path = folder / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    path.write_bytes(content)
    return path


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt"
    for content in ({"weights": torch.ones(2)}, [1, 2], torch.ones(3), {"format": 99}):
        torch.save(content, foreign)
        with pytest.raises(UserError, match="not a checkpoint of dist_resnet"):
            read_checkpoint(foreign)
    for data in (b"", b"hello", b"PK\x03\x04", bytes(range(256)) * 40):
        with pytest.raises(UserError) as caught:
            read_checkpoint(_named_after_content(tmp_path, data))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        write({"format": 1, "x": _Evil(trace)}, tmp_path / "evil.pt")
        with pytest.raises(UserError):
            read_checkpoint(tmp_path / "evil.pt")
        data = (tmp_path / "evil.pt").read_bytes()
        with pytest.raises(UserError):
            read_checkpoint(_named_after_content(tmp_path, data))
    assert not trace.exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


DAMAGES = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "empty": lambda path: path.write_bytes(b""),
    "folder": _to_folder,
    "link": _to_link_to_nothing,
    "foreign": lambda path: torch.save({"weights": torch.ones(2)}, path),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_file_is_set_aside_and_the_one_before_used(damage: str, tmp_path: Path) -> None:
    store = _store(tmp_path)
    paths = [store.save(checkpoint_of(step), best=False) for step in (1, 2, 3)]
    for path in paths[1:]:
        DAMAGES[damage](path)
    step, told = _newest(store)
    assert step == 1
    assert len(told) == 2
    assert paths[2].name in told[0]
    assert paths[1].name in told[1]
    assert all("\n" not in line for line in told)
    assert not os.path.lexists(paths[2])
    kept = paths[2].with_suffix(".pt.corrupt")  # for whoever wants to look
    assert os.path.lexists(kept)
    assert _newest(store) == (1, [])  # told once


def test_a_folder_among_old_checkpoints_ends_no_save(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=1)
    old = store.save(checkpoint_of(1), best=False)
    _to_folder(old)
    for step in (2, 3):
        store.save(checkpoint_of(step), best=False)
    assert _newest(store)[0] == 3


def test_the_hash_of_weights_sees_every_bit_and_name() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}
    found = weights_sha256(weights)
    # In the order of names, whatever the layout; each name, then the bits of its values.
    packed = np.arange(6, dtype=np.float32).tobytes(), b"\x80\x3f"
    assert found == hashlib.sha256(b"a" + packed[0] + b"b" + packed[1]).hexdigest()
    strided = {"b": weights["b"], "a": weights["a"].t().contiguous().t()}
    assert weights_sha256(strided) == found
    changed = weights["a"].clone()
    changed.view(torch.int32)[1, 2] ^= 1
    assert weights_sha256(weights | {"a": changed}) != found


def test_the_best_one_serves_when_all_others_are_damaged(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=2)
    for step in range(1, 5):
        store.save(checkpoint_of(step), best=step == 1)
    for path in store.folder.glob("step-*"):
        _flip(path)
    assert _newest(store)[0] == 1


def test_all_damaged_is_the_users_to_decide(tmp_path: Path) -> None:
    store = _store(tmp_path)
    names = [store.save(checkpoint_of(step), best=False).name for step in (1, 2)]
    for path in store.folder.iterdir():
        _flip(path)
    for _ in range(2):  # and a second start must not begin anew in silence
        with pytest.raises(UserError, match="no checkpoint is valid") as caught:
            _newest(store)
        assert all(name in str(caught.value) for name in names)
        assert "run.overwrite=true" in str(caught.value)


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(tmp_path, keep=2)
    paths = [store.save(checkpoint_of(step), best=False) for step in (1, 2)]
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == paths[1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    step, said = _newest(store)
    assert step == 1
    assert "cannot be read: Input/output error" in said[0]
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("kind", ["newest", "best"])
def test_a_reader_looks_again_where_a_run_goes_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(tmp_path, keep=1)
    store.save(checkpoint_of(1), best=True)
    steps = iter((2, 3))

    def too_late(path: Path) -> Checkpoint:
        """A newer checkpoint is saved, and this one deleted, between listing and reading."""
        for step in steps:
            store.save(checkpoint_of(step), best=True)
            break
        return read_checkpoint(path)

    monkeypatch.setattr("dist_resnet.runs.store.read_checkpoint", too_late)
    said: list[str] = []
    found = store.best() if kind == "best" else store.newest(said.append, set_aside=False)
    assert found is not None
    assert int(found[0].name.split("-")[1]) == 3
    assert said == []


def test_later_checkpoints_are_set_aside_when_a_run_is_taken_back(tmp_path: Path) -> None:
    store = _store(tmp_path, keep=9)
    for step in (1, 2, 3, 4):
        store.save(checkpoint_of(step), best=step == 4)
    store.set_aside_after(2)
    assert _newest(store) == (2, [])
    assert len(list(store.folder.glob("*.superseded"))) == 3
    assert len(list(store.folder.glob("*.pt"))) == 2


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(tmp_path, keep=1)
    store.save(checkpoint_of(1), best=False)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        store.save(checkpoint_of(2), best=True)
    monkeypatch.undo()
    assert _newest(store) == (1, [])
    assert _names(store) == ["step-00000001"]  # no leftovers


KILLED = """
import os, signal, sys
from pathlib import Path
from dist_resnet.runs.store import CheckpointStore
from dist_resnet.step.state import weights_sha256
from tests.helpers.checkpoints import checkpoint_of
store = CheckpointStore(Path(sys.argv[1]), 1)
store.save(checkpoint_of(1), best=False)
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
store.save(checkpoint_of(2), best=False)
"""


def test_a_kill_between_writing_and_renaming_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, folder], cwd=root, timeout=240)
    assert done.returncode == -signal.SIGKILL
    store = CheckpointStore(folder, 1)
    assert len(list(folder.iterdir())) == 2  # it did get that far
    assert _newest(store) == (1, [])
    run = RunFolder(tmp_path)
    run.open()
    run.close()
    assert _names(store) == ["step-00000001"]


def test_a_copy_in_another_folder_under_another_name_is_readable(tmp_path: Path) -> None:
    path = _store(tmp_path).save(checkpoint_of(3), best=False)
    copy = tmp_path / "model.pt"
    shutil.copy(path, copy)
    assert read_checkpoint(copy).state.step == 3


def test_a_signal_while_reading_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(tmp_path)
    path = store.save(checkpoint_of(1), best=False)

    def interrupted(*_: Any, **__: Any) -> None:
        raise Preempted("stopped by SIGTERM before the first step")

    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(Preempted):
        store.newest(print)
    assert path.exists()


def test_best_is_kept_on_a_file_system_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    store = _store(tmp_path, keep=1)
    for step in (1, 2):
        store.save(checkpoint_of(step), best=step == 1)
    assert _names(store) == ["best-00000001", "step-00000002"]
    (best,) = store.folder.glob("best-*")
    _assert_same(read_checkpoint(best), checkpoint_of(1))


def _of_format_1(content: Checkpoint) -> dict[str, Any]:
    """As the versions before wrote it, SGD's and Muon's momentum by the parameters' names."""
    saved = asdict(content)
    for later in ("code", "forks", "machine"):  # the oldest lacked these too
        del saved[later]
    state = saved["state"]
    del state["best_at_low_rate"], state["stopped_early"]
    kept = state.pop("optimizer")["parameters"]
    state["momentum"] = {name: entries["momentum_buffer"] for name, entries in kept.items()}
    return {"format": 1, **saved}


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_checkpoints_of_the_version_before_are_continued(name: str, tmp_path: Path) -> None:
    config = small_config(f"optim.name={name}", "train.ema_decay=0.9")
    first, second = train_step(config, 1), train_step(config, 1)
    for number in range(3):
        first(batch_of(number, 1))
    content = replace(checkpoint_of(3), state=first.state.snapshot())
    torch.save(_of_format_1(content), tmp_path / "old.pt")
    found = read_checkpoint(tmp_path / "old.pt")
    second.state.restore(found.state)
    assert (found.code, found.forks, found.state.stopped_early) == ({}, [], False)
    for number in (3, 4):
        first(batch_of(number, 1))
        second(batch_of(number, 1))
    _assert_same(first.state.snapshot(), second.state.snapshot())


def test_a_file_without_what_a_training_has_is_no_checkpoint(tmp_path: Path) -> None:
    for part in ("config", "classes", "mean", "std", "image_size"):
        saved = {"format": 2, **asdict(checkpoint_of(3))}
        del saved[part]
        torch.save(saved, tmp_path / "part.pt")
        with pytest.raises(UserError, match=f"not a checkpoint of a training: it lacks {part}"):
            read_checkpoint(tmp_path / "part.pt")
    torch.save({"format": 2, **asdict(checkpoint_of(3)), "state": [1]}, tmp_path / "part.pt")
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "part.pt")
