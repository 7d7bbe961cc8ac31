"""What can be examined of one machine's GPUs."""

import itertools
import os

import torch

from dist_resnet.base.errors import UserError
from dist_resnet.config.schema import Config
from dist_resnet.doctor import Examination, Finding
from dist_resnet.machine.devices import cuda_count, driver, driver_cuda, why_unsupported

GIB = 1 << 30
_LITTLE = 2 * GIB
"""Free memory that ResNet-20 needs for CUDA's context, NCCL, cuDNN and a batch of 1,024."""


def usable_gpus(config: Config) -> int:
    """How many GPUs the processes would use; 0 where they cannot: `device_finding` says why."""
    try:
        return cuda_count(config.parallel.device)
    except UserError:
        return 0


def device_finding(config: Config, local_size: int) -> Finding:
    """What would be trained on, and whether it computes rightly.

    Raises:
        UserError: there are GPUs, and torch cannot use them.
    """
    count = cuda_count(config.parallel.device)
    if count == 0:
        return Finding("ok", "device", f"CPU, cores: {os.cpu_count()}")
    if local_size > count:
        remedy = f"start {count} and set parallel.replicas={local_size} for the same training"
        return Finding("FAIL", "device", f"{local_size} processes for {count} GPUs", remedy)
    kinds: dict[str, int] = {}
    for number in range(count):
        capability = torch.cuda.get_device_capability(number)
        if why := why_unsupported(capability, torch.cuda.get_arch_list()):
            text, _, remedy = why.partition("; ")
            return Finding("FAIL", "device", f"GPU {number}: {text}", remedy)
        probe = torch.ones(64, 64, device=torch.device("cuda", number))
        if (probe @ probe).sum().item() != 64**3:
            return Finding("FAIL", "device", f"GPU {number} computes wrongly", "replace it")
        kind = f"{torch.cuda.get_device_name(number)} (sm_{capability[0]}{capability[1]})"
        kinds[kind] = kinds.get(kind, 0) + 1
    text = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    return Finding("ok", "device", f"{text}; torch has {' '.join(torch.cuda.get_arch_list())}")


def gpu_examinations(count: int) -> dict[str, Examination]:
    """By subject, for `count` GPUs that torch can use."""
    return {
        "driver": driver_finding,
        "GPU memory": lambda: memory_finding(count),
        "peer access": lambda: peer_finding(count),
    }


def driver_finding() -> Finding:
    """The driver against the CUDA that torch was built for."""
    built, newest = torch.version.cuda, driver_cuda()
    text = f"{driver()}, torch was built for CUDA {built}"
    if built and newest and newest < tuple(map(int, built.split(".")[:2])):
        # CUDA's minor version compatibility: most works; what is compiled on the way may not.
        remedy = f"update it to one of CUDA {built} if train.step_mode=compile fails"
        return Finding("note", "driver", text, remedy)
    return Finding("ok", "driver", text)


def memory_finding(count: int) -> Finding:
    """Free memory of each GPU."""
    places = [torch.cuda.mem_get_info(number) for number in range(count)]
    number = min(range(count), key=lambda n: places[n][0])
    free, total = places[number]
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free on GPU {number}, the fullest"
    remedy = "end what `nvidia-smi` shows there, or choose others by CUDA_VISIBLE_DEVICES"
    if free < _LITTLE:
        return Finding("FAIL", "GPU memory", text, remedy)
    if free < total / 2:
        return Finding("note", "GPU memory", f"{text}: somebody else computes there", remedy)
    return Finding("ok", "GPU memory", text)


def peer_finding(count: int) -> Finding:
    """Whether the GPUs reach each other's memory without the host."""
    if count == 1:
        return Finding("ok", "peer access", "one GPU")
    pairs = list(itertools.permutations(range(count), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        text = f"{len(apart)} of {len(pairs)} pairs, such as GPUs {apart[0][0]} and {apart[0][1]},"
        text += " reach each other through the host only: slower"
        remedy = "compare `nvidia-smi topo -m`; an IOMMU or ACS, or a virtual machine, prevents it"
        return Finding("note", "peer access", text, remedy)
    return Finding("ok", "peer access", f"between all {count} GPUs")
