"""launch/run.sh decides rightly what a job's end means; torchrun is played by a script."""

import fcntl
import signal
from pathlib import Path

import psutil
import pytest
from torch.distributed import run as torchrun

from tests.helpers.launching import LAUNCH, PATIENCE, Stage, end, start, wait_until

CRASH = "status running 5; exit 1"
DONE = "status done 40 0; exit 0"
# What a job does that saves when it is told to stop.
OBEDIENT = (
    "trap 'status preempted 7 75; exit 1' {}; touch $FAKE/ready; while :; do sleep 0.05; done"
)


@pytest.mark.parametrize(
    ("scenario", "code", "starts"),
    [
        ([DONE], 0, 1),
        (["exit 0"], 0, 1),  # --help and --print-config
        (["status failed 5 2; exit 1"], 2, 1),
        (["status failed 5 3; exit 1"], 3, 1),
        (["status preempted 5 75; exit 1"], 75, 1),
        ([CRASH], 1, 4),
        (["exit 1"], 1, 4),
        (["status failed 5 1; exit 1"], 1, 4),
        ([CRASH, DONE], 0, 2),
        # As long as it comes further it is started again.
        ([f"status running {n}; exit 1" for n in range(5, 50, 5)] + [DONE], 0, 10),
        # Two failures at one place, progress, and a full allowance again.
        ([CRASH] * 3 + ["status running 6; exit 1"] * 3 + [DONE], 0, 7),
        # torchrun itself is killed: its workers were told by the kernel and have saved.
        (["status preempted 5 75; kill -9 $$", DONE], 0, 2),
        # All done, and only then something broke.
        (["status done 40 0; exit 1"], 0, 1),
    ],
)
def test_the_end_of_a_job(tmp_path: Path, scenario: list[str], code: int, starts: int) -> None:
    stage = Stage(tmp_path, scenario)
    assert stage.play() == code, stage.log()
    assert len(stage.calls()) == starts, stage.log()


@pytest.mark.parametrize("state", ["preempted", "done", "failed"])
def test_an_earlier_jobs_status_says_nothing(tmp_path: Path, state: str) -> None:
    stage = Stage(tmp_path, ["exit 1"])
    stage.run.mkdir()
    text = f'{{\n  "state": "{state}",\n  "step": 900,\n  "reason": "",\n  "exit_code": 2\n}}\n'
    (stage.run / "status.json").write_text(text)
    assert stage.play() == 1
    assert len(stage.calls()) == 4


@pytest.mark.parametrize("state", ["done", "preempted"])
def test_a_refused_command_is_not_started_again(tmp_path: Path, state: str) -> None:
    stage = Stage(tmp_path, ["echo '{}' >$RUN/.refused; exit 1"])
    stage.run.mkdir()
    (stage.run / ".refused").write_text("of an earlier command")
    text = f'{{\n  "state": "{state}",\n  "step": 900,\n  "reason": "",\n  "exit_code": 0\n}}\n'
    (stage.run / "status.json").write_text(text)
    assert stage.play() == 2
    assert len(stage.calls()) == 1
    assert (stage.run / "status.json").read_text() == text
    (tmp_path / "scenario").write_text("status done 40 0; exit 0\n")
    assert stage.play() == 0


def test_overwrite_is_meant_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, ["exit 1", CRASH, DONE])
    assert stage.play("run.sh", "a.yaml", "run.overwrite=true") == 0
    first, second, third = stage.calls()
    assert first.endswith("-m dist_resnet.train a.yaml run.overwrite=true")
    assert second == first, "nothing was begun: it is still to be overwritten"
    assert third.endswith("run.overwrite=true run.overwrite=false run.resume=auto")


@pytest.mark.parametrize(
    ("sent", "arrives"), [("TERM", "TERM"), ("USR1", "USR1"), ("INT", "TERM"), ("HUP", "TERM")]
)
def test_signals_are_passed_on(tmp_path: Path, sent: str, arrives: str) -> None:
    stage = Stage(tmp_path, [OBEDIENT.format(arrives)])
    job = stage.start("single_node.sh")
    try:
        wait_until((tmp_path / "ready").exists, PATIENCE, "start")
        job.send_signal(getattr(signal, f"SIG{sent}"))
        assert job.wait(PATIENCE) == 75
    finally:
        end(job)
    assert len(stage.calls()) == 1


