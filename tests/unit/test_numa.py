"""When torchrun can bind processes to the cores beside their GPUs; /sys and CUDA are played."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_resnet.machine import numa
from dist_resnet.machine.numa import UNNEEDED, why_not_bound


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two nodes of four cores; GPU 0 is beside the first, GPU 1 beside the second."""
    for node, (cores, bus) in enumerate((("0-1,4-5", "1b"), ("2-3,6-7", "dc"))):
        place = tmp_path / f"devices/system/node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cores}\n")
        gpu = tmp_path / f"bus/pci/devices/0000:{bus}:00.0"
        gpu.mkdir(parents=True)
        (gpu / "numa_node").write_text(f"{node}\n")
    monkeypatch.setattr(numa, "_SYS", tmp_path)
    monkeypatch.setattr(numa, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda n: SimpleNamespace(
            pci_domain_id=0, pci_bus_id=(0x1B, 0xDC)[n], pci_device_id=0, name="H100"
        ),
    )
    return tmp_path


def test_two_nodes_can_be_bound(machine: Path) -> None:
    assert why_not_bound(2) == ""


def test_one_node_or_no_gpu_needs_none(machine: Path) -> None:
    assert why_not_bound(0) == UNNEEDED
    shutil.rmtree(machine / "devices/system/node/node1")
    assert why_not_bound(2) == UNNEEDED


def test_what_is_missing_is_said(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert why_not_bound(2) == "no core beside GPU 1 is this job's"
    (machine / "bus/pci/devices/0000:dc:00.0/numa_node").unlink()
    assert why_not_bound(2) == "the NUMA node of GPU 1 is not known"
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert why_not_bound(2) == "numactl is not installed"
    monkeypatch.setattr(numa, "find_spec", lambda _: None)
    assert "2.9 and newer" in why_not_bound(2)
