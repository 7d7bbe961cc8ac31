"""The sum in shared memory against NumPy, ranks as threads of one process, and its failures."""

import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_resnet.base.errors import UserError
from dist_resnet.native import build
from dist_resnet.native.shared_sum import SharedSum, shared_memory

ROUNDS = 40


@pytest.fixture(autouse=True)
def compiled() -> None:
    try:
        build.load("shared_sum")
    except UserError:
        pytest.skip("no C++ compiler")


def _shares(
    count: int, dtype: torch.dtype, processes: list[int], seconds: float = 20
) -> list[SharedSum]:
    descriptor, name = shared_memory(count, dtype, len(processes))
    path = f"/proc/self/fd/{descriptor}"
    try:
        return [
            SharedSum(path, name, count, dtype, rank, processes, seconds)
            for rank in range(len(processes))
        ]
    finally:
        os.close(descriptor)


@pytest.fixture
def ended() -> Iterator[int]:
    """A process that has ended and that nobody has waited for yet."""
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()  # to its end
        yield process.pid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("ranks", "count"), [(2, 274_000), (3, 1), (3, 17), (4, 4_099), (5, 64), (7, 1_001)]
)
def test_sums_in_the_order_of_the_ranks(ranks: int, count: int, dtype: torch.dtype) -> None:
    """Round after round with ranks that come at different times: none reads what is not there."""
    shares = _shares(count, dtype, [os.getpid()] * ranks)
    rng = np.random.default_rng(count)
    values = rng.standard_normal((ROUNDS, ranks, count)) * 10.0 ** rng.integers(-3, 4, (ranks, 1))
    terms = torch.from_numpy(values).to(dtype)

    def all_rounds(rank: int) -> list[np.ndarray]:
        pause, found = random.Random(rank), []
        for number in range(ROUNDS):
            if pause.random() < 0.2:
                time.sleep(pause.choice((0.0, 0.0001, 0.002)))
            tensor = terms[number, rank].clone()
            shares[rank](tensor)
            found.append(tensor.numpy())
        return found

    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(all_rounds, range(ranks)))
    for number in range(ROUNDS):
        expected = terms[number, 0].numpy().copy()
        for rank in range(1, ranks):
            expected += terms[number, rank].numpy()
        for rank in range(ranks):
            np.testing.assert_array_equal(results[rank][number], expected)
    assert [share.calls for share in shares] == [ROUNDS] * ranks


def test_goes_on_where_its_counter_begins_anew() -> None:
    """2^32 arrivals, 2^30 steps of two ranks: a year at 30 steps a second."""
    shares = _shares(5, torch.float32, [os.getpid()] * 2)
    for share in shares:
        share.calls = 2**30 - 2
        share._memory[:4] = (4 * share.calls).to_bytes(4, "little")

    def rounds(share: SharedSum) -> list[float]:
        found = []
        for number in range(4):
            tensor = torch.full((5,), float(number))
            share(tensor)
            found.append(float(tensor[4]))
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rounds, shares)) == [[0.0, 2.0, 4.0, 6.0]] * 2


def test_a_rank_that_has_ended_is_named(ended: int) -> None:
    share = _shares(10, torch.float32, [os.getpid(), os.getpid(), ended])[0]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 2 has ended"):
        share(torch.ones(10))
    assert time.monotonic() - began < 10  # of 20 s


def test_a_rank_that_does_not_come_is_not_waited_for_without_end() -> None:
    share = _shares(10, torch.float32, [os.getpid()] * 2, seconds=0.2)[0]
    with pytest.raises(RuntimeError, match=r"no answer in 0\.2 s"):
        share(torch.ones(10))


def test_another_shape_or_type_is_a_mistake_of_the_program() -> None:
    share = _shares(10, torch.float32, [os.getpid()])[0]
    for wrong in (torch.ones(11), torch.ones(10, dtype=torch.float64), torch.ones(20)[::2]):
        with pytest.raises(AssertionError):
            share(wrong)


def test_a_path_that_leads_to_another_file_is_not_written_to(tmp_path: Path) -> None:
    """As where processes of other containers have the same numbers."""
    descriptor, name = shared_memory(10, torch.float32, 1)
    os.close(descriptor)
    (tmp_path / "file").write_bytes(b"precious" * 100)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="is not /memfd:dist_resnet-"):
        SharedSum(str(tmp_path / "link"), name, 10, torch.float32, 0, [os.getpid()], 1)
    assert (tmp_path / "file").read_bytes() == b"precious" * 100


def test_no_descriptor_is_left_open() -> None:
    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    shares = _shares(10, torch.float32, [os.getpid()] * 3)
    assert opened() > before
    del shares
    assert opened() == before


@pytest.mark.parametrize("name", ["memfd_create", "pidfd_open"])
def test_what_python_lacks_is_an_error_to_fall_back_on(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delattr(os, name)
    with pytest.raises(OSError, match="this Python"):
        shared_memory(10, torch.float32, 2)
