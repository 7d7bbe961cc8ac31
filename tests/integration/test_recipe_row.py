"""A row of docs/recipes.md, repeated by its command."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from dist_resnet.recipes.kept import condense
from tests.jobs import ROOT

KEPT = ROOT / "benchmarks" / "runs" / "digits-short.json"


@pytest.mark.timeout(300)
def test_a_row_is_what_its_command_gives(digits: Dataset, tmp_path: Path) -> None:
    kept = json.loads(KEPT.read_text())
    torchrun, *rest = shlex.split(kept["command"])
    assert torchrun == "torchrun"
    place = (f"run.dir={tmp_path}", "run.name=again", f"data.root={digits.folder.parent}")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("torchrun")), *rest, *place, "wandb.mode=disabled"],
        cwd=ROOT, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    again = condense(tmp_path / "again", "digits")
    assert again["curve"]["val/top1"] == kept["curve"]["val/top1"]
    assert again["command"] == kept["command"]
    # Another processor rounds a convolution's sums in another order: 1e-7 a step.
    assert again["figures"]["val/loss"] == pytest.approx(kept["figures"]["val/loss"], rel=1e-3)
