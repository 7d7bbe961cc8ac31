"""A run that goes on with other code of its plug-ins is refused, and names the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_resnet.data.dataset import Dataset
from tests.helpers.jobs import ROOT

NET = """
import torch
from torch import nn
from layers_of_mine import activation

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""


@pytest.mark.slow
def test_an_edited_plugin_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    (tmp_path / "net_of_mine.py").write_text(NET)
    layers = tmp_path / "layers_of_mine.py"
    layers.write_text("from torch.nn import ReLU as activation\n")
    run = tmp_path / "runs" / "job"

    def train(*settings: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable, "-m", "dist_resnet.train", "model.name=net_of_mine:net",
            f"data.root={tiny.folder.parent}", f"data.dataset={tiny.folder.name}", "run.name=job",
            "data.batch_size_per_replica=8", "parallel.device=cpu", "wandb.mode=disabled",
            "parallel.threads=1", "train.epochs=3", *settings,
        ]  # fmt: skip
        return subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    done = train("train.max_steps=6")
    assert done.returncode == 0, done.stderr
    assert "code: model.name=net_of_mine:net" in done.stdout
    plan = json.loads((run / "plan.json").read_text())
    assert plan["code"].keys() == {"dist_resnet", "net_of_mine.py", "layers_of_mine.py"}

    layers.write_text("from torch.nn import GELU as activation\n")
    refused = train()
    assert refused.returncode == 2
    assert "layers_of_mine.py" in refused.stderr
    assert "run.allow_code_change=true" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1

    done = train("run.allow_code_change=true")
    assert done.returncode == 0, done.stderr
    assert "the code of layers_of_mine.py" in done.stdout
    after = json.loads((run / "plan.json").read_text())
    assert after["forks"] == [
        {
            "step": 6,
            "changed": ["the code of layers_of_mine.py"],
            "wandb_id": after["forks"][0]["wandb_id"],
        }
    ]
    assert after["hash"] != plan["hash"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["code"]["layers_of_mine.py"] == after["code"]["layers_of_mine.py"][:16]
