"""Ranks and whole jobs killed at random moments: the run ends bit for bit like the undisturbed one.

Over the four cases: 25 killed ranks and 10 killed jobs, on real images.
"""

import random
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.chaos import disturbed_run, settings_for, undisturbed_run
from tests.jobs import differences


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("ranks", "dtype", "kills", "trees"),
    [(2, "fp32", 7, 3), (2, "bf16", 6, 3), (3, "fp32", 6, 2), (3, "bf16", 6, 2)],
)
def test_killed_runs_end_like_the_undisturbed_one(
    tmp_path: Path, cifar10: Dataset, ranks: int, dtype: str, kills: int, trees: int
) -> None:
    data = cifar10.folder
    extra = [f"precision.dtype={dtype}"]
    plain = settings_for(tmp_path, "undisturbed", data.parent, data.name, extra)
    undisturbed_run(tmp_path, "undisturbed", ranks, plain)
    base = settings_for(tmp_path, "disturbed", data.parent, data.name, extra)
    disturbed_run(tmp_path, base, [ranks], kills, trees, random.Random(f"{ranks} {dtype}"))
    assert differences(tmp_path / "undisturbed", tmp_path / "disturbed") == []
