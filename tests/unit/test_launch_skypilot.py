"""launch/skypilot*.yaml: their very commands run as SkyPilot would run them.

SkyPilot brings a hundred packages along, so it is no requirement of the tests; where it is
installed it says for itself what it thinks of the files.
"""

import subprocess
from pathlib import Path

import pytest
import yaml

from dist_resnet.data.sources.table import parser
from tests.helpers.launching import LAUNCH, assert_meets, played

EXIT_PREEMPTED = 75
TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
VOLUME = yaml.safe_load((LAUNCH / "skypilot_volume.yaml").read_text())


def test_skypilot_takes_them() -> None:
    sky = pytest.importorskip("sky", reason="pip install skypilot, in an environment of its own")
    from sky.utils import common_utils, schemas

    assert sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml")).num_nodes == TASK["num_nodes"]
    common_utils.validate_schema(VOLUME, schemas.get_volume_schema())


def test_rules() -> None:
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_PREEMPTED]
    assert TASK["secrets"] == {"WANDB_API_KEY": None}
    assert TASK["workdir"] == "."
    # Several nodes cannot share a volume of any other kind or mode.
    assert TASK["num_nodes"] > 1
    assert {TASK["envs"]["RUN_DIR"].rpartition("/")[0]: VOLUME["name"]} == TASK["volumes"]
    assert (VOLUME["type"], VOLUME["config"]["access_mode"]) == ("k8s-pvc", "ReadWriteMany")


@pytest.mark.parametrize("index", [0, 1])
def test_the_run_section(tmp_path: Path, index: int) -> None:
    """With what SkyPilot would set."""
    engine = {
        "SKYPILOT_NUM_NODES": str(TASK["num_nodes"]),
        "SKYPILOT_NODE_RANK": str(index),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "sky-7",
    }
    call = played(tmp_path, ["bash", "-c", TASK["run"]], TASK["envs"] | engine)
    assert_meets(call, "2", "10.0.0.1:29400", index)
    assert "--rdzv-id=sky-7" in call.split()
    assert "--nproc-per-node=8" in call.split()
    assert call.endswith("configs/resnet20.yaml run.dir=/store/runs run.name=resnet20")


@pytest.mark.parametrize("works", [True, False])
def test_the_setup_section(tmp_path: Path, works: bool) -> None:
    """In a checkout where `make` and Python are played; a failure must not be passed over."""
    stand_in = f'#!/bin/sh\necho "${{0##*/}} $*" >>calls\n{"exit 0" if works else "exit 2"}\n'
    for path in (tmp_path / "bin" / "make", tmp_path / ".venv" / "bin" / "python"):
        path.parent.mkdir(parents=True)
        path.write_text(stand_in)
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", TASK["setup"]],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
    )
    assert done.returncode == (0 if works else 2)
    made, *prepared = (tmp_path / "calls").read_text().splitlines()
    assert made == "make setup"
    if works:
        (line,) = prepared
        module, *arguments = line.removeprefix("python -m ").split()
        assert module == "dist_resnet.data.prepare"
        # Where the run section's configuration looks for it; the options are prepare's own.
        assert arguments == ["cifar10", "--output", "data"]
        parser("").parse_args(arguments)
    else:
        assert prepared == []
