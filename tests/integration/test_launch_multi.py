"""launch/multi_node.sh on two hosts: two network namespaces with a cable between them."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import current_step, differences, wait_for_step
from tests.helpers.launching import (
    LAUNCH,
    PATIENCE,
    STEPS,
    agent_of,
    end,
    free_port,
    start,
    training,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ENGINES = ("kubernetes", "trainjob", "skypilot")
# How soon a host notices that the other is gone.
NOTICE = "parallel.timeout_seconds=10"
ADDRESSES = "10.77.0.1", "10.77.0.2"


def ip(*arguments: str) -> bool:
    done = subprocess.run(["ip", *arguments], capture_output=True, stdin=subprocess.DEVNULL)
    return done.returncode == 0


@dataclass(frozen=True)
class Hosts:
    names: tuple[str, str]
    cards: tuple[str, str]

    def run(self, rank: int, nodes: str, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """multi_node.sh on one of the hosts, with one process."""
        inside = ["ip", "netns", "exec", self.names[rank]]
        script = [str(LAUNCH / "multi_node.sh"), str(rank), nodes, ADDRESSES[0]]
        environment = {"NPROC": "1", "IFNAME": self.cards[rank], "JOIN_TIMEOUT": "120"}
        environment |= {"LAST_CALL": "3", "REJOIN": "10"}
        return start([*inside, *script, *arguments], log, environment)

    def cable(self, state: str) -> None:
        """up or down."""
        name, card = self.names[1], self.cards[1]
        assert ip("netns", "exec", name, "ip", "link", "set", card, state)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    number = os.getpid() % 100_000
    pair = Hosts((f"dr{number}a", f"dr{number}b"), (f"drv{number}a", f"drv{number}b"))
    able = os.getuid() == 0 and shutil.which("ip") is not None
    if not able or not ip("netns", "add", pair.names[0]):
        pytest.skip("network namespaces need root, iproute2 and a kernel that lets them be made")
    try:
        assert ip("netns", "add", pair.names[1])
        assert ip("link", "add", pair.cards[0], "type", "veth", "peer", "name", pair.cards[1])
        for name, card, address in zip(pair.names, pair.cards, ADDRESSES, strict=True):
            assert ip("link", "set", card, "netns", name)
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            assert ip("-n", name, "link", "set", "lo", "up")
            assert ip("-n", name, "link", "set", card, "up")
        yield pair
    finally:
        for name in pair.names:
            ip("netns", "del", name)


def finish(jobs: list[subprocess.Popen[bytes]], logs: list[Path], codes: list[int]) -> None:
    limit = time.monotonic() + PATIENCE
    try:
        for job in jobs:
            job.wait(max(1, limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail("no end:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    finally:
        for job in jobs:
            end(job)
    output = "\n".join(log.read_text()[-3000:] for log in logs)
    assert [job.returncode for job in jobs] == codes, output


@contextmanager
def both_train(
    hosts: Hosts, nodes: str, folder: Path, data: Dataset, codes: list[int]
) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path]]]:
    """A training on both hosts, and its logs; at the end both must have ended with `codes`."""
    logs = [folder / "log0", folder / "log1"]
    jobs = [hosts.run(r, nodes, logs[r], *training(folder, data, NOTICE)) for r in (0, 1)]
    try:
        yield jobs, logs
    finally:
        finish(jobs, logs, codes)


def test_a_host_cut_off_and_back(
    hosts: Hosts, tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    with both_train(hosts, "2", tmp_path, digits, [0, 0]) as (jobs, logs):
        wait_for_step(tmp_path / "job", 10, jobs[0], PATIENCE)
        hosts.cable("down")
        wait_until(lambda: "restart 1 of 3" in logs[0].read_text(), PATIENCE, "node 0 notices")
        hosts.cable("up")
    assert differences(undisturbed, tmp_path / "job") == []


def test_the_host_of_the_rendezvous_loses_its_torchrun(
    hosts: Hosts, tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    with both_train(hosts, "2", tmp_path, digits, [0, 0]) as (jobs, logs):
        wait_for_step(tmp_path / "job", 10, jobs[0], PATIENCE)
        agent_of(jobs[0]).kill()
    assert "restart 1 of 3" in logs[0].read_text()
    assert differences(undisturbed, tmp_path / "job") == []


def test_an_elastic_job_goes_on_without_one_host(
    hosts: Hosts, tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    with both_train(hosts, "1:2", tmp_path, digits, [0, 75]) as (jobs, logs):
        wait_until(
            lambda: "on each of 2 processes" in logs[0].read_text(), PATIENCE, "both are there"
        )
        wait_for_step(tmp_path / "job", 10, jobs[0], PATIENCE)
        jobs[1].send_signal(signal.SIGTERM)
        assert jobs[1].wait(PATIENCE) == 75
        assert current_step(tmp_path / "job") < STEPS
    assert "on each of 1 processes" in logs[0].read_text()
    assert differences(undisturbed, tmp_path / "job") == []


def engine_job(engine: str, rank: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The command of an engine's file and the environment of its `rank`-th node, on this host."""
    task = list(yaml.safe_load_all((LAUNCH / f"{engine}.yaml").read_text()))[-1]
    if engine == "skypilot":
        nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
        nodes |= {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
        nodes["SKYPILOT_TASK_ID"] = "sky-7"
        run = task["run"].replace(":29400", f":{port}").rstrip()
        return ["bash", "-c", f'{run} "$@"', "run"], task["envs"] | nodes
    if engine == "trainjob":
        part = task["spec"]["trainer"]
        nodes = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_NPROC_PER_NODE": "1"}
        nodes |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    else:
        part = task["spec"]["template"]["spec"]["containers"][0]
        nodes = {"JOB_COMPLETION_INDEX": str(rank), "NODE_RANK": str(rank), "NPROC": "1"}
        nodes["RDZV_ENDPOINT"] = f"127.0.0.1:{port}"
    own = {entry["name"]: entry["value"] for entry in part["env"] if "value" in entry}
    return [*part["command"], *part["args"]], own | nodes


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_own_command_trains_on_two_nodes(
    engine: str, tmp_path: Path, digits: Dataset, undisturbed: Path
) -> None:
    jobs, logs = [], [tmp_path / "log0", tmp_path / "log1"]
    port = free_port()
    for rank in (0, 1):
        command, environment = engine_job(engine, rank, port)
        environment |= {"RUN_DIR": str(tmp_path), "RUN_NAME": "job", "JOIN_TIMEOUT": "120"}
        arguments = [*command, *training(tmp_path, digits, NOTICE)]
        jobs.append(start(arguments, logs[rank], environment))
    finish(jobs, logs, [0, 0])
    assert differences(undisturbed, tmp_path / "job") == []
