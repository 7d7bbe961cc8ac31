"""Our Triton kernels without a GPU: their numbers, interpreted, and what they compile to."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.slow
def test_numbers_are_those_of_torch() -> None:
    """In a process of its own: Triton reads the variable once, when it is imported."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-rs", "--no-header", "-p", "no:cacheprovider",
            "tests/helpers/kernels_interpreted.py",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    if reason := re.search(r"Triton \S+ interprets no loops here: .*", done.stdout):
        pytest.skip(reason[0])
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
