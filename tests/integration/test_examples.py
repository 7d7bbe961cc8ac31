"""Every file of examples/ does what its own text says; the single trainings are shortened."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import ROOT

SHORT = ["train.epochs=1", "train.max_steps=4", "wandb.mode=disabled"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_four() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_command_of_an_example(path: Path, tmp_path: Path) -> None:
    (command,) = re.findall(r"^python .+$", path.read_text(), re.MULTILINE)
    words = shlex.split(command)[1:]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, *words, *(SHORT if "dist_resnet.train" in words else [])],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert list((tmp_path / "runs").glob("*/summary.json"))
