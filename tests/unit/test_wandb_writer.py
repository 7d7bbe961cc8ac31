"""What stands between W&B and training, against everything that misbehaves. No wandb here."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from dist_resnet.config.schema import WandbConfig
from dist_resnet.tracking import wandb_writer
from dist_resnet.tracking.tracker import Artifact, Media, Row
from dist_resnet.tracking.wandb_reach import wanted_mode, why_unreachable
from dist_resnet.tracking.wandb_session import WandbSession, stage_in
from dist_resnet.tracking.wandb_writer import WandbTracker
from tests.helpers.wandb_stub import WandbStub


class _Session(WandbSession):
    def __init__(self) -> None:
        super().__init__(WandbConfig(), Path(), {}, "the-run", "a name", lambda _: None, "offline")
        self.rows: list[Row] = []
        self.others: list[tuple[str, object]] = []
        self.finished: tuple[int, Mapping[str, object]] | None = None
        self.abandoned = threading.Event()
        self.first: int | None = 7
        self.on_stop: Callable[[], None] = lambda: None

    def open(self, on_stop: Callable[[], None]) -> None:
        self.on_stop = on_stop

    def log(self, row: Row) -> None:
        self.rows.append(row)

    def show(self, media: Media, classes: Sequence[str]) -> None:
        self.others.append(("picture", dict(media)))

    def alert(self, title: str, text: str, error: bool) -> None:
        self.others.append(("alert", title))

    def keep(self, artifact: Artifact) -> None:
        raise FileNotFoundError("no such file")

    def next_step(self) -> int | None:
        return self.first

    def finish(self, exit_code: int, summary: Mapping[str, object]) -> None:
        self.finished = (exit_code, summary)

    def abandon(self) -> None:
        self.abandoned.set()

    def resend(self) -> str:
        return "wandb sync HERE"


class _Stuck(_Session):
    """Blocks in one method until it is abandoned, as a stopped wandb-core does."""

    def __init__(self, where: str) -> None:
        super().__init__()
        setattr(self, where, lambda *_: self.abandoned.wait(1000))


def _tracker(session: _Session, said: list[str], close_seconds: float = 0.3) -> WandbTracker:
    session.say = said.append
    return WandbTracker(session, close_seconds)


def _started(session: _Session, said: list[str], close_seconds: float = 0.3) -> WandbTracker:
    tracker = _tracker(session, said, close_seconds)
    assert tracker.start(5.0)
    return tracker


def test_every_row_then_the_summary() -> None:
    session, said = _Session(), list[str]()
    tracker = _started(session, said, 5.0)
    for step in range(100):
        tracker.log({"step": step})
    assert tracker.position() == 107
    tracker.close(3, {"a": 1})
    tracker.close(0, {})
    tracker.log({"step": 100})
    assert [row["step"] for row in session.rows] == list(range(100))
    assert session.finished == (3, {"a": 1})
    assert not said
    assert not session.abandoned.is_set()


def test_pictures_alerts_and_artifacts_cost_training_nothing() -> None:
    session, said = _Session(), list[str]()
    tracker = _started(session, said, 5.0)
    tracker.log({"step": 1})
    tracker.show(lambda: {"step": 1})
    tracker.show(lambda: {"step": 1 // 0})  # drawn in the writer's thread: fails there
    tracker.alert("finished", "")
    tracker.keep(Artifact("x", "model", Path("gone"), {}))
    tracker.log({"step": 2})
    tracker.close(0, {})
    assert [row["step"] for row in session.rows] == [1, 2]
    assert session.others == [("picture", {"step": 1}), ("alert", "finished")]
    assert tracker.position() == 10  # two rows and one picture after the seventh
    assert (tracker.dropped, tracker.mode) == (0, "offline")
    assert said[0].startswith("wandb: no picture (ZeroDivisionError")
    assert said[1] == "wandb: no artifact (FileNotFoundError: no such file)"
    assert len(said) == 2


def test_a_start_that_hangs_is_given_up() -> None:
    session, said = _Stuck("open"), list[str]()
    assert not _tracker(session, said).start(0.2)
    assert session.abandoned.is_set()
    assert "did not start within 0.2 s" in said[0]


def test_a_start_that_fails_says_why_in_one_line() -> None:
    class Failing(_Session):
        def open(self, on_stop: Callable[[], None]) -> None:
            raise SystemExit("no\nroom")

    said: list[str] = []
    assert not _tracker(Failing(), said).start(5.0)
    (line,) = said
    assert "SystemExit: no room" in line


@pytest.mark.parametrize("where", ["log", "finish"])
def test_an_end_that_hangs_is_given_up(where: str) -> None:
    session, said = _Stuck(where), list[str]()
    tracker = _started(session, said)
    for step in range(10):
        tracker.log({"step": step})
    tracker.close(0, {})
    assert session.abandoned.is_set()
    (line,) = said
    assert "metrics.jsonl" in line
    assert "wandb sync HERE" in line


@pytest.mark.parametrize(
    ("error", "words"),
    [(TimeoutError("late"), "not everything"), (SystemExit(1), "did not finish (SystemExit: 1)")],
)
def test_an_end_that_fails_says_why_and_leaves_nothing_behind(
    error: BaseException, words: str
) -> None:
    class Failing(_Session):
        def finish(self, exit_code: int, summary: Mapping[str, object]) -> None:
            raise error

    session, said = Failing(), list[str]()
    tracker = _started(session, said, 5.0)
    tracker.log({"step": 1})
    tracker.close(0, {})
    assert session.abandoned.is_set()
    (line,) = said
    assert words in line
    assert "wandb sync HERE" in line


def test_a_writer_that_dies_is_told_of_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what nobody foresaw, such as a console that fails."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    session, said = _Session(), list[str]()
    tracker = _started(session, said, 5.0)
    tracker._say = lambda _: (_ for _ in ()).throw(RuntimeError("no console"))
    tracker.keep(Artifact("a", "model", Path("none"), {}))
    tracker._thread.join(5.0)
    tracker._say = said.append
    tracker.close(0, {})
    assert session.abandoned.is_set()
    assert said == [
        "wandb: its thread has ended; metrics.jsonl has every row; "
        "send what wandb has: wandb sync HERE"
    ]


def test_a_full_queue_drops_rows_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_writer, "QUEUE_ROWS", 4)
    session, said = _Stuck("log"), list[str]()
    tracker = _started(session, said)
    began = time.monotonic()
    for step in range(100):
        tracker.log({"step": step})
    assert time.monotonic() - began < 5  # a row takes 10 us; with a tenth of a second's wait: 10 s
    assert tracker.dropped in (95, 96)
    assert len(said) == 1
    tracker.close(0, {})


def test_a_bad_value_costs_its_row_only() -> None:
    session, said = _Session(), list[str]()
    tracker = _started(session, said, 5.0)
    tracker.log({"step": 1, "train/loss": "no number"})  # type: ignore[dict-item]
    tracker.log({"step": 2, "train/loss": float("nan")})
    assert tracker.position() == 8
    tracker.close(0, {})
    assert [row["step"] for row in session.rows] == [2]
    assert said == ["wandb: 1 rows are in metrics.jsonl only"]


def test_a_row_that_wandb_refuses_is_counted_and_takes_no_position() -> None:
    class Choosy(_Session):
        def log(self, row: Row) -> None:
            if row["step"] == 1:
                raise TypeError("no")
            super().log(row)

    session, said = Choosy(), list[str]()
    tracker = _started(session, said, 5.0)
    for step in range(3):
        tracker.log({"step": step})
    tracker.close(0, {})
    assert [row["step"] for row in session.rows] == [0, 2]
    assert tracker.position() == 9
    assert said == ["wandb: 1 rows are in metrics.jsonl only"]


@pytest.mark.parametrize(
    ("error", "calls"), [(ConnectionResetError("gone"), 1), (RuntimeError("odd"), 3)]
)
def test_a_service_that_fails_is_given_up(error: Exception, calls: int) -> None:
    called: list[Row] = []

    class Failing(_Session):
        def log(self, row: Row) -> None:
            called.append(row)
            raise error

    session, said = Failing(), list[str]()
    tracker = _started(session, said)
    for step in range(10):
        tracker.log({"step": step})
        time.sleep(0.01)
    assert len(called) == calls
    assert (tracker.mode, tracker.position()) == ("off", None)
    tracker.close(0, {})
    assert session.abandoned.is_set()
    assert session.finished is None
    assert len(said) == 2


def test_stop_and_unknown_position() -> None:
    session = _Session()
    session.first = None
    tracker = _started(session, [], 5.0)
    assert tracker.position() is None
    assert not tracker.stop_requested()
    session.on_stop()
    assert tracker.stop_requested()
    tracker.close(0, {})


@pytest.mark.parametrize(
    ("configured", "environment", "wanted"),
    [("auto", None, "auto"), ("auto", "dryrun", "offline"), ("auto", "ONLINE", "online")]
    + [("offline", "online", "offline"), ("auto", "shared", "auto"), ("auto", "", "auto")],
)
def test_wanted_mode(
    configured: str, environment: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wanted_mode(configured, lambda _: None)[0] == wanted


@pytest.mark.parametrize(
    ("user", "folder", "environment", "wanted"),
    [
        ("disabled", None, {}, "disabled"),
        (None, "offline", {}, "offline"),
        ("disabled", "online", {}, "online"),
        ("online", "disabled", {}, "disabled"),
        ("disabled", None, {"WANDB_MODE": "online"}, "online"),
        (None, "offline", {"WANDB_DISABLED": "true"}, "disabled"),
        (None, "offline", {"WANDB_DISABLED": "false"}, "offline"),
        ("nonsense", None, {}, "auto"),
        (None, None, {}, "auto"),
    ],
)
def test_the_switches_of_wandb_itself_are_obeyed(
    user: str | None, folder: str | None, environment: dict[str, str], wanted: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, place in ((user, Path("home/.config/wandb")), (folder, Path("wandb"))):
        if value is not None:
            place.mkdir(parents=True)
            (place / "settings").write_text(f"[default]\nmode = {value}\nproject = 100%\n")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    mode, asked = wanted_mode("auto", lambda _: None)
    assert mode == wanted
    assert bool(asked) == (wanted != "auto")
    assert wanted_mode("online", lambda _: None) == ("online", "wandb.mode=online")


def test_a_server_that_does_not_answer_is_known_in_the_time_given() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        assert "cannot reach" in (why_unreachable(url) or "")  # not listening: refused
        mute.listen(8)
        assert why_unreachable(url, 0.3)


@pytest.mark.parametrize(
    ("code", "usable"), [(200, True), (401, True), (302, True), (500, False), (503, False)]
)
def test_only_a_server_in_trouble_is_ruled_out(code: int, usable: bool) -> None:
    with WandbStub() as server:
        server.fault = lambda kind, what: ("status", code)
        assert (why_unreachable(server.url) is None) is usable


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_command_that_sends_the_record_can_be_copied(tmp_path: Path, mode: str) -> None:
    """The shell itself says which folders the printed words mean."""
    run = tmp_path / "a run's folder"
    record = run / "wandb" / "offline-run-20241127_101010-my run-12ab"
    record.mkdir(parents=True)
    session = WandbSession(WandbConfig(), run, {}, "my run-12ab", "my run", lambda _: None)
    session.mode = mode
    command = (
        session.resend().replace("wandb sync", "printf '%s\\n'").replace("--include-online", "")
    )
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == [str(record)]


def test_every_run_stages_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", "x")  # so that it is put back
    monkeypatch.delenv("WANDB_DATA_DIR")
    for name in ("one", "two"):
        stage_in(tmp_path / name)
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / name)
    monkeypatch.setenv("WANDB_DATA_DIR", "chosen")
    stage_in(tmp_path / "three")
    assert os.environ["WANDB_DATA_DIR"] == "chosen"
