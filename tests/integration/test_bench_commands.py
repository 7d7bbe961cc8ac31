"""Every benchmark, as a user types it, on the embedded digits."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from dist_resnet.bench.workers import Job, JobFailed, Worker
from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import ROOT

PAIRS = ("data.dataset=digits", "model.widths=[8,10,12]", "data.batch_size_per_replica=8")


def bench(name: str, data: Dataset, place: Path, *more: str) -> tuple[dict[str, Any], str]:
    """Its JSON and its terminal. FFCV compiles for seconds in each process: in test_loader only."""
    loader = [] if name == "loader" else ["data.loader=resident"]
    result = subprocess.run(
        [
            sys.executable, "-m", "dist_resnet.bench", name, "--quick", "--force",
            "--rounds", "1",
            "--json", str(place / "a.json"), "--plot", str(place / "a.svg"),
            f"data.root={data.folder.parent}", "parallel.threads=1", *loader, *more,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    found = json.loads((place / "a.json").read_text())
    assert found["kind"] == f"bench/{name}"
    facts = found["facts"]
    assert facts["command"].startswith(f"python -m dist_resnet.bench {name} --quick")
    assert str(place) not in json.dumps(found)
    assert {"versions", "hardware", "commit", "other_load_cores"} <= facts.keys()
    assert ET.parse(place / "a.svg").getroot().tag.endswith("svg")
    return found, result.stdout


def rows(found: dict[str, Any], table: str) -> list[dict[str, Any]]:
    chosen = [row for row in found["rows"] if row["table"] == table]
    assert chosen, f"no table {table}"
    return chosen


def failures(found: dict[str, Any]) -> list[str]:
    """All but those of packages that need not be there."""
    said = [f"{row['name']}: {row['failure']}" for row in found["rows"] if "failure" in row]
    return [text for text in said if not re.search(r"not installed|No module named", text)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_loader(digits: Dataset, tmp_path: Path) -> None:
    found, text = bench("loader", digits, tmp_path, "data.loader=resident")
    assert failures(found) == []
    speeds = rows(found, "images per second")
    assert len(speeds) == 7
    assert all(row["ratio"] > 0 and row["ratio_to"].startswith("torchvision") for row in speeds)
    assert "torchvision, 2 workers" in text
    assert "- data.loader: set by bench loader itself, not as given" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_step(digits: Dataset, tmp_path: Path) -> None:
    found, _ = bench("step", digits, tmp_path)
    assert failures(found) == []
    assert all(row["percent_of_limit"] > 0 for row in rows(found, "modes"))
    parts = rows(found, "step by parts")
    assert sum(row["percent"] for row in parts) == pytest.approx(200)  # the parts, and the whole


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_startup(digits: Dataset, tmp_path: Path) -> None:
    found, _ = bench("startup", digits, tmp_path, "--rounds=1")
    assert failures(found) == []
    seconds = [row["seconds"] for row in rows(found, "seconds to the first step")]
    assert len(seconds) == 3
    assert min(seconds) > 0  # which is the longest, other work beside them may decide


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train(digits: Dataset, tmp_path: Path) -> None:
    found, _ = bench("train", digits, tmp_path)
    assert failures(found) == []
    speeds = rows(found, "end to end")
    assert {row["ranks"] for row in speeds} == {1, 2}
    assert len(rows(found, "ratios")) == 4
    assert len(rows(found, "share of loader, augmentation, logging and W&B")) == 2
    assert all("DDP" not in row["ratio_to"] for row in speeds)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scaling(digits: Dataset, tmp_path: Path) -> None:
    found, _ = bench("scaling", digits, tmp_path)
    assert failures(found) == []
    assert len(rows(found, "measured")) == 3
    assert [row["name"] for row in rows(found, "all-reduce")] == [
        "2 ranks, as in a step",
        "2 ranks, by a collective",
    ]
    # Five a turn; what warmed up is not counted.
    calls = [row["calls"] for row in rows(found, "all-reduce")]
    assert calls == [5 * found["settings"]["rounds"]] * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_peers(digits: Dataset, tmp_path: Path) -> None:
    found, _ = bench("peers", digits, tmp_path, "--rounds=1")
    assert failures(found) == []
    overhead = {(row["name"], row["ranks"]) for row in rows(found, "overhead, tiny model")}
    assert {("ours", 1), ("ours", 2), ("bare loop", 1), ("bare loop", 2)} <= overhead


@pytest.mark.slow
def test_a_worker_that_fails_or_dies_says_so(digits: Dataset) -> None:
    """Failed in Python, aborted by some library, killed from outside."""
    place = (f"data.root={digits.folder.parent}", "data.loader=resident", "parallel.threads=1")
    aborts = (*PAIRS, *place, "model.name=tests.helpers.nets:aborts")
    jobs = [
        Job(name, "peer_loops:train", 1, ranks, pairs, {"framework": name, "steps": 1})
        for name, ranks, pairs in (
            ("Nothing", 2, (*PAIRS, *place)),
            ("bare loop", 1, aborts),
            ("bare loop", 1, (*PAIRS, *place)),
        )
    ]
    failing, aborting, dying = workers = [Worker(job) for job in jobs]
    try:
        with pytest.raises(JobFailed, match=r"^KeyError: 'Nothing'$"):
            failing.finish()
        with pytest.raises(JobFailed, match=r"^died \(exit code -6\): what\(\):  out of luck$"):
            aborting.finish()
        dying.finish()
        dying.run()
        next(iter(dying._ranks.values())).kill()
        with pytest.raises(JobFailed, match=r"^died \(exit code -9\)"):
            dying.run()
    finally:
        for worker in workers:
            worker.close()
