"""Whether torchrun can keep each process on the cores beside its GPU (--numa-binding)."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_SYS = Path("/sys")
UNNEEDED = "unneeded"


def why_not_bound(gpus: int) -> str:
    """Why the processes of `gpus` GPUs cannot be bound; empty: they can; or `UNNEEDED`.

    torchrun asks for the same things, and ends with a traceback where one is missing.
    """
    nodes = list((_SYS / "devices/system/node").glob("node[0-9]*"))
    if gpus == 0 or len(nodes) < 2:
        return UNNEEDED
    if find_spec("torch.numa") is None:
        return f"torch {torch.__version__} has none, 2.9 and newer have"
    if shutil.which("numactl") is None:
        return "numactl is not installed"
    allowed = os.sched_getaffinity(0)
    for number in range(gpus):
        try:
            node = _node_of(number)
            cores = _numbers((_SYS / f"devices/system/node/node{node}/cpulist").read_text())
        except (OSError, ValueError):
            return f"the NUMA node of GPU {number} is not known"
        if not cores & allowed:
            return f"no core beside GPU {number} is this job's"
    return ""


def _node_of(number: int) -> int:
    gpu: Any = torch.cuda.get_device_properties(number)
    place = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    return max(0, int((_SYS / f"bus/pci/devices/{place}/numa_node").read_text()))


def _numbers(ranges: str) -> set[int]:
    """Of 0-2,5: 0, 1, 2 and 5."""
    found: set[int] = set()
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
