"""A full GPU is one line that names a batch which would fit; CUDA's figures are played."""

from pathlib import Path

import pytest
import torch

from dist_resnet.base.errors import EXIT_USER, OutOfMemory
from dist_resnet.config.load import load_config
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import World
from dist_resnet.machine.gpu_memory import GIB, batch_that_fits, explaining_memory, requested_bytes
from dist_resnet.runs.folder import RunFolder
from dist_resnet.training import run

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.10 GiB of"
    " which 1.00 GiB is free. Process 7 has 78.10 GiB memory in use.\nSee documentation ..."
)


@explaining_memory
def train(config: Config, message: str) -> None:
    raise torch.OutOfMemoryError(message)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """GiB of the second GPU."""
    figures = {"free": 1.0, "total": 80.0, "reserved": 78.5, "peak": 77.5}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        cuda, "mem_get_info", lambda _: (int(figures["free"] * GIB), int(figures["total"] * GIB))
    )
    monkeypatch.setattr(cuda, "memory_reserved", lambda _: int(figures["reserved"] * GIB))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda _: int(figures["peak"] * GIB))
    return figures


def line(*pairs: str) -> str:
    with pytest.raises(OutOfMemory) as caught:
        train(load_config(pairs), MESSAGE)
    assert caught.value.exit_code == EXIT_USER
    assert caught.value.of_one_rank
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_batch_that_fits_is_named(held: dict[str, float]) -> None:
    told = line("data.batch_size_per_replica=8192")
    assert told == (
        "GPU 1 is out of memory: 2.50 GiB more beside the 77.50 of 80.0 GiB that this process"
        " holds; by estimate data.batch_size_per_replica=4096 would fit"
    )
    assert "=4096 or data.loader=ffcv would" in line(
        "data.batch_size_per_replica=8192", "data.loader=resident"
    )
    assert "smaller model" in line("data.batch_size_per_replica=1")


def test_so_ends_a_run(
    held: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(run, "find_checkpoint", full)  # what a run does first stands for all of it
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(OutOfMemory, match=r"data\.batch_size_per_replica=16 would fit"):
        run._run_in(load_config([]), (), alone, RunFolder(tmp_path))


def test_memory_of_others_is_no_reason_for_a_smaller_batch(held: dict[str, float]) -> None:
    held |= {"reserved": 20.0, "peak": 19.0}
    assert "other processes hold 59.0: see `nvidia-smi`" in line()


@pytest.mark.parametrize(
    ("batch", "needed", "available", "fits"),
    [
        (1024, 100, 99, 512),
        (1000, 100, 99, 512),
        (1024, 400, 99, 128),  # 253 would: the power of two below it
        (33, 100, 99, 32),
        (2, 100, 99, 1),
        (1, 100, 99, 0),
        (64, 6400, 99, 0),
        (64, 0, 99, 32),
    ],
)
def test_the_estimate(batch: int, needed: int, available: int, fits: int) -> None:
    assert batch_that_fits(batch, needed, available) == fits


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("20.00 MiB", 20 << 20), ("1.50 GiB", 3 << 29), ("512 bytes", 512), ("2.00 KiB", 2048)],
)
def test_what_was_asked_for(text: str, wanted: int) -> None:
    error = torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {text}. GPU 0 ...")
    assert requested_bytes(error) == wanted
    assert requested_bytes(torch.OutOfMemoryError("CUDA error: out of memory")) == 0
