"""The parts of `python -m tests.gpu`, each in a process of its own: PART OUT.json [key=value]."""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dist_resnet.data.stream import Batch
from dist_resnet.step.captured import as_configured
from dist_resnet.step.state import build_state
from dist_resnet.step.train_step import TrainStep
from tests.helpers.training import STATISTICS, rates, small_config

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPE = torch.bfloat16
SIDE = 32


class Found:
    """What a part has found so far, on disk at every moment."""

    def __init__(self, path: Path) -> None:
        self.path, self.facts = path, {}

    def __setitem__(self, name: str, value: Any) -> None:
        print(f"   {name}: {value}", flush=True)
        self.facts[name] = value
        self.path.write_text(json.dumps(self.facts, indent=1, default=str))

    @contextlib.contextmanager
    def attempt(self, name: str) -> Any:
        """A failure inside loses nothing but itself."""
        try:
            yield
        except Exception as error:
            self[name] = f"FAILED {type(error).__name__}: {str(error).strip()[:300]}"


def make(size: int, replicas: int, mode: str, *pairs: str, dtype: torch.dtype = DTYPE) -> Any:
    """The recipe's step on the device, and batches for it."""
    from dist_resnet.augment import Normalisation

    config = small_config(
        "model.widths=[16,32,64]", f"data.batch_size_per_replica={size}",
        f"train.step_mode={mode}", *pairs,
    )  # fmt: skip
    statistics_ = Normalisation(
        STATISTICS.mean[:3].repeat(SIDE).to(DEVICE), STATISTICS.scale[:3].repeat(SIDE).to(DEVICE)
    )
    state = build_state(config, 10, dtype, DEVICE)
    step = TrainStep(config, state, rates(5000), replicas, dtype, statistics_, (SIDE, SIDE), 10)
    generator = torch.Generator().manual_seed(1)
    count = size * replicas
    batches = [
        Batch(
            torch.randint(256, (count, SIDE, SIDE, 3), generator=generator).byte().to(DEVICE),
            torch.randint(10, (count,), generator=generator).to(DEVICE),
            torch.randperm(50_000, generator=generator)[:count].to(DEVICE),
        )
        for _ in range(8)
    ]
    return as_configured(step, lambda line: print("   told:", line, flush=True)), batches


