"""The README's claim, by the README's own lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import ROOT

CLAIM = "## A run is a pure function of its configuration"


@pytest.mark.slow
def test_one_process_and_two_end_with_the_same_weights(tmp_path: Path) -> None:
    [block] = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block in (ROOT / "README.md").read_text().split(CLAIM)[1].split("\n## ")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", block],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r'runs/(one|two)/summary.json: +"weights_sha256": "([0-9a-f]{64})"', done.stdout
    )
    assert [name for name, _ in found] == ["one", "two"]
    assert found[0][1] == found[1][1]
