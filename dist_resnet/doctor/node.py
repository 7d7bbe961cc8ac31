"""What can be examined on one machine alone."""

import contextlib
import importlib.util
import io
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dist_resnet.base.launcher import under_torchrun
from dist_resnet.base.paths import user_path
from dist_resnet.config.builtins import DATASETS
from dist_resnet.config.schema import Config
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.prepare import prepare
from dist_resnet.data.sources.embedded import load_synthetic
from dist_resnet.data.stream import open_loader
from dist_resnet.distributed.group import backends
from dist_resnet.doctor import Examination, Finding, examine
from dist_resnet.doctor.gpu import device_finding, gpu_examinations, usable_gpus
from dist_resnet.machine.environment import versions
from dist_resnet.step.precision import choose_precision
from dist_resnet.tracking.wandb_reach import wanted_mode
from dist_resnet.training.session import choose_threads

MIB = 1 << 20
OLDEST_TORCH = (2, 6)
"""As in pyproject.toml. What was run with which torch: docs/usage.md, "Versions"."""
_SAFE_TORCH = (2, 10)
_PREPARE = "python -m dist_resnet.data.prepare"


def node_findings(config: Config, local_size: int) -> Iterator[Finding]:
    """Examine this machine for `local_size` processes."""
    gpus = usable_gpus(config)
    examinations: dict[str, Examination] = {
        "torch": _torch,
        "device": lambda: device_finding(config, local_size),
        **(gpu_examinations(gpus) if gpus else {}),
        "precision": lambda: _precision(config, gpus),
        "collectives": lambda: _collectives(gpus),
        "ffcv": _ffcv,
        "dataset": lambda: _dataset(config),
        "wandb": lambda: _wandb(config),
        "disk": lambda: _disk(user_path(config.run.dir)),
        "shared memory": lambda: _shared_memory(gpus, local_size),
        "threads": lambda: _threads(config, local_size),
    }
    for subject, action in examinations.items():
        yield examine(subject, action)


def _torch() -> Finding:
    found = versions()
    text = f"{torch.__version__}, Python {found['python']}"
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return Finding("FAIL", "torch", text, f"needs {wanted} or newer: run `make setup`")
    if numbers < _SAFE_TORCH:  # CVE-2026-24747
        text += ": a manipulated checkpoint can take over the process that reads it"
        return Finding("note", "torch", text, "read only your own, or install 2.10 or newer")
    return Finding("ok", "torch", text)


def _precision(config: Config, gpus: int) -> Finding:
    _, reason = choose_precision(config.precision.dtype, torch.device("cuda" if gpus else "cpu"))
    return Finding("ok", "precision", reason)


def _collectives(gpus: int) -> Finding:
    found = backends()
    needed = "nccl" if gpus else "gloo"
    text = f"torch was built with {' and '.join(found) or 'none'}"
    if gpus and needed in found:
        text += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if needed not in found:
        return Finding("FAIL", "collectives", text, f"install a torch that has {needed}")
    if under_torchrun() and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        remedy = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as launch/run.sh does"
        return Finding("note", "collectives", f"{text}; torchrun cannot restart ranks", remedy)
    return Finding("ok", "collectives", text)


def _ffcv() -> Finding:
    """Write a small data set and read it back through FFCV."""
    images = load_synthetic(48, 16, classes=4, size=16, seed=1)
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet:
        dataset = prepare(images, Path(folder) / "probe", "synthetic", "probe")
        loader = open_loader("ffcv", dataset.train_path, 16, torch.device("cpu"))
        wanted = np.arange(32)[::-1].copy()
        # A batch may be overwritten by the next one.
        read = [(x.numpy().copy(), y.numpy().copy()) for x, y in loader.batches(wanted)]
    pixels, labels = map(np.concatenate, zip(*read, strict=True))
    right = np.array_equal(pixels, np.asarray(images.train.images)[wanted])
    right &= np.array_equal(labels.reshape(-1), images.train.labels[wanted])
    text = f"{versions().get('ffcv', '?')}, 32 images written and read back"
    if not right:
        return Finding("FAIL", "ffcv", f"{text}: not the same", "run `make setup` again")
    return Finding("ok", "ffcv", text)


