"""The trained nets that distill.teachers names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from dist_resnet.augment import Normalisation
from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.load import stored_config
from dist_resnet.config.schema import Config
from dist_resnet.models.matching import Start
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.runs.held_out import has_seen
from dist_resnet.runs.weights import read_weights, trained_model
from dist_resnet.step.distill import Distillation, Teacher
from dist_resnet.training.session import Session
from dist_resnet.training.starting import normalisation_of, started_model


@dataclass(frozen=True)
class FoundTeacher:
    """A checkpoint to learn from, or weights alone."""

    name: str
    saved: Checkpoint | Start
    """Weights alone are of the student's own net and normalisation."""
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
            file, saved = read_weights(user_path(name))
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except (UserError, OSError) as error:
            raise UserError(f"distill.teachers: {error}") from None
        found.append(FoundTeacher(name, saved, digest))
    return found


def who_saw_held_out(
    teachers: Sequence[FoundTeacher], begun: Start | None, session: Session
) -> list[str]:
    """Which of the teachers and starting weights may have been trained on images held out here.

    Weights alone do not say what they were trained on.
    """
    config, fingerprint = session.config, session.dataset.fingerprint
    seen = [
        f"distill.teachers={teacher.name}"
        for teacher in teachers
        if isinstance(teacher.saved, Checkpoint) and has_seen(teacher.saved, config, fingerprint)
    ]
    if begun is not None and begun.held_out_seen:
        seen.append(f"model.init={config.model.init}")
    return seen


def _of_file(name: str, start: Start, config: Config, classes: int) -> nn.Module:
    """The student's net with the weights of a file, matched by name or else by order."""
    for how in ("names", "order"):
        try:
            own = replace(config, model=replace(config.model, init_map=how))
            return started_model(own, classes, start)
        except UserError as error:
            reason = str(error).partition(": ")[2]
    raise UserError(f"distill.teachers={name}: {reason}")


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
        if isinstance(saved, Start):
            model = _of_file(teacher.name, saved, config, len(data.classes))
            layout, own = config.precision.channels_last, normalisation_of(saved, model, session)
            teachers.append(Teacher(model.to(device), own, students, layout, teacher.name))
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
        settled = stored_config(saved.config)
        model, layout = trained_model(saved, settled), settled.precision.channels_last
        own = Normalisation.of(saved.mean, saved.std, data.width, device)
        teachers.append(Teacher(model.to(device), own, students, layout, teacher.name))
    settings = config.distill
    return Distillation(teachers, settings.temperature, settings.weight) if teachers else None