def seconds_of(action: Callable[[int], None], steps: int, rounds: int = 5) -> float:
    """Median seconds of one call, over rounds of `steps` calls."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    found = []
    for number in range(5):
        action(number)
    wait()
    for _ in range(rounds):
        start = time.perf_counter()
        for number in range(steps):
            action(number)
        wait()
        found.append((time.perf_counter() - start) / steps)
    return statistics.median(found)


def speed(size: int, replicas: int, mode: str, *pairs: str, steps: int = 100) -> dict[str, float]:
    step, batches = make(size, replicas, mode, *pairs)
    steps = steps if CUDA else 2
    seconds = seconds_of(lambda n: step(batches[n % 8]), steps, 5 if CUDA else 1)
    return {"ms": 1e3 * seconds, "images_per_second": size * replicas / seconds}


def plain_loop(size: int, ddp: bool) -> Callable[[int], None]:
    """What everyone writes: torch's layers, autocast, channels-last, SGD; in DDP's wrapper."""
    from dist_resnet.models.resnet import resnet

    torch.manual_seed(0)
    config = small_config("model.widths=[16,32,64]")
    model: Any = resnet(config.model, 10).to(DEVICE).to(memory_format=torch.channels_last)
    if ddp:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0] if CUDA else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(size, 3, SIDE, SIDE, device=DEVICE)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (size,), device=DEVICE)

    def step(number: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, DTYPE):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def facts(found: Found, pairs: list[str]) -> None:
    """Machine and versions."""
    import triton

    found["python"], found["torch"] = platform.python_version(), torch.__version__
    found["triton"], found["cores"] = triton.__version__, os.cpu_count()
    if CUDA:
        found["gpu"] = str(torch.cuda.get_device_properties(0))
        found["cudnn"], found["nccl"] = torch.backends.cudnn.version(), torch.cuda.nccl.version()
        found["arch"] = torch.cuda.get_arch_list()
        found["mps"] = str(shutil.which("nvidia-cuda-mps-control"))
        with found.attempt("nvidia-smi"):
            done = subprocess.run(["nvidia-smi"], capture_output=True, text=True)
            found["nvidia-smi"] = [line for line in done.stdout.splitlines() if "Driver" in line]
    for library in ("ffcv", "wandb", "omegaconf", "scipy", "sklearn"):
        with found.attempt(library):
            __import__(library)
    if CUDA:
        x = torch.ones(32, device=DEVICE)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(400):
                x.add_(1)
        found["us a node, chain of 400"] = 1e6 * seconds_of(lambda n: graph.replay(), 50) / 400


def checks(found: Found, pairs: list[str]) -> None:
    """tests/gpu, a function a process: an error of the device lasts as long as its process."""
    source = (Path(__file__).parent / "test_cuda.py").read_text()
    names = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(5 if CUDA else 1) as pool:

        def run(name: str) -> None:
            target = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "tests.gpu.parts", "one_check", str(target), name]
            done = subprocess.run(command, capture_output=True, text=True)
            outcomes = json.loads(target.read_text()) if target.exists() else {}
            failed = {k: v for k, v in outcomes.items() if v["outcome"] == "failed"}
            found[name] = {
                "exit code": done.returncode,
                "passed": sum(v["outcome"] == "passed" for v in outcomes.values()),
                "skipped": sum(v["outcome"] == "skipped" for v in outcomes.values()),
                "failed": failed,
                "recorded": {k: v["facts"] for k, v in outcomes.items() if v["facts"]},
            }

        list(pool.map(run, names if CUDA else names[:1]))
    if any(row["exit code"] for row in found.facts.values()):
        raise SystemExit(1)


def one_check(found: Found, pairs: list[str]) -> None:
    """The cases of one test, each outcome as it comes."""
    import pytest

    class Outcomes:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                lines = [x for x in str(report.longrepr or "").splitlines() if x.strip()]
                errors = [x for x in lines if x.startswith("E ") or re.match(r"\S+:\d+:", x)]
                found[report.nodeid.split("::")[-1]] = {
                    "outcome": report.outcome,
                    "facts": dict(report.user_properties),
                    "reason": errors[:8] if report.outcome == "failed" else "",
                }

    where = f"{Path(__file__).parent / 'test_cuda.py'}::{pairs[0]}"
    raise SystemExit(pytest.main(["-q", "--no-header", "--tb=short", where], plugins=[Outcomes()]))


def group_of_one(**options: Any) -> None:
    """A process group that needs no port, which another script may have."""
    backend, store = "nccl" if CUDA else "gloo", torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, **options)


def times(found: Found, pairs: list[str]) -> None:
    """Images a second of the step alone, on batches in memory."""
    group_of_one()
    steps = 60 if CUDA else 1
    for size in (32, 1024) if CUDA else (32,):
        with found.attempt(f"plain DDP {size}"):
            seconds = seconds_of(plain_loop(size, ddp=True), steps, 5 if CUDA else 1)
            found[f"plain DDP {size}"] = {"ms": 1e3 * seconds, "images_per_second": size / seconds}
    torch.distributed.destroy_process_group()
    mode = "graph" if CUDA else "auto"
    torch.backends.cudnn.benchmark = True
    for size, replicas in ((32, 1), (32, 8), (1024, 1), (128, 1)) if CUDA else ((32, 1),):
        with found.attempt(f"{mode} {size}x{replicas}"):
            found[f"{mode} {size}x{replicas}"] = speed(size, replicas, mode)
    for keys in (("train.step_mode=eager",), ("optim.name=muon",), ("train.ema_decay=0.999",)):
        with found.attempt(keys[0]):
            found[keys[0]] = speed(32, 1, mode, *keys)
    with found.attempt("fp16"):
        step, batches = make(32, 1, mode, dtype=torch.float16 if CUDA else torch.float32)
        found["fp16 ms"] = 1e3 * seconds_of(lambda n: step(batches[n % 8]), steps)


def profile_(found: Found, pairs: list[str]) -> None:
    """The longest kernels of a replay, and the device's share of the time."""
    torch.backends.cudnn.benchmark = True
    for size, replicas in ((32, 1), (1024, 1)) if CUDA else ((32, 1),):
        step, batches = make(size, replicas, "graph" if CUDA else "auto")
        for number in range(8):
            step(batches[number])
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
        with profile(activities=activities) as profiler:
            start = time.perf_counter()
            for number in range(10 if CUDA else 1):
                step(batches[number % 8])
            if CUDA:
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
        kernels: dict[str, list[float]] = {}
        for event in profiler.events():
            if str(event.device_type).endswith("CUDA"):
                kernels.setdefault(event.name[:110], []).append(event.device_time)
        rows = sorted(((sum(v) / 10, len(v) / 10, k) for k, v in kernels.items()), reverse=True)
        name = f"{size}x{replicas}"
        found[f"{name} busy us, wall us, kernels"] = [
            sum(row[0] for row in rows), 1e5 * wall, sum(row[1] for row in rows)
        ]  # fmt: skip
        found[f"{name} kernels: us a step, calls, name"] = [
            f"{us:.1f} {calls:g} {kernel}" for us, calls, kernel in rows[:40]
        ]


