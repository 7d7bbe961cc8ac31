"""The state that a run begins or goes on with; what its configuration names for it."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_resnet.augment import Normalisation
from dist_resnet.augment.trial import check_signatures
from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.plugins import is_plugin
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import gather_objects, on_every_rank, on_rank_zero
from dist_resnet.kernels import support
from dist_resnet.machine.environment import machine
from dist_resnet.models import build as models
from dist_resnet.models.build import build_model, in_layout
from dist_resnet.models.matching import Start, start_from
from dist_resnet.optim import build as optimizers
from dist_resnet.runs.checkpoint import SAFETENSORS, Checkpoint
from dist_resnet.runs.exported import read_tensors
from dist_resnet.runs.held_out import has_seen
from dist_resnet.runs.weights import read_weights
from dist_resnet.step.state import TrainState, build_state
from dist_resnet.training.session import Session


def check_own_code(config: Config) -> None:
    """Find what the configuration names, and hold its arguments against what each takes.

    Raises:
        UserError: a name that leads nowhere, or an argument that it does not take.
    """
    if is_plugin(config.model.name):
        models.callable_of(config.model)
    optimizers.callable_of(config, torch.device("cpu"))
    check_signatures(config.augment)


def all_machines(session: Session) -> list[dict[str, Any]]:
    """The kind of machine of every process, the first one's first. A collective."""
    device = session.world.device
    kind: dict[str, Any] = {**machine(device, session.threads)}
    if device.type == "cuda":
        kind["Triton"] = "missing" if support.lacking(device) else "runs"
    return gather_objects(kind)


def begin(
    config: Config, session: Session, saved: Checkpoint | None
) -> tuple[TrainState, Start | None]:
    """The state of `saved`, or the one before the first step; and the weights that it begins with.

    A run that goes on does not read these again: None, as with random ones. A collective.

    Args:
        saved: content of a checkpoint; None: the run begins.

    Raises:
        UserError: on all ranks alike, where there is no such state.
    """
    start = read_start(config, session.dataset.fingerprint) if saved is None else None
    classes, device = len(session.dataset.classes), session.world.device
    state = on_every_rank(
        lambda: build_state(config, classes, session.precision, device, session.image_size, start)
    )
    if saved is not None:
        state.restore(saved.state)
    return state, start


def origin_of(begun: Start | None, seen: Sequence[str], saved: Checkpoint | None) -> dict[str, Any]:
    """`Checkpoint.init` and `Checkpoint.held_out_seen`.

    Args:
        begun: the weights that the run begins with.
        seen: what may have been trained on images that it holds out.
        saved: where it goes on.
    """
    if saved is not None:
        return {"init": saved.init, "held_out_seen": saved.held_out_seen or bool(seen)}
    init = begun.identity() if begun is not None else None
    return {"init": init, "held_out_seen": bool(seen)}


def read_start(config: Config, fingerprint: str) -> Start | None:
    """The configured starting weights, as rank 0 reads them; None: random ones.

    Raises:
        UserError: on all ranks, where there are none.
    """
    if config.model.init is None:
        return None
    path = user_path(config.model.init)
    return on_rank_zero(lambda: _read(path, config, fingerprint))


def started_model(config: Config, classes: int, start: Start) -> nn.Module:
    """The configured net with these weights, all of them, in evaluation mode.

    Raises:
        UserError: they are not of this net and these classes.
    """
    model = build_model(config.model, classes, config.seed)
    if start_from(model, start, config.model, classes)[1]:
        raise UserError(f"{start.file}: its net tells other classes apart than {classes}")
    return in_layout(model, config.precision.channels_last).eval()


def normalisation_of(start: Start, net: nn.Module, session: Session) -> Normalisation:
    """What its weights were trained under: the file's own if it tells, else the configured one."""
    own = start.normalisation(net)
    if own is None:
        return session.normalisation()
    return Normalisation.of(*own, session.dataset.width, session.world.device)


def _read(path: Path, config: Config, fingerprint: str) -> Start:
    try:
        file, saved = read_weights(path)
        start = read_tensors(path)[0] if path.suffix == SAFETENSORS else None
    except UserError as error:
        raise UserError(f"model.init={path}: {str(error).removeprefix(f'{path}: ')}") from None
    if isinstance(saved, Start):  # weights alone, which do not say what they were trained on
        return saved
    seen = has_seen(saved, config, fingerprint)
    if start is not None:  # names its tensors as other libraries do
        return replace(start, held_out_seen=seen)
    with file.open("rb") as content:
        checksum = hashlib.file_digest(content, "sha256").hexdigest()
    return Start(str(file), checksum, dict(saved.state.evaluated), seen)
