"""What can be examined only by several processes together."""

import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.schema import Config
from dist_resnet.data.dataset import Dataset
from dist_resnet.distributed.group import World, all_reduce_sum, gather_objects, gather_rows
from dist_resnet.doctor import Finding, examine
from dist_resnet.machine.environment import git_commit, versions

SMALL, MODEL, LARGE = 4, 1_080_000, 16 << 20
"""Bytes: one number; the gradients of ResNet-20; what shows the network's bandwidth."""
SLOW_SECONDS = 0.02
SKEW_SECONDS = 5.0
_ROUNDS = 8  # the clocks are compared so often
_MISSING = "missing"
_WIRES = "name the job's network with IFNAME=eth0 (launch/run.sh)"


@dataclass(frozen=True)
class Facts:
    """What every rank tells about itself."""

    place: str
    versions: dict[str, str]
    commit: str
    fingerprint: str


def network_findings(config: Config, world: World) -> list[Finding]:
    """Examine the processes together; to be called by all of them, who get the same findings."""
    facts = gather_objects(_facts(config, world))
    return [
        _world_finding(world, facts),
        *all_reduce_findings(world),
        examine("clocks", lambda: skew_finding([f.place for f in facts], clock_offsets(world))),
        versions_finding(facts),
        same_finding("source", [(f.place, f.commit) for f in facts], "use the same commit on all"),
        dataset_finding(facts),
    ]


def _facts(config: Config, world: World) -> Facts:
    folder = user_path(config.data.root) / config.data.dataset
    try:
        fingerprint = Dataset.load(folder, verify=False).fingerprint[:12]
    except (UserError, OSError):  # what is wrong with it is in its node's own line
        fingerprint = _MISSING
    place = f"rank {world.rank} on {socket.gethostname()}"
    return Facts(place, versions(), git_commit() or "unknown", fingerprint)


def _world_finding(world: World, facts: Sequence[Facts]) -> Finding:
    hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    return Finding("ok", "processes", f"{len(facts)}, nodes: {hosts}, connected by {backend}")


def all_reduce_findings(world: World) -> list[Finding]:
    """Is a sum right, and how long does it take?"""
    probe = torch.full((1,), float(world.rank + 1), device=world.device)
    all_reduce_sum(probe)
    if probe.item() != world.size * (world.size + 1) / 2:
        text = f"the sum over the ranks is {probe.item():g}: wrong"
        return [Finding("FAIL", "all-reduce", text, "try other hosts; memory or network is bad")]
    small, model, large = (all_reduce_seconds(world, size) for size in (SMALL, MODEL, LARGE))
    # Each rank sends and receives 2 (n - 1) / n of the buffer, whatever the algorithm.
    rate = 2 * (world.size - 1) / world.size * LARGE / large / 1e9
    text = (
        f"{small * 1e6:,.0f} us for one number, {model * 1e3:.2f} ms for the gradients of"
        f" ResNet-20, {rate:.2f} GB/s"
    )
    if model > SLOW_SECONDS:
        return [Finding("note", "all-reduce", f"{text}: slow", _WIRES)]
    return [Finding("ok", "all-reduce", text)]


def all_reduce_seconds(world: World, size: int) -> float:
    """Median over repetitions of the slowest rank's time for a float32 buffer of `size` bytes."""
    buffer = torch.zeros(max(1, size // 4), device=world.device)
    times = []
    for repetition in range(3 + (10 if size > MODEL else 30)):
        began = time.perf_counter()
        all_reduce_sum(buffer)
        if buffer.is_cuda:
            torch.cuda.synchronize()
        if repetition >= 3:  # the first ones build connections
            times.append(time.perf_counter() - began)
    slowest = gather_rows(torch.tensor([statistics.median(times)], device=world.device))
    return float(slowest.max())


def clock_offsets(world: World) -> list[float]:
    """Seconds by which each rank's clock is ahead of rank 0's, to within an all-reduce."""
    best: list[float] = []
    signal = torch.zeros(1, device=world.device)
    for _ in range(_ROUNDS):
        all_reduce_sum(signal)
        signal.item()  # all leave the sum at about the same moment
        times = gather_rows(torch.tensor([time.time()], dtype=torch.float64, device=world.device))
        offsets = (times - times[0]).tolist()
        if not best or max(map(abs, offsets)) < max(map(abs, best)):
            best = offsets
    return best


def skew_finding(places: Sequence[str], offsets: Sequence[float]) -> Finding:
    """Judge the clocks."""
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    text = f"at most {abs(offsets[worst]) * 1e3:,.1f} ms apart"
    if abs(offsets[worst]) > SKEW_SECONDS:
        text = f"{places[worst]} is {offsets[worst]:+,.1f} s off rank 0's"
        return Finding("FAIL", "clocks", text, "run an NTP client (chrony) on every node")
    return Finding("ok", "clocks", text)


def versions_finding(facts: Sequence[Facts]) -> Finding:
    """The same Python and packages everywhere?"""
    for name in sorted({name for f in facts for name in f.versions}):
        values = [(f.place, f.versions.get(name, "missing")) for f in facts]
        finding = same_finding(name, values, "run `make setup` from the same checkout on all")
        if finding.level == "FAIL":
            return finding
    return Finding("ok", "same versions", f"{len(facts[0].versions)} packages")


def dataset_finding(facts: Sequence[Facts]) -> Finding:
    """The same dataset everywhere?"""
    subject, remedy = "same dataset", "copy the prepared folder (data.root) of one node to all"
    if all(f.fingerprint == _MISSING for f in facts):
        return Finding("note", subject, "there is none yet: nothing to compare", f"later {remedy}")
    values = [(f.place, f.fingerprint) for f in facts]
    return same_finding(subject, values, f"{remedy}, or share it")


def same_finding(subject: str, values: Sequence[tuple[str, str]], remedy: str) -> Finding:
    """Whether all (place, value) agree, and who does not."""
    first = values[0]
    other = next((entry for entry in values if entry[1] != first[1]), None)
    if other is not None:
        text = f"{first[1]} at {first[0]}, but {other[1]} at {other[0]}"
        return Finding("FAIL", subject, text, remedy)
    return Finding("ok", subject, f"{first[1]} everywhere")
