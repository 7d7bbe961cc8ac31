"""What the tests of the launchers compare with."""

from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import run_job
from tests.helpers.launching import PATIENCE, training


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """The run that all trainings by a launcher must end like: one process, no launcher."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = run_job(0, training(folder, digits), folder, PATIENCE)
    assert outcome.code == 0, outcome.output
    return folder / "job"
