"""The fault table of docs/faults.md, a test for each row that needs a whole training."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from dist_resnet.data.dataset import Dataset
from dist_resnet.data.prepare import prepare
from dist_resnet.data.sources.embedded import load_synthetic
from dist_resnet.runs.store import CheckpointStore
from tests.helpers.jobs import (
    HELD,
    command,
    differences,
    kill_tree,
    launch,
    launch_held,
    run_job,
    wait_for_step,
    workers,
)

STEPS = 40


def settings(folder: Path, digits: Dataset, name: str, *extra: str) -> list[str]:
    return [
        f"run.dir={folder}",
        f"run.name={name}",
        f"data.root={digits.folder.parent}",
        "data.dataset=digits",
        f"train.max_steps={STEPS}",
        "checkpoint.every_steps=5",
        "log.every_steps=5",
        "model.widths=[4,4,4]",
        "data.loader=resident",
        "wandb.mode=disabled",
        "parallel.threads=1",
        *extra,
    ]


def held_rank(job: subprocess.Popen[bytes]) -> psutil.Process:
    """The last rank of two, which waits."""
    found = [process for process in workers(job) if process.environ().get("RANK") == "1"]
    assert len(found) == 1
    return found[0]


def status(folder: Path, name: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((folder / name / "status.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """Two ranks, never disturbed: what every disturbed run must end like."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = run_job(2, settings(folder, digits, "plain"), folder)
    assert outcome.code == 0, outcome.output
    return folder / "plain"


