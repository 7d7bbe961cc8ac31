"""The trained nets that distill.teachers names."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dist_resnet.augment import Normalisation
from dist_resnet.checkpoint import Checkpoint
from dist_resnet.config import stored_config
from dist_resnet.distill import Distillation, Teacher
from dist_resnet.errors import UserError
from dist_resnet.paths import user_path
from dist_resnet.schema import Config
from dist_resnet.session import Session
from dist_resnet.weights import find_weights, trained_model


@dataclass(frozen=True)
class FoundTeacher:
    """A checkpoint to learn from."""

    name: str
    file: Path
    saved: Checkpoint
    sha256: str
    """Of the file."""


def find_teachers(config: Config) -> list[FoundTeacher]:
    """The newest checkpoint of each run that is named, or the checkpoint itself.

    Raises:
        UserError: one is not there, or damaged.
    """
    found = []
    for name in config.distill.teachers:
        try:
            file, saved = find_weights(user_path(name))
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except (UserError, OSError) as error:
            raise UserError(f"distill.teachers: {error}") from None
        found.append(FoundTeacher(name, file, saved, digest))
    return found


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
