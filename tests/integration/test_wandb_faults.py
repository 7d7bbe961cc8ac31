"""W&B cannot hurt training, whatever happens to it. Real wandb, real processes, no network."""

import json
import os
import pty
import re
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.wandb_child import Child
from tests.helpers.wandb_readback import read_run
from tests.helpers.wandb_stub import WandbStub

pytest.importorskip("wandb")


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


@pytest.fixture
def server() -> Iterator[WandbStub]:
    with WandbStub() as stub:
        yield stub


def _steps(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


@pytest.mark.parametrize("mode", ["auto", pytest.param("online", marks=pytest.mark.slow)])
def test_no_key_on_a_terminal_asks_nothing(child: Child, mode: str) -> None:
    end, text = time.monotonic() + 100, b""
    pid, terminal = pty.fork()
    if pid == 0:
        command = child.command({"mode": mode, "steps": [1]})
        os.execve(command[0], command, child.environment({}))
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                text += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert b"Enter your choice" not in text
    assert b"no API key" in text
    (line,) = re.findall(rb"^\{.*\}", text, re.M)
    assert json.loads(line)["mode"] == "offline"


def test_refused_connection(child: Child) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    _starts_offline(child, {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}, "cannot reach")


@pytest.mark.slow
def test_black_hole(child: Child) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(64)
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        _starts_offline(child, {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}, "no answer|time")


def test_resume_where_the_key_is_refused_rewinds_offline(child: Child, server: WandbStub) -> None:
    server.fault = lambda kind, what: ("status", 401)
    out = child(env=server.env(), steps=[6, 7], resume=6)
    assert (out["mode"], child.code) == ("offline", 0)
    assert out["positions"] == {"6": 7, "7": 8}
    assert len(child.err.splitlines()) == 1


@pytest.mark.parametrize(("code", "why"), [(500, "answers 500"), (401, "online start failed")])
def test_server_refuses(child: Child, server: WandbStub, code: int, why: str) -> None:
    server.fault = lambda kind, what: ("status", code)
    _starts_offline(child, server.env(), why)


@pytest.mark.slow
def test_server_that_answers_the_probe_and_then_hangs(child: Child, server: WandbStub) -> None:
    asked: list[str] = []

    def fault(kind: str, what: str) -> tuple[str, float] | None:
        asked.append(what)
        return None if len(asked) == 1 else ("hang", 60)

    server.fault = fault
    _starts_offline(child, server.env(), "online start failed")


def test_malformed_key_and_unwritable_folder(child: Child) -> None:
    assert child(env={"WANDB_API_KEY": "short"})["mode"] == "offline"
    (child.folder / "file").write_text("")
    assert child(dir=str(child.folder / "file"))["mode"] is None
    assert "wandb: off" in child.err
    assert child.code == 0


@pytest.mark.parametrize(
    ("fault", "forget"),
    [
        ("SIGKILL", False),
        pytest.param("SIGKILL", True, marks=pytest.mark.slow),
        pytest.param("SIGTERM", False, marks=pytest.mark.slow),
        ("SIGSTOP", False),
        pytest.param("SIGSTOP", True, marks=pytest.mark.slow),
    ],
)
def test_service_that_dies_or_hangs(child: Child, fault: str, forget: bool) -> None:
    job: dict[str, Any] = {"fault": fault, "fault_at": 50, "pause": 0.001, "close_seconds": 2}
    out = child(steps=list(range(700)), forget_to_close=forget, **job)
    assert child.code == 0
    assert out["p99"] < 0.005  # of the processor; 0.1 ms on most
    assert out["longest"] < 10  # a busy machine may let us wait; a hung service would for ever
    assert out["close"] < 2 + 10  # the two seconds that it was given, then no more
    assert "metrics.jsonl" in child.err
    assert "wandb sync" in child.err


def test_killed_trainer_loses_a_second_at_most(child: Child) -> None:
    child(steps=list(range(100)), die=True)
    assert child.code == -9
    assert _steps(child.record().history) == list(range(100))


def test_server_that_goes_away_does_not_hold_the_end(child: Child, server: WandbStub) -> None:
    def fault(kind: str, what: str) -> tuple[str, float] | None:
        return ("status", 503) if kind == "stream" else None

    server.fault = fault
    out = child(env=server.env(), steps=list(range(50)), close_seconds=4)
    assert child.code == 0
    assert out["close"] < 4 + 10  # the four seconds that it was given, then no more
    assert "wandb sync --include-online" in child.err
    assert _steps(child.record().history) == list(range(50))


def _starts_offline(child: Child, env: dict[str, str], why: str) -> None:
    out = child(env=env, steps=[1, 2, 3])
    assert (out["mode"], child.code) == ("offline", 0)
    assert out["start"] < 60
    assert re.search(why, child.err), child.err
    assert len(child.err.splitlines()) == 1
    assert "wandb sync" in child.err
    (folder,) = (child.folder / "run" / "wandb").glob("offline-run-*")
    assert _steps(read_run(folder).history) == [1, 2, 3]
