"""What tests of launchers compare with, and trainings in this process."""

from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import run_job
from tests.helpers.launching import PATIENCE, training
from tests.helpers.own_runs import Runs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Dataset) -> Path:
    """The run that all trainings by a launcher must end like: one process, no launcher."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = run_job(0, training(folder, digits), folder, PATIENCE)
    assert outcome.code == 0, outcome.output
    return folder / "job"


@pytest.fixture
def runs(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    # The loop's signal handlers stay with the process.
    monkeypatch.setattr("dist_resnet.base.signals.install", lambda: None)
    monkeypatch.setattr("dist_resnet.base.signals.defer", lambda: None)
    return Runs(tmp_path, tiny)
