"""The run folder: one job at a time, files that are whole, nothing deleted that is not ours."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_resnet import evaluate
from dist_resnet.base import files
from dist_resnet.base.errors import UserError
from dist_resnet.base.files import check_writable, write_atomically, write_for_user
from dist_resnet.runs.folder import RunFolder
from tools import pages

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from dist_resnet.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.open()
print("open", flush=True)
sys.stdin.read()
"""
WRITE = """
import sys
from pathlib import Path
from dist_resnet.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
for step in range(10**9):
    folder.set_status("running", step, "x" * (step % 5000))
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of <tmp_path>/run."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_the_lock_excludes_a_second_process(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} ") as caught:
        RunFolder(tmp_path / "run").open()
    assert "\n" not in str(caught.value)
    RunFolder(tmp_path / "other").open()


WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.mark.parametrize("number", WITHOUT)
def test_without_flock_the_other_lock_excludes_a_second_process(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", _failing(number))
    folder = RunFolder(tmp_path / "run")
    folder.open()
    held = subprocess.run([sys.executable, "-c", WITHOUT_FLOCK], cwd=ROOT, text=True,
                          env=os.environ | {"PLACE": str(folder.path)}, check=False,
                          capture_output=True)  # fmt: skip
    assert f"in use by process {os.getpid()} " in held.stderr
    folder.close()
    RunFolder(tmp_path / "run").open()


WITHOUT_FLOCK = """
import fcntl, os
from pathlib import Path
from dist_resnet.runs.folder import RunFolder
def flock(*_):
    raise OSError(38, "Function not implemented")
