"""Which GPUs may be used: CUDA is played by stubs, so that all of it is seen without a GPU."""

from pathlib import Path

import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.distributed import group
from dist_resnet.machine import devices
from dist_resnet.machine.devices import cuda_count, why_unsupported

WHEELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.14 for CUDA 13.0


class Machine:
    """What torch sees: `nvml` GPUs, of which CUDA can use `usable`; a driver for CUDA `driver`."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.nvml, self.usable = 0, 0
        self.driver: tuple[int, int] | None = (12, 2)
        self.started = False
        self.places: list[int] = []
        self.capability = (9, 0)
        self.control, module = folder / "nvidiactl", folder / "version"
        module.write_text(
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC\n"
        )
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setattr(devices, "_CONTROL", self.control)
        patch.setattr(devices, "_MODULE", module)
        patch.setattr(devices, "driver_cuda", lambda: self.driver)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: self.usable > 0)
        patch.setattr(torch.cuda, "init", self._init)
        patch.setattr(
            torch.cuda, "device_count", lambda: self.usable if self.started else self.nvml
        )
        patch.setattr(torch.cuda, "set_device", self.places.append)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: self.capability)
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla V100")
        patch.setattr(torch.cuda, "get_arch_list", lambda: WHEELS)

    def _init(self) -> None:
        if not self.usable:
            raise RuntimeError("Error 802: system not yet initialized\n(and where)")
        self.started = True


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def refused(wanted: str) -> str:
    with pytest.raises(UserError) as caught:
        cuda_count(wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_gpu_is_a_cpu(machine: Machine) -> None:
    assert cuda_count("auto") == cuda_count("cpu") == 0
    assert "no CUDA device here; use parallel.device=cpu" in refused("cuda")


@pytest.mark.parametrize("evidence", ["nvml", "nvidiactl"])
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_gpus_under_too_old_a_driver_are_no_silent_cpu(
    machine: Machine, evidence: str, wanted: str
) -> None:
    if evidence == "nvml":
        machine.nvml = 8
    else:
        machine.control.touch()
    line = refused(wanted)
    assert line.startswith(f"parallel.device={wanted}: there are GPUs, but their driver")
    for part in ("535.104.05 (CUDA 12.2)", torch.__version__, "(CUDA 13.0)", "update the driver"):
        assert part in line
    assert "whl/cu126 make setup" in line
    assert line.endswith("or set parallel.device=cpu")
    with pytest.raises(UserError, match="too old"):
        group.start(wanted, 10)
    assert cuda_count("cpu") == 0
    assert group.start("cpu", 10).device.type == "cpu"


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_a_cpu_without_a_word(
    machine: Machine, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.control.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cuda_count("auto") == 0
    assert f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs" in refused("cuda")


def test_a_gpu_that_is_named_and_not_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.control.touch()
    machine.driver = (13, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert "(CUDA_VISIBLE_DEVICES=9)" in refused("auto")


def test_what_else_keeps_cuda_from_starting_is_told(machine: Machine) -> None:
    machine.nvml, machine.driver = 8, (13, 1)
    line = refused("auto")
    assert "Error 802: system not yet initialized; compare `nvidia-smi`" in line
    assert "535.104.05 (CUDA 13.1)" in line


def test_a_torch_without_cuda(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.control.touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA; install one that has it" in refused("auto")


def test_mig_parts_count_as_cuda_counts_them(machine: Machine) -> None:
    """Of several GPUs in MIG mode CUDA gives a process one part; NVML counts the GPUs."""
    machine.nvml, machine.usable = 4, 1
    assert cuda_count("auto") == cuda_count("cuda") == 1


def test_each_rank_takes_its_own_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.nvml = machine.usable = 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert group.start("auto", 10).device == torch.device("cuda", 1)
    assert machine.places == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes for 2 GPUs"):
        group.start("auto", 10)


def test_a_gpu_that_torch_has_no_code_for_is_refused(machine: Machine) -> None:
    machine.nvml = machine.usable = 1
    machine.capability = (7, 0)
    with pytest.raises(UserError, match=r"GPU 0 \(Tesla V100\): this GPU is sm_70, .*whl/cu126"):
        group.start("auto", 10)


def test_a_gpu_that_is_taken_is_one_line(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: int) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy\nCompile with ...")

    machine.nvml = machine.usable = 1
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(UserError, match=r"^GPU 0 cannot be used: .* busy; `nvidia-smi` shows.*$"):
        group.start("auto", 10)


@pytest.mark.parametrize(
    ("capability", "architectures", "remedy"),
    [
        ((7, 5), WHEELS, None),
        ((8, 9), WHEELS, None),  # code for 8.6 runs on it
        ((12, 1), WHEELS, None),
        ((7, 0), WHEELS, "a torch for CUDA 12.6"),
        ((6, 1), WHEELS, "a torch for CUDA 12.6"),
        ((11, 0), WHEELS, "a newer torch, built for a CUDA that knows sm_110"),
        ((13, 0), WHEELS, "a newer torch"),
        ((13, 0), [*WHEELS, "compute_120"], None),  # translated when it is loaded
        ((9, 0), ["sm_80", "sm_90a"], None),
        ((10, 0), ["sm_80", "sm_90a"], "a newer torch"),
        ((10, 3), ["sm_80", "sm_100f"], None),
        ((12, 0), ["sm_80", "compute_90a"], "a newer torch"),
        ((9, 0), [], None),
        ((9, 0), ["gfx90a"], None),
    ],
)
def test_capability_and_arch_list(
    capability: tuple[int, int], architectures: list[str], remedy: str | None
) -> None:
    """CUDA's rules: a cubin runs on its major version from its minor one on, PTX on all later."""
    why = why_unsupported(capability, architectures)
    assert (why is None) == (remedy is None), why
    if why is not None and remedy is not None:
        assert f"sm_{capability[0]}{capability[1]}" in why.partition("; ")[0]
        assert remedy in why.partition("; ")[2]
