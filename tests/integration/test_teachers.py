"""Learning from a run that exists."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dist_resnet
from dist_resnet.base.errors import UserError
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset
from dist_resnet.runs.trained import load


def _settings(data: Dataset, folder: Path, name: str) -> dict[str, Any]:
    return {
        "data": {
            "root": str(data.folder.parent),
            "dataset": data.folder.name,
            "loader": "resident",
        },
        "run": {"dir": str(folder), "name": name},
        "model": {"name": "m6", "widths": [4, 8, 8], "dropout": 0},
        "augment": {"mixup_alpha": 0, "flip": False},
        "parallel": {"device": "cpu", "threads": 1},
        "wandb": {"mode": "disabled"},
        "train": {"epochs": 4},
        "seed": 1,
    }


@pytest.mark.slow
def test_a_student_follows_its_teacher(digits: Dataset, tmp_path: Path) -> None:
    """Taught alone (weight 1), it agrees with the teacher more than one that learns the labels."""
    teacher = _settings(digits, tmp_path, "teacher")
    dist_resnet.train(teacher, train={"epochs": 6}, seed=0)
    alone = _settings(digits, tmp_path, "alone")
    dist_resnet.train(alone)
    distill = {"teachers": [str(tmp_path / "teacher")], "weight": 1.0}
    dist_resnet.train(_settings(digits, tmp_path, "student"), distill=distill)
    images = torch.from_numpy(read_back(digits.test_path).images[:]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        found = {
            name: dist_resnet.load(tmp_path / name)(images).softmax(1)
            for name in ("teacher", "alone", "student")
        }

    def distance(name: str) -> float:
        return float((found[name] - found["teacher"]).abs().sum(1).mean())

    print({name: distance(name) for name in ("alone", "student")})
    assert distance("student") < 0.8 * distance("alone")


def test_weights_alone_teach_as_their_run_does(tiny: Dataset, tmp_path: Path) -> None:
    """A file of our own, and the same tensors under names of somebody else."""
    dist_resnet.train(_settings(tiny, tmp_path, "teacher"), train={"max_steps": 2}, seed=0)
    state = load(tmp_path / "teacher").network.state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, tmp_path / "own.safetensors")
    # Files of safetensors are read by name.
    others = {
        f"x.{number:03}.{n.split('.')[-1]}": t for number, (n, t) in enumerate(tensors.items())
    }
    save_file(others, tmp_path / "others.safetensors")
    trained = {}
    for teacher in ("teacher", "own.safetensors", "others.safetensors"):
        name = teacher.partition(".")[0] + "s-student"
        student = _settings(tiny, tmp_path, name)
        distill = {"teachers": [str(tmp_path / teacher)]}
        dist_resnet.train(student, distill=distill, train={"max_steps": 2})
        trained[teacher] = load(tmp_path / name).state_dict()
    dist_resnet.train(_settings(tiny, tmp_path, "alone"), train={"max_steps": 2})
    first, alone = trained["teacher"], load(tmp_path / "alone").state_dict()
    assert not all(torch.equal(first[name], alone[name]) for name in first)
    for found in trained.values():
        assert all(torch.equal(first[name], found[name]) for name in first)


def test_a_teacher_of_other_classes_or_none_is_refused(
    digits: Dataset, tiny: Dataset, tmp_path: Path
) -> None:
    other = _settings(tiny, tmp_path, "other")
    dist_resnet.train(other, train={"max_steps": 1})
    student = _settings(digits, tmp_path, "student")
    with pytest.raises(UserError, match=r"distill.teachers=.*other: knows other classes"):
        dist_resnet.train(student, distill={"teachers": [str(tmp_path / "other")]})
    with pytest.raises(UserError, match=r"distill.teachers: .*nobody"):
        dist_resnet.train(student, distill={"teachers": [str(tmp_path / "nobody")]})
