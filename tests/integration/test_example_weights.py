"""The weights in examples/weights have the accuracy that their page says."""

import re

import pytest

import dist_resnet
from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import ROOT

FOLDER = ROOT / "examples" / "weights"
ROWS = re.findall(r"^\| `(\S+)` \|.* (\d\d\.\d\d)% \|$", (FOLDER / "README.md").read_text(), re.M)


def test_every_file_has_a_row() -> None:
    assert {name for name, _ in ROWS} == {path.name for path in FOLDER.glob("*.safetensors")}
    assert ROWS


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first who asks for CIFAR-10 prepares it
@pytest.mark.parametrize(("name", "percent"), ROWS)
def test_weights_have_the_accuracy_of_their_row(name: str, percent: str, cifar10: Dataset) -> None:
    pytest.importorskip("safetensors")
    found = dist_resnet.evaluate(
        FOLDER / name,
        f"data.root={cifar10.folder.parent}",
        f"data.dataset={cifar10.folder.name}",
        "precision.dtype=fp32",
    )
    assert found["images"] == 10_000
    assert abs(found["correct"] - 100 * float(percent)) <= 3  # kinds of processors round otherwise
