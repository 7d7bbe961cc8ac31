"""What W&B records is right, and sent, and not doubled. Real wandb, real processes, no network."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.wandb_child import Child
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


def test_offline_record_holds_every_row_on_the_right_axis(child: Child) -> None:
    out = child(steps=list(range(300)))
    assert (out["mode"], child.code) == ("offline", 0)
    assert out["start"] < 30
    assert out["close"] < 30
    assert out["p99"] < 0.005
    record = child.record()
    assert _steps(record.history) == list(range(300))
    assert record.history[4]["val/top1"] == 0.04
    assert record.history[9]["train/loss"] == 0.1
    axes = {"train/*": "step", "val/*": "step", "gap/*": "step", "perf/*": "step", "step": ""}
    assert record.step_metrics == axes
    assert record.summary["val/top1"] == 0.5
    assert record.exit_code == 0
    assert record.config["model"] == {"name": "resnet20"}
    assert record.run["run_group"] == "g"
    assert record.run["tags"] == ["t"]
    assert record.run["display_name"] == "a name"
    said = child.err.splitlines()
    assert len(said) == 1
    assert "offline" in said[0]
    assert "wandb sync" in said[0]


def test_disabled_imports_nothing_and_writes_nothing(child: Child) -> None:
    out = child(mode="disabled")
    assert (out["mode"], out["imported"], child.code) == (None, False, 0)
    assert child.err == "wandb: off, because wandb.mode=disabled\n"
    out = child(env={"WANDB_MODE": "disabled"})
    assert (out["mode"], out["imported"], child.code) == (None, False, 0)
    assert not (child.folder / "run").exists()


@pytest.mark.parametrize("switch", ["disabled", "offline"])
def test_what_wandb_s_own_command_switched_off_is_not_sent(
    child: Child, server: WandbStub, switch: str
) -> None:
    config = child.folder / "config"
    environment = server.env() | {"WANDB_CONFIG_DIR": str(config), "WANDB_DIR": str(child.folder)}
    subprocess.run(
        [sys.executable, "-m", "wandb", switch], env=child.environment(environment), check=True,
        cwd=child.folder, capture_output=True,
    )  # fmt: skip
    out = child(env=environment, steps=[])
    assert out["mode"] == (None if switch == "disabled" else "offline")
    assert server.runs == {}
    (line,) = child.err.splitlines()
    assert f"says mode = {switch}" in line


def test_configured_mode_beats_the_environment(child: Child, server: WandbStub) -> None:
    assert child(env=server.env() | {"WANDB_MODE": "offline"}, mode="online")["mode"] == "online"


def test_online_delivers_every_row(child: Child, server: WandbStub) -> None:
    out = child(env=server.env(), steps=list(range(100)))
    assert (out["mode"], child.code, server.unknown) == ("online", 0, [])
    rows = server.history("the-run")
    assert _steps(rows) == list(range(100))
    assert [row["_step"] for row in rows] == list(range(100))
    assert server.config("the-run") == {"model": {"name": "resnet20"}}
    assert server.summary("the-run")["val/top1"] == 0.5
    run = server.runs["the-run"]
    assert (run.complete, run.exit_code, len(server.runs)) == (True, 0, 1)
    assert server.url in child.err
    assert len(child.err.splitlines()) == 1


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 6])
def test_rewound_run_online(child: Child, server: WandbStub, at: int) -> None:
    first = child(env=server.env(), steps=list(range(10)))
    position = first["positions"][str(at - 1)] if at else 0
    assert position == at
    again = child(env=server.env(), steps=list(range(at, 14)), resume=position)
    assert again["positions"]["13"] == 14
    assert _steps(server.history("the-run")) == list(range(14))


def test_rewound_run_offline_then_sent(child: Child, server: WandbStub) -> None:
    first = child(steps=list(range(10)))
    again = child(steps=list(range(6, 14)), resume=first["positions"]["5"])
    child(steps=list(range(11, 20)), resume=again["positions"]["10"])
    assert len(child.folders()) == 3
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, child.folders())],
        env=child.environment(server.env()),
        check=True,
        timeout=240,
        capture_output=True,
    )
    assert _steps(server.history("the-run")) == list(range(20))


def test_server_refuses_to_rewind(child: Child, server: WandbStub) -> None:
    child(env=server.env(), steps=list(range(10)))
    server.fault = lambda kind, what: ("status", 400) if what == "RewindRun" else None
    out = child(env=server.env(), steps=list(range(6, 14)), resume=6)
    assert (out["mode"], child.code) == ("online", 0)
    assert "rows after the checkpoint stay" in child.err
    assert out["positions"]["6"] == 11  # after the ten rows that the server kept
    assert _steps(server.history("the-run")) == [*range(10), *range(6, 14)]


def test_no_key_and_no_environment_in_the_run_folder(child: Child, server: WandbStub) -> None:
    canary = {"SECRET_TOKEN": "canary", "SLURM_JOB_COMMENT": "canary", "AWS_KEY": "canary"}
    child(env=server.env() | canary, steps=[1])
    held = [path.read_bytes() for path in (child.folder / "run").rglob("*") if path.is_file()]
    assert len(held) > 3
    assert not any(b"canary" in data or b"0" * 40 in data for data in held)


def test_sweep_agent_decides_the_identity(child: Child, server: WandbStub) -> None:
    env = {"WANDB_SWEEP_ID": "sw", "WANDB_RUN_ID": "from-agent", "WANDB_PROJECT": "agents"}
    child(env=server.env() | env, steps=[1, 2])
    assert child.code == 0
    assert list(server.runs) == ["from-agent"]
    assert server.runs["from-agent"].project == "agents"
    assert _steps(server.history("from-agent")) == [1, 2]


def test_stop_button(child: Child, server: WandbStub) -> None:
    server.stopped.add("the-run")
    out = child(env=server.env(), steps=[1], wait_for_stop=40)
    assert (out["stopped"], child.code) == (True, 0)


@pytest.mark.slow
def test_leet_reads_the_run(child: Child) -> None:
    if not shutil.which("wandb", path=str(Path(sys.executable).parent)):
        pytest.skip("no wandb command")
    child(steps=list(range(10)))
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(child.folders()[0])],
        env=child.environment({}),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "train/loss" in done.stdout