def mounted(*arguments: str) -> bool:
    there = shutil.which("mount") is not None
    return there and subprocess.run(["mount", *arguments]).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB: two checkpoints of resnet20 (2.2 MB each) fit, three do not."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mounted("-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)):
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_killed_agent_leaves_no_orphan_and_the_same_command_continues(
    tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    job = launch_held(2, settings(tmp_path, digits, "job"), tmp_path / "log")
    wait_for_step(tmp_path / "job", 10, job, 100)
    ranks = workers(job)
    assert len(ranks) == 2
    job.send_signal(signal.SIGKILL)
    job.wait()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive, "orphans train on"
    assert status(tmp_path, "job")["state"] == "preempted"
    outcome = run_job(2, settings(tmp_path, digits, "job"), tmp_path)
    assert outcome.code == 0, outcome.output
    assert differences(undisturbed, tmp_path / "job") == []


def test_killed_rank_is_restarted_by_torchrun(
    tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    keys = settings(tmp_path, digits, "job", "run.overwrite=true")
    job = launch_held(2, keys, tmp_path / "log", restarts=1)
    wait_for_step(tmp_path / "job", 10, job, 100)
    held_rank(job).send_signal(signal.SIGKILL)
    assert job.wait(100) == 0, (tmp_path / "log").read_text()
    # What the first workers began is continued, not overwritten once more.
    assert "continued at step" in (tmp_path / "log").read_text()
    assert differences(undisturbed, tmp_path / "job") == []


def test_sigterm_saves_at_a_step_border_and_the_same_command_continues(
    tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    job = launch_held(2, settings(tmp_path, digits, "job"), tmp_path / "log")
    wait_for_step(tmp_path / "job", 10, job, 100)
    job.send_signal(signal.SIGTERM)
    job.wait(100)  # what has not ended by itself, torchrun kills after 30 s: no code 75 then
    found = status(tmp_path, "job")
    assert (found["state"], found["exit_code"]) == ("preempted", 75)
    saved = CheckpointStore(tmp_path / "job" / "checkpoints", 3).newest(print)
    assert saved is not None
    assert saved[1].state.step == found["step"]
    outcome = run_job(2, settings(tmp_path, digits, "job"), tmp_path)
    assert outcome.code == 0, outcome.output
    assert differences(undisturbed, tmp_path / "job") == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_one_process_exits_75_on_a_signal(tmp_path: Path, digits: Dataset, name: str) -> None:
    job = launch_held(0, settings(tmp_path, digits, "job"), tmp_path / "log")
    wait_for_step(tmp_path / "job", 10, job, 100)
    job.send_signal(signal.Signals[name])
    assert job.wait(100) == 75
    log = (tmp_path / "log").read_text()
    assert f"stopped by {name} at step" in log
    assert "Traceback" not in log


def test_a_closed_terminal_saves_under_torchrun_too(tmp_path: Path, digits: Dataset) -> None:
    held = ["hold", "1", str(HELD), *settings(tmp_path, digits, "job")]
    arguments = ["nohup", *command(2, 0, held, "tests.helpers.faulty_train")]  # torchrun undoes it
    job = launch(arguments, tmp_path / "log")
    wait_for_step(tmp_path / "job", 10, job, 100)
    job.send_signal(signal.SIGHUP)
    job.wait(100)
    found = status(tmp_path, "job")
    assert (found["state"], found["exit_code"]) == ("preempted", 75)


def test_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, digits: Dataset) -> None:
    job = launch_held(2, settings(tmp_path, digits, "job"), tmp_path / "log")
    wait_for_step(tmp_path / "job", 10, job, 100)
    held_rank(job).send_signal(signal.SIGUSR1)
    job.wait(100)
    assert status(tmp_path, "job")["state"] == "preempted"
    log = (tmp_path / "log").read_text()
    assert "Connection closed" not in log
    assert log.count("exitcode: 75") + log.count("exitcode  : 75") >= 1


def test_hung_rank_ends_the_job_with_its_name_and_stack(tmp_path: Path, digits: Dataset) -> None:
    faulty = ["hang", "1", "8", *settings(tmp_path, digits, "job", "parallel.timeout_seconds=8")]
    outcome = run_job(2, faulty, tmp_path, module="tests.helpers.faulty_train")
    assert outcome.code != 0
    stack = outcome.output[outcome.output.index("Timeout (0:00:08)") :]
    assert "<rank 1 of 2>" in stack
    assert "faulty_train.py" in stack
    newest = CheckpointStore(tmp_path / "job" / "checkpoints", 3).newest_path()
    assert newest is not None
    assert "step-00000005" in newest.name


@pytest.mark.parametrize("ranks", [0, 2])
def test_nan_in_one_rank_ends_all_with_the_step_named(
    tmp_path: Path, digits: Dataset, ranks: int
) -> None:
    rank = 1 if ranks else 0
    faulty = ["nan", str(rank), "12", *settings(tmp_path, digits, "job")]
    outcome = run_job(ranks, faulty, tmp_path, module="tests.helpers.faulty_train")
    assert outcome.code == (1 if ranks else 3)  # torchrun returns 1 for every code
    lines = [line for line in outcome.output.splitlines() if line.startswith("dist_resnet: ")]
    assert len(lines) == 1, outcome.output
    assert "not finite at step 13" in lines[0]
    assert "step-00000010" in lines[0]
    assert (status(tmp_path, "job")["state"], status(tmp_path, "job")["exit_code"]) == ("failed", 3)
    newest = CheckpointStore(tmp_path / "job" / "checkpoints", 3).newest(print)
    assert newest is not None
    assert newest[1].state.step == 10
    assert all(tensor.isfinite().all() for tensor in newest[1].state.model.values())


def test_full_disk_costs_no_older_checkpoint(
    small_disk: Path, tmp_path: Path, digits: Dataset
) -> None:
    ballast, go_on = small_disk / "ballast", tmp_path / "go on"
    large = "model.widths=[16,32,64]"
    keys = settings(small_disk, digits, "job", large)
    job = launch_held(0, keys, tmp_path / "log", file=go_on)
    wait_for_step(small_disk / "job", 10, job, 100)  # the checkpoint of step 5 is there
    with ballast.open("wb") as file:  # until nothing more fits
        try:
            while True:
                file.write(os.urandom(1 << 16))
                file.flush()
        except OSError:
            pass
    go_on.touch()
    code = job.wait(100)
    log = (tmp_path / "log").read_text()
    assert code == 2, log
    assert "No space left on device" in log
    assert "training goes on" in log
    assert "Traceback" not in log
    store = CheckpointStore(small_disk / "job" / "checkpoints", 3)
    assert store.newest(print) is not None
    assert not list(store.folder.glob(".tmp*"))
    ballast.unlink()
    outcome = run_job(0, [*keys, "checkpoint.keep=1"], tmp_path)
    assert outcome.code == 0, outcome.output


def test_read_only_run_folder(tmp_path: Path, digits: Dataset) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if not mounted("--bind", str(place), str(place)):
        pytest.skip("a read-only mount needs root")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        outcome = run_job(0, settings(place, digits, "job"), tmp_path)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert_one_line(outcome.output, outcome.code, "Read-only file system")


def test_two_jobs_on_one_run_folder(tmp_path: Path, digits: Dataset) -> None:
    go_on = tmp_path / "go on"
    first = launch_held(0, settings(tmp_path, digits, "job"), tmp_path / "log", file=go_on)
    try:
        wait_for_step(tmp_path / "job", 10, first, 100)
        second = run_job(0, settings(tmp_path, digits, "job"), tmp_path)
        assert_one_line(second.output, second.code, f"in use by process {first.pid}")
        go_on.touch()
        assert first.wait(100) == 0
    finally:
        kill_tree(first)


def test_dataset_replaced_or_truncated_after_the_run_began(tmp_path: Path, digits: Dataset) -> None:
    root = tmp_path / "data"
    root.mkdir()
    shutil.copytree(digits.folder, root / "digits")
    base = settings(tmp_path, digits, "job", f"data.root={root}")
    job = launch_held(0, base, tmp_path / "log")
    wait_for_step(tmp_path / "job", 10, job, 100)
    job.send_signal(signal.SIGTERM)
    assert job.wait(100) == 75

    beton = root / "digits" / "train.beton"
    size = beton.stat().st_size
    os.truncate(beton, size // 2)
    outcome = run_job(0, base, tmp_path)
    assert_one_line(outcome.output, outcome.code, "train.beton", "dist_resnet.data.prepare digits")

    shutil.rmtree(root / "digits")
    prepare(load_synthetic(1437, 360, 10, 32, 1), root / "digits", "synthetic", "digits")
    outcome = run_job(0, base, tmp_path)
    assert_one_line(outcome.output, outcome.code, "another run", "fingerprint")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_wandb_service_killed_or_stopped_changes_nothing(
    tmp_path: Path, digits: Dataset, undisturbed: Path, number: int
) -> None:
    keys = settings(tmp_path, digits, "job", "wandb.mode=offline", "parallel.timeout_seconds=60")
    job = launch_held(2, keys, tmp_path / "log", file=tmp_path / "go on")
    try:
        wait_for_step(tmp_path / "job", 10, job, 100)
        tree = psutil.Process(job.pid).children(recursive=True)
        service = [process for process in tree if "wandb-core" in process.name()]
        assert service, "no service to disturb"
        for process in service:
            process.send_signal(number)
        (tmp_path / "go on").touch()
        assert job.wait(100) == 0, (tmp_path / "log").read_text()
    finally:
        kill_tree(job)
    assert differences(undisturbed, tmp_path / "job") == []


def test_rendezvous_port_in_use_is_told_within_seconds(tmp_path: Path, digits: Dataset) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = command(2, 0, settings(tmp_path, digits, "job"))
        at = arguments.index("--standalone")
        arguments[at : at + 1] = [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-conf=is_host=1",
        ]
        job = launch(arguments, tmp_path / "log")
        try:
            assert job.wait(100) == 1
        finally:
            kill_tree(job)
    assert "EADDRINUSE" in (tmp_path / "log").read_text()
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("extra", "texts"),
    [
        (["parallel.device=cuda"], ["parallel.device=cuda"]),
        (["parallel.replicas=3"], ["parallel.replicas=3", "not a multiple of the 2"]),
        (["optim.lrr=1"], ["optim.lrr=1", "optim.lr"]),
        pytest.param(
            ["train.step_mode=graph", "parallel.device=cpu"], ["train.step_mode=graph", "GPUs"],
            marks=pytest.mark.slow,
        ),
        (["train.step_mode=fused", "precision.channels_last=false"], ["needs precision.channels"]),
        pytest.param(
            ["data.batch_size_per_replica=2000"], ["data.batch_size_per_replica=2000", "1437"],
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_user_errors_are_said_once_by_two_ranks(
    tmp_path: Path, digits: Dataset, extra: list[str], texts: list[str]
) -> None:
    if extra == ["parallel.device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    outcome = run_job(2, settings(tmp_path, digits, "job", *extra), tmp_path)
    assert outcome.code == 1  # torchrun's
    assert "exitcode  : 2" in outcome.output
    assert_one_line(outcome.output, 2, *texts)
    (said,) = [line for line in outcome.output.splitlines() if line.startswith("dist_resnet: ")]
    _, root = outcome.output.split("Root Cause")
    assert root.count(said.removeprefix("dist_resnet: ")) == 1


def assert_one_line(output: str, code: int, *texts: str) -> None:
    """Exit code 2, and one line of ours that holds all `texts`; torchrun's own lines aside."""
    assert code == 2, output
    lines = [line for line in output.splitlines() if line.startswith("dist_resnet: ")]
    assert len(lines) == 1, output
    for text in texts:
        assert text in lines[0]
    assert 'File "' not in output.split("torch/distributed/elastic")[0]