fcntl.flock = flock
RunFolder(Path(os.environ["PLACE"])).open()
"""


@pytest.mark.parametrize("number", WITHOUT)
def test_without_any_lock_a_run_is_begun_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, _failing(number))
    RunFolder(tmp_path / "run").open()
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no locks" in line
    monkeypatch.setattr(fcntl, "flock", _failing(errno.EIO))
    with pytest.raises(UserError, match="Input/output error"):
        RunFolder(tmp_path / "run").open()


def _failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(
    how: signal.Signals, tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(how)
    holder.wait(240)
    folder = RunFolder(tmp_path / "run")
    folder.open()
    owner = (tmp_path / "run" / ".lock").read_text()
    assert owner.startswith(f"process {os.getpid()} on ")


UNFINISHED = (".tmp.7.status.json", "checkpoints/.tmp.7.x")


def test_only_the_holder_clears_away_unfinished_files(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    run = tmp_path / "run"
    kept = ("metrics.jsonl", "checkpoints/step-00000001-0123456789abcdef.pt")
    (run / "checkpoints").mkdir(exist_ok=True)
    for name in (*UNFINISHED, *kept):
        (run / name).write_text("x")
    folder = RunFolder(run)
    with pytest.raises(UserError):
        folder.open()  # another process holds it: they may be its own, and in use
    assert all((run / name).exists() for name in UNFINISHED)
    holder.kill()
    holder.wait(100)
    folder.open()
    folder.close()
    assert not any((run / name).exists() for name in UNFINISHED)
    assert all((run / name).read_text() == "x" for name in kept)


def test_open_makes_the_folder_and_says_when_it_cannot(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b" / "c").open()
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: .*run\.dir"):
        RunFolder(tmp_path / "file" / "run").open()


def test_clear_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    ours = ["config.yaml", "plan.json", "metrics.jsonl", "status.json", "summary.json"]
    for name in [*ours, "notes.md", "report.html"]:
        (folder.path / name).write_text("{}")
    inside = ["checkpoints/step-00000001-0123456789abcdef.pt.corrupt", "checkpoints/.tmp.1.x",
              "wandb/run_id", "wandb/offline-run-1/run.wandb"]  # fmt: skip
    for name in [*inside, "mine/file"]:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("")
    (folder.path / "wandb" / "latest-run").symlink_to("offline-run-1")
    folder.clear()
    left = {path.name for path in folder.path.iterdir()} - {".lock"}
    assert left == {"notes.md", "report.html", "mine"}
    for name in ("checkpoints/published.pt", "wandb/notes.md"):
        (folder.path / name).parent.mkdir()
        (folder.path / name).write_text("mine")
        folder.clear()
        assert (folder.path / name).read_text() == "mine"
    folder.clear()  # nothing there is fine too


def test_clear_keeps_a_link_to_another_disk(tmp_path: Path) -> None:
    disk, folder = tmp_path / "disk", RunFolder(tmp_path / "run")
    disk.mkdir()
    (disk / "thesis.tex").write_text("")
    (disk / "step-00000001-0123456789abcdef.pt").write_text("")
    folder.open()
    folder.checkpoints.symlink_to(disk)
    folder.clear()
    assert folder.checkpoints.is_symlink()
    assert [path.name for path in disk.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl", "wandb"])
def test_a_folder_of_somebodys_own_is_no_run_folder(name: str, tmp_path: Path) -> None:
    own = tmp_path / "project" / name
    own.parent.mkdir()
    own.mkdir() if name == "wandb" else own.write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which no training has left there"):
        RunFolder(own.parent).open()
    assert [path.name for path in own.parent.iterdir()] == [name]
    # A copy of a run without its hidden files is one.
    (own.parent / "status.json").write_text('{"state": "done", "step": 3}')
    RunFolder(own.parent).open()


def test_status_round_trips_and_is_empty_where_there_is_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.status() == {}
    folder.set_status("failed", 12, 'no space\n"left" é')
    expected = {"state": "failed", "step": 12, "reason": 'no space\n"left" é'}
    assert json.loads((tmp_path / "status.json").read_text()) == expected
    assert folder.status() == expected
    for damaged in ("", "{", "[1]", "null"):
        (tmp_path / "status.json").write_text(damaged)
        assert folder.status() == {}
    assert folder.summary() == {}
    folder.write_json("summary.json", {"step": 7})
    assert folder.summary() == {"step": 7}


def test_a_reader_never_sees_half_a_status(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path)], cwd=ROOT)
    path, seen = tmp_path / "status.json", set()
    try:
        while not path.exists():
            assert writer.poll() is None
        for _ in range(100_000):
            status = json.loads(path.read_text())
            assert len(status["reason"]) == status["step"] % 5000
            seen.add(status["step"])
            if len(seen) > 100:
                break
        assert len(seen) > 100
    finally:
        writer.kill()
        writer.wait()
    json.loads(path.read_text())  # nor after a kill


def test_a_full_disk_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.set_status("running", 1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    folder.set_status("failed", 2)
    assert "No space left" in capsys.readouterr().err
    assert folder.status()["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    with pytest.raises(OSError, match="No space left"):
        folder.write_text("config.yaml", "x")


def test_atomic_writes_replace_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", b"", b"\x00\xff" * 1000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "missing" / "file", b"x")


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    old, new = tmp_path / "there" / "old", tmp_path / "there" / "new"
    old.write_text("old")
    old.chmod(0o640)
    for name, target in (("link", old), ("dangling", new)):
        (tmp_path / name).symlink_to(target)
        check_writable(tmp_path / name)
        write_atomically(tmp_path / name, b"content")
        assert (tmp_path / name).is_symlink()
        assert target.read_bytes() == b"content"
    assert old.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new", "old"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_atomically(tmp_path / "loop", b"x")


def test_what_is_no_regular_file_is_written_into(tmp_path: Path) -> None:
    pipe, content = tmp_path / "pipe", bytes(range(256)) * 1000  # more than a pipe holds
    os.mkfifo(pipe)
    check_writable(pipe)
    with (tmp_path / "copy").open("wb") as to, subprocess.Popen(["cat", str(pipe)], stdout=to):
        write_atomically(pipe, content)
    assert (tmp_path / "copy").read_bytes() == content
    assert pipe.is_fifo()
    (tmp_path / "null").symlink_to(os.devnull)
    for device in (Path(os.devnull), tmp_path / "null"):
        check_writable(device)
        write_atomically(device, content)
        assert device.is_char_device()
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_writable(tmp_path)
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "null", "pipe"]


def test_an_own_descriptor_is_appended_to(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open("a") as file:
        for name in ("/dev/fd/", "/proc/self/fd/"):
            path = Path(f"{name}{file.fileno()}")
            check_writable(path)
            write_atomically(path, b"content\n")
    assert log.read_text() == "before\ncontent\ncontent\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("command", ["evaluate", "pages"])
def test_every_command_writes_for_its_user_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, readme = tmp_path / "log", tmp_path / "README.md"
    log.write_text("before\n")
    readme.write_text("a page\n")
    with log.open("a") as file:
        name = f"/proc/self/fd/{file.fileno()}"
        if command == "evaluate":
            figures = {"val/top1": 0.5, "classes": {}}
            monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *_: figures)
            evaluate.main(["run", "--json", name])
        else:
            (tmp_path / "link").symlink_to(readme)
            pages.main([str(tmp_path / "link")])
            write_for_user(Path(name), readme.read_text())
    assert log.read_text().startswith("before\n")
    assert len(log.read_text()) > len("before\n")
    assert (tmp_path / "link").is_symlink() == (command == "pages")


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", lambda *_: pytest.fail("worked first"))
    for place, why in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.json", "No such file")):
        with pytest.raises(UserError, match=why):
            evaluate.main(["run", "--json", str(place)])


def test_a_file_that_is_mounted_alone_is_written_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    path = tmp_path / "report.html"
    path.write_text("something longer than what follows")
    monkeypatch.setattr("os.replace", busy)
    write_for_user(path, "caf\udce9")
    assert path.read_text() == "caf\\udce9"
    with pytest.raises(UserError, match=r"new\.html: cannot be written: Device"):
        write_for_user(tmp_path / "new.html", "x")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


def test_the_wandb_id_is_made_once(tmp_path: Path) -> None:
    folder, made = RunFolder(tmp_path / "run"), iter(["first", "second", "third"])
    folder.open()
    assert folder.wandb_id(lambda: next(made), None) == "first"
    assert RunFolder(tmp_path / "run").wandb_id(lambda: next(made), None) == "first"
    folder.clear()
    assert folder.wandb_id(lambda: next(made), None) == "second"
    assert folder.wandb_id(lambda: next(made), "the checkpoint's") == "the checkpoint's"
    assert folder.wandb_id(lambda: next(made), None, anew=True) == "third"


def test_a_run_folder_may_have_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / os.fsdecode(b"caf\xe9"))
    folder.path.mkdir()
    assert folder.wandb_id(lambda: "first", None) == "first"
    assert RunFolder(folder.path).wandb_id(lambda: "second", None) == "first"
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(folder.path, copy.path)
    assert copy.wandb_id(lambda: "second", "first") == "second"


def test_a_copied_run_folder_gets_a_wandb_id_of_its_own(tmp_path: Path) -> None:
    made = iter(["first", "second"])
    folder = RunFolder(tmp_path / "run")
    folder.open()
    folder.wandb_id(lambda: next(made), None)
    (tmp_path / "elsewhere").mkdir()
    for copy in (tmp_path / "copy", tmp_path / "elsewhere" / "run"):
        shutil.copytree(folder.path, copy)
    assert RunFolder(tmp_path / "copy").wandb_id(lambda: next(made), "first") == "second"
    assert RunFolder(tmp_path / "copy").wandb_id(lambda: next(made), "second") == "second"
    assert folder.wandb_id(lambda: next(made), "first") == "first"
    # One that was moved is the same run, whatever it is called, and so is one seen by a link.
    shutil.rmtree(folder.path)
    moved = (tmp_path / "elsewhere" / "run").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    for path in (moved, tmp_path / "link"):
        assert RunFolder(path).wandb_id(lambda: next(made), "first") == "first"


def test_a_refusal_is_told_beside_the_status(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.set_status("done", 12, exit_code=0)
    assert folder.refusal() == {}
    folder.refuse("another run", 2)
    assert folder.refusal() == {"reason": "another run", "exit_code": 2}
    assert folder.status()["state"] == "done"
    folder.forget_refusal()
    assert folder.refusal() == {}