def test_a_signal_before_anything_runs_gives_75(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [DONE])
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/ready\nsleep 0.5\nkill -USR1 $$\n")
    job = stage.start("run.sh")
    try:
        wait_until((tmp_path / "ready").exists, PATIENCE, "start")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE) == 75
    finally:
        end(job)


def test_a_killed_supervisor_takes_torchrun_along(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [OBEDIENT.format("TERM")])
    job = stage.start("single_node.sh")
    wait_until((tmp_path / "ready").exists, PATIENCE, "start")
    left = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.wait()
    assert psutil.wait_procs(left, PATIENCE)[1] == []
    assert '"preempted"' in (stage.run / "status.json").read_text()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [DONE])
    stage.run.mkdir()
    with (stage.run / ".lock").open("w") as lock:
        lock.write("process 7 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert stage.play() == 2
    assert "in use by process 7 on elsewhere" in stage.log()
    assert stage.calls() == []
    assert stage.play() == 0


def test_what_cannot_be_started_is_refused(tmp_path: Path) -> None:
    for environment, text in (
        ({"RUN": "/proc/nowhere"}, "/proc/nowhere: cannot be written"),
        ({"NNODES": "2"}, "needs RDZV_ENDPOINT=HOST:PORT"),
        ({"NNODES": "1:2", "RDZV_ENDPOINT": "a:1"}, "does not go with NNODES=1:2"),
    ):
        stage = Stage(tmp_path, [DONE], **environment)
        assert stage.play("run.sh", "run.overwrite=true") == 2
        assert text in stage.log()
        assert stage.calls() == []


def test_torchrun_gets_what_restarts_need(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, [DONE], PET_NNODES="7", PET_MASTER_ADDR="x", NPROC="3", SHUTDOWN_TIMEOUT="77",
        NCCL_IB_HCA="mlx5", CUDA_VISIBLE_DEVICES="1,3",
    )  # fmt: skip
    assert stage.play("single_node.sh", "seed=1") == 0
    (call,) = stage.calls()
    for option in (
        "--standalone",
        "--nproc-per-node=3",
        "--max-restarts=0",
    ):
        assert option in call.split()
    environment = (tmp_path / "environment").read_text().splitlines()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=77" in environment
    assert {"NCCL_IB_HCA=mlx5", "CUDA_VISIBLE_DEVICES=1,3"} <= set(environment)
    (setting,) = [line for line in environment if line.startswith("PET_")]
    assert setting == "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def test_torchrun_takes_its_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option of 2.9 or 2.12 is needed; what an older torch does not know it does not read."""
    text = (LAUNCH / "run.sh").read_text()
    assert not [o for o in ("--shutdown-timeout", "--signals-to-handle") if o in text]
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGUSR1")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "77")
    arguments = torchrun.get_args_parser().parse_args(["--standalone", "script.py"])
    config, _, _ = torchrun.config_from_args(arguments)
    if hasattr(arguments, "signals_to_handle"):  # torch 2.9
        assert config.signals_to_handle == "SIGTERM,SIGUSR1"
    if hasattr(arguments, "shutdown_timeout"):  # torch 2.12
        assert config.shutdown_timeout == 77


@pytest.mark.parametrize(
    ("environment", "bound", "said"),
    [
        ({"GPUS": "4"}, "--numa-binding=node", "NUMA binding: node, each process beside its GPU"),
        ({"GPUS": "4", "NUMA_BINDING": "exclusive"}, "--numa-binding=exclusive", "exclusive"),
        ({"GPUS": "4", "NUMA_BINDING": "none"}, "", ""),
        ({"GPUS": "4", "UNBOUND": "unneeded"}, "", ""),
        ({"GPUS": "4", "UNBOUND": "numactl is not here"}, "", "no NUMA binding: numactl is not"),
        ({"GPUS": "2", "NPROC": "4"}, "", ""),  # the trainer says what is wrong
        ({"GPUS": "0"}, "", ""),
    ],
)
def test_processes_are_bound_beside_their_gpus(
    tmp_path: Path, environment: dict[str, str], bound: str, said: str
) -> None:
    stage = Stage(tmp_path, [DONE], **environment)
    assert stage.play() == 0
    (call,) = stage.calls()
    assert [option for option in call.split() if "numa" in option] == [bound] * bool(bound)
    processes = environment.get("NPROC") or ("2" if environment["GPUS"] == "0" else "4")
    assert f"--nproc-per-node={processes}" in call
    lines = [line for line in stage.log().splitlines() if "NUMA" in line]
    assert len(lines) == bool(said)
    assert not said or said in lines[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_nodes_meet_at_node_0(tmp_path: Path, rank: int) -> None:
    stage = Stage(tmp_path, [DONE], JOIN_TIMEOUT="77", IFNAME="lo", NCCL_SOCKET_IFNAME="ib0")
    assert stage.play("multi_node.sh", str(rank), "2:4", "gpu0", "seed=1") == 0
    (call,) = stage.calls()
    for option in (
        "--nnodes=2:4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=gpu0:29400",
        "--rdzv-id=none",
        f"--rdzv-conf=is_host={1 - rank},join_timeout=77,last_call_timeout=30",
    ):
        assert option in call.split()
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=ib0"} <= set(environment)


@pytest.mark.parametrize("arguments", [[], ["0", "2"], ["a", "2", "host"], ["0", "2-4", "host"]])
def test_multi_node_explains_itself(tmp_path: Path, arguments: list[str]) -> None:
    stage = Stage(tmp_path, [DONE])
    assert stage.play("multi_node.sh", *arguments) == 2
    assert "launch/multi_node.sh RANK NODES HOST[:PORT]" in stage.log()


def two(stage: Path, scenario: list[str], **environment: str) -> Stage:
    return Stage(stage, scenario, NODE_RANK="1", NNODES="2", RDZV_ENDPOINT="a:1", **environment)


def test_node_0_leaves_its_word_and_the_others_follow(tmp_path: Path) -> None:
    follower = two(tmp_path, ["exit 1"])
    follower.run.mkdir()
    word = follower.run / ".word"
    word.write_text("exit 3 of an earlier job\n")
    job = follower.start("run.sh")
    try:
        wait_until(lambda: len(follower.calls()) > 1, PATIENCE, "it joins again by itself")
        assert job.poll() is None, "the earlier job's end is not its own"
        word.write_text("start 1\n")
        seen = len(follower.calls())
        wait_until(lambda: len(follower.calls()) > seen, PATIENCE, "it joins again when told to")
        word.write_text("exit 2 now\n")
        assert job.wait(PATIENCE) == 2
    finally:
        end(job)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("echo 0 >$DOCTOR_VERDICT", 0),
        ("echo 2 >$DOCTOR_VERDICT", 2),
        ("exit 1", 2),  # it could not even be started
    ],
)
def test_the_doctors_verdict(tmp_path: Path, line: str, code: int) -> None:
    stage = Stage(tmp_path, [line], DOCTOR="1", TMPDIR=str(tmp_path))
    before = set(tmp_path.iterdir())
    assert stage.play("single_node.sh", "seed=1") == code
    (call,) = stage.calls()
    assert call.endswith("-m dist_resnet.doctor seed=1")
    new = {path.name for path in set(tmp_path.iterdir()) - before}
    assert new == {"calls", "environment", "log"}, "and nothing is left behind"