def _dataset(config: Config) -> Finding:
    name, folder = config.data.dataset, user_path(config.data.root) / config.data.dataset
    if not Dataset.exists(folder):
        source, own = name, config.data.source
        if own is not None:
            source = f"source {shlex.quote(own)} --name {shlex.quote(name)}"
        command = f"{_PREPARE} {source} --output {shlex.quote(config.data.root)}"
        text = f"{folder} is not there"
        if not own and name not in DATASETS:
            remedy = f"prepare it: {_PREPARE} --help; or set data.root"
            return Finding("FAIL", "dataset", text, remedy)
        place = next(p for p in folder.absolute().parents if p.exists())
        if why := _why_not_writable(place):
            text += f", and {place} cannot be written ({why})"
            return Finding("FAIL", "dataset", text, "set data.root to a folder where it can be")
        text += " yet; the first training prepares it"
        return Finding("note", "dataset", text, f"or do it now: {command}")
    data = Dataset.load(folder, verify=True)
    text = f"{folder}: {data.num_train:,} + {data.num_test:,} images, checksums right"
    return Finding("ok", "dataset", f"{text}, fingerprint {data.fingerprint[:12]}")


def _wandb(config: Config) -> Finding:
    mode, asked = wanted_mode(config.wandb.mode)
    if mode in ("disabled", "offline"):
        return Finding("ok", "wandb", f"{mode}, as asked by {asked}")
    if importlib.util.find_spec("wandb") is None:
        remedy = "run `make setup`, or set wandb.mode=disabled"
        return Finding("FAIL", "wandb", "not installed", remedy)
    from dist_resnet.tracking.wandb_reach import why_unreachable
    from dist_resnet.tracking.wandb_session import why_no_credentials

    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    why = why_no_credentials(server) or why_unreachable(server)
    if why is None:
        return Finding("ok", "wandb", f"{versions().get('wandb', '?')}, online at {server}")
    remedy = "for online records: wandb login, or set WANDB_API_KEY; else wandb.mode=offline"
    return Finding("FAIL" if mode == "online" else "note", "wandb", f"offline: {why}", remedy)


def _disk(folder: Path) -> Finding:
    if why := _why_not_writable(folder):
        text = f"{folder.resolve()} cannot be written: {why}"
        return Finding("FAIL", "disk", text, "make room or get the right to write; or set run.dir")
    free = shutil.disk_usage(folder).free
    text = f"{folder.resolve()}: writable, {free / (1 << 30):,.1f} GiB free"
    if free < 256 * MIB:
        return Finding("FAIL", "disk", text, "make room, or set run.dir to a larger disk")
    return Finding("ok", "disk", text)


def _why_not_writable(folder: Path) -> str | None:
    """Tried, not asked: what the rights allow to root, a read-only mount may still forbid."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(MIB))
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def _shared_memory(gpus: int, local_size: int) -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("note", "shared memory", "no /dev/shm", "ranks talk more slowly without it")
    size = shutil.disk_usage(place).free
    text = f"{size / MIB:,.0f} MiB free in /dev/shm"
    # NCCL takes about 10 MiB for each pair of neighbours and channel; Docker gives 64 MiB in all.
    if gpus and local_size > 1 and size < 64 * MIB * local_size:
        remedy = "docker run --shm-size=1g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
        return Finding("FAIL", "shared memory", text, remedy)
    return Finding("ok", "shared memory", text)


def _threads(config: Config, local_size: int) -> Finding:
    cores = len(os.sched_getaffinity(0))
    threads = choose_threads(config, local_size)
    text = f"cores: {cores}, processes: {local_size}, threads of each: {threads}"
    quota = cpu_quota()
    if quota and quota < 0.9 * local_size * threads:
        text += f", but the container may use only {quota:g}"
        remedy = f"set parallel.threads={max(1, int(quota) // local_size)}, or raise its CPU limit"
        return Finding("FAIL", "threads", text, remedy)
    if local_size * threads > cores:
        remedy = "set parallel.threads, or start fewer processes and set parallel.replicas"
        return Finding("FAIL", "threads", text, remedy)
    return Finding("ok", "threads", text)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that this process's control group may use; None: as many as there are."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limits = [int((root / "cpu" / f"cpu.cfs_{n}_us").read_text()) for n in ("quota", "period")]
    except (OSError, ValueError):
        return None
    return None if limits[0] < 0 else limits[0] / limits[1]
