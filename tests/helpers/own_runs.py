"""Short trainings in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_resnet.base.errors import UserError
from dist_resnet.data.dataset import Dataset
from dist_resnet.train import main


class Runs:
    """Trainings of 3 epochs of 6 steps in this process, in the folder `job`."""

    def __init__(self, folder: Path, tiny: Dataset) -> None:
        self.path = folder / "job"
        self.common = [
            f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}",
            f"run.dir={folder}", "run.name=job", "model.widths=[4,4,4]", "log.every_steps=1",
            "data.batch_size_per_replica=8", "parallel.device=cpu", "wandb.mode=disabled",
            "parallel.threads=1", "train.epochs=3", "data.loader=resident",
        ]  # fmt: skip

    def __call__(self, *settings: str) -> int:
        return main([*self.common, *settings])

    def refused(self, *settings: str) -> str:
        before = self.content()
        with pytest.raises(UserError) as caught:
            self(*settings)
        assert self.content() == before
        return str(caught.value)

    def content(self) -> dict[str, bytes]:
        files = (path for path in self.path.rglob("*") if path.is_file())
        own = {".lock", ".refused"}
        return {str(path): path.read_bytes() for path in files if path.name not in own}

    def json(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.path / name).read_text()))
