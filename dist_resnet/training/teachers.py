"""The trained nets that distill.teachers names."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from dist_resnet.augment import Normalisation
from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.load import stored_config
from dist_resnet.config.schema import Config
from dist_resnet.models.build import build_model, in_layout
from dist_resnet.models.matching import start_from
from dist_resnet.runs.checkpoint import SAFETENSORS, Checkpoint
from dist_resnet.runs.exported import exported_checkpoint
from dist_resnet.runs.weights import find_weights, trained_model
from dist_resnet.step.distill import Distillation, Teacher
from dist_resnet.training.session import Session
from dist_resnet.training.starting import safetensors_of


@dataclass(frozen=True)
class FoundTeacher:
    """A checkpoint to learn from, or weights alone."""

    name: str
    file: Path
    saved: Checkpoint | None
    """None: weights of the student's own net and normalisation."""
    sha256: str
    """Of the file."""


def find_teachers(config: Config) -> list[FoundTeacher]:
    """The newest checkpoint of each run that is named, the checkpoint itself, or a file of weights.

    Raises:
        UserError: one is not there, or damaged.
    """
    found = []
    for name in config.distill.teachers:
        try:
            file, saved = user_path(name), None
            if file.suffix == SAFETENSORS:
                saved = exported_checkpoint(file)
            else:
                file, saved = find_weights(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except (UserError, OSError) as error:
            raise UserError(f"distill.teachers: {error}") from None
        found.append(FoundTeacher(name, file, saved, digest))
    return found


def _of_file(teacher: FoundTeacher, config: Config, classes: int) -> nn.Module:
    """The student's net with the weights of a file, matched by name or else by order."""
    start = safetensors_of(teacher.file)
    model = build_model(config.model, classes, config.seed)
    for how in ("names", "order"):
        try:
            new = start_from(model, start, replace(config.model, init_map=how))[1]
        except UserError as error:
            reason = str(error).partition(": ")[2]
        else:
            if not new:
                return in_layout(model, config.precision.channels_last)
            reason = f"its net tells other classes apart than {classes}"
    raise UserError(f"distill.teachers={teacher.name}: {reason}")


def build_distillation(
    found: list[FoundTeacher], session: Session, students: Normalisation
) -> Distillation | None:
    """What the step takes; None where there are no teachers.

    Raises:
        UserError: a teacher knows other classes, or images of another size.
    """
    config, data, device = session.config, session.dataset, session.world.device
    teachers = []
    for teacher in found:
        saved = teacher.saved
        if saved is None:
            model = _of_file(teacher, config, len(data.classes)).to(device)
            teachers.append(Teacher.of(model.requires_grad_(False), students, students))
            continue
        if tuple(saved.classes) != tuple(data.classes):
            raise UserError(
                f"distill.teachers={teacher.name}: knows other classes than {data.folder}"
            )
        if tuple(saved.image_size) != session.image_size:
            height, width = saved.image_size
            raise UserError(
                f"distill.teachers={teacher.name}: was trained on images of {width}x{height}"
            )
        model = trained_model(saved, stored_config(saved.config)).to(device)
        own = Normalisation.of(saved.mean, saved.std, data.width, device)
        teachers.append(Teacher.of(model.requires_grad_(False), own, students))
    settings = config.distill
    return Distillation(teachers, settings.temperature, settings.weight) if teachers else None