def command(found: Found, pairs: list[str]) -> None:
    """The training command: to the end, stopped and resumed, diverging; both loaders."""
    with tempfile.TemporaryDirectory() as folder:
        mode = "graph" if CUDA else "auto"
        steps = 1500 if CUDA else 6
        common = [
            sys.executable, "-m", "dist_resnet.train", f"run.dir={folder}", "wandb.mode=disabled",
            f"train.step_mode={mode}", f"train.max_steps={steps}", "train.epochs=2", *pairs,
        ]  # fmt: skip
        small = [] if CUDA else ["data.dataset=digits", "data.batch_size_per_replica=32"]

        def train(name: str, *keys: str, stop_at: int | None = None) -> dict[str, Any]:
            run = Path(folder) / name
            start = time.monotonic()
            process = subprocess.Popen(
                [*common, *small, f"run.name={name}", *keys],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            stopped = None
            while process.poll() is None and time.monotonic() - start < 60:
                time.sleep(0.1)
                rows = run / "metrics.jsonl"
                if stop_at is not None and stopped is None and rows.exists():
                    lines = rows.read_text().splitlines()
                    if lines and json.loads(lines[-1])["step"] >= stop_at:
                        process.send_signal(signal.SIGTERM)
                        stopped = time.monotonic()
            process.kill()
            ended = time.monotonic()
            text = (process.stdout.read() if process.stdout else "").strip().splitlines()
            row: dict[str, Any] = {"exit": process.returncode, "seconds": round(ended - start, 1)}
            if stopped is not None:
                row["seconds from SIGTERM"] = round(ended - stopped, 1)
            if (run / "summary.json").exists():
                summary = json.loads((run / "summary.json").read_text())
                row |= {k: summary.get(k) for k in ("val/top1", "images_per_second", "step")}
            return row | {"last lines": text[-4:]}

        for name, loader in (("resident", "resident"), ("ffcv", "ffcv")):
            with found.attempt(name):
                found[name] = train(name, f"data.loader={loader}")
        keys = ("data.loader=resident", "log.every_steps=50" if CUDA else "log.every_steps=1")
        with found.attempt("stopped"):
            found["stopped"] = train("stopped", *keys, stop_at=300 if CUDA else 2)
            found["continued"] = train("stopped", *keys)
        with found.attempt("diverging"):
            found["diverging"] = train("diverging", "data.loader=resident", "optim.lr=1e9")


def nccl(found: Found, pairs: list[str]) -> None:
    """NCCL in a world of one: captured, replayed, and closed."""
    group_of_one(device_id=DEVICE if CUDA else None)
    x = torch.ones(280_000, device=DEVICE)
    torch.distributed.all_reduce(x)
    if CUDA:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            torch.distributed.all_reduce(x)
        found["us a replay"] = 1e6 * seconds_of(lambda n: graph.replay(), 50)
        graph.reset()
    start = time.monotonic()
    torch.distributed.destroy_process_group()
    found["seconds to close"] = time.monotonic() - start


def tuning(found: Found, pairs: list[str]) -> None:
    """What other sizes of the BatchNorm kernels would give."""
    from dist_resnet.kernels import norm_act

    if not CUDA:
        return
    torch.backends.cudnn.benchmark = True
    for tile in (1024, 2048, 4096, 8192):
        for programs in (32, 64, 128, 256):
            norm_act._TILE, norm_act._PROGRAMS = tile, programs
            with found.attempt(f"tile {tile} programs {programs}"):
                row = [speed(32, 1, "graph", steps=60)["ms"]]
                if tile >= 4096 and programs >= 128:
                    row.append(speed(1024, 1, "graph", steps=20)["ms"])
                found[f"tile {tile} programs {programs}: ms at 32, 1024"] = row


def spin(found: Found, pairs: list[str]) -> None:
    torch.backends.cudnn.benchmark = True
    step, batches = make(32, 1, "graph")
    found["images/s"] = 32 / seconds_of(lambda n: step(batches[n % 8]), 400, 8)


def sharing(found: Found, pairs: list[str]) -> None:
    """Several trainings on one card: without and with MPS."""
    if not CUDA:
        return

    def on_every_rank(count: int, environment: dict[str, str]) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{n}.json" for n in range(count)]
            processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "tests.gpu.parts", "spin", str(path)],
                    env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
                )
                for path in paths
            ]  # fmt: skip
            for process in processes:
                process.wait(timeout=60)
            return [json.loads(path.read_text())["images/s"] for path in paths]

    found["3 processes"] = on_every_rank(3, {})
    place = {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps", "CUDA_MPS_LOG_DIRECTORY": "/tmp/mps"}
    os.makedirs("/tmp/mps", exist_ok=True)
    daemon = subprocess.run(["nvidia-cuda-mps-control", "-d"], env={**os.environ, **place})
    found["mps"] = daemon.returncode
    try:
        found["3 processes, MPS"] = on_every_rank(3, place)
    finally:
        subprocess.run(
            ["nvidia-cuda-mps-control"], input="quit\n", text=True, env={**os.environ, **place}
        )


def main() -> None:
    """Run the part that the first argument names."""
    name, target, *rest = sys.argv[1:]
    pairs = [argument for argument in rest if argument != "--rehearse"]
    if not CUDA and "--rehearse" not in rest:
        raise SystemExit("no CUDA device here; --rehearse runs the parts on a CPU")
    part = {"profile": profile_}.get(name) or globals()[name]
    part(Found(Path(target)), pairs)


if __name__ == "__main__":
    main()