def test_a_silent_node_0_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    stage = two(tmp_path, ["exit 1"], JOIN_TIMEOUT="1")
    assert stage.play() == 1
    assert "node 0 has been silent" in stage.log()


def test_node_0_says_how_it_ended(tmp_path: Path) -> None:
    stage = Stage(
        tmp_path, ["status failed 5 3; exit 1"], NNODES="2", RDZV_ENDPOINT="a:1", NODE_RANK="0"
    )
    assert stage.play() == 3
    assert (stage.run / ".word").read_text().startswith("exit 3 ")


def test_gpus_that_torch_cannot_use_start_no_cpu_ranks(tmp_path: Path) -> None:
    """With the real Python: its torch sees no CUDA, and NVML counts eight GPUs."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: False\n"
        "torch.cuda.device_count = lambda: 8\n"
    )
    log, runs = tmp_path / "log", tmp_path / "runs"
    environment = {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"}
    arguments = ["configs/digits.yaml", f"run.dir={runs}"]
    job = start([str(LAUNCH / "single_node.sh"), *arguments], log, environment)
    try:
        assert job.wait(240) == 2, log.read_text()
    finally:
        end(job)
    (line,) = log.read_text().splitlines()
    assert line.startswith("dist_resnet: parallel.device=auto: there are GPUs, but")
    assert line.endswith("or set parallel.device=cpu")
    assert not runs.exists()
