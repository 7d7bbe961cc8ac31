"""What a checkpoint holds, and how its file is read."""

import hashlib
import io
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from dist_resnet.base.errors import UserError, first_line
from dist_resnet.base.paths import printable
from dist_resnet.step.state import Snapshot

FORMAT = 2  # 1, with "momentum" in place of "optimizer", is read too
T = TypeVar("T", "Checkpoint", Snapshot)
SAFETENSORS = ".safetensors"
NAME = re.compile(r"(step|best)-(\d{8,})-([0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A run at a step: all that continuing it, or using its model, takes."""

    state: Snapshot
    config: dict[str, Any]
    """As `config.load.to_dict`."""
    classes: list[str]
    """Names, by the index of their logit."""
    mean: list[float]
    std: list[float]
    """Of each channel, on the scale 0 to 255: what images are normalised by."""
    image_size: list[int]
    """Height and width."""
    fingerprint: str = ""
    """Of the dataset."""
    reading: dict[str, Any] | None = None
    """How image files became pixels, as a dict of `data.decoding.Reading`; None: unknown."""
    seconds: float = 0.0
    """Of training until here."""
    code: dict[str, str] = field(default_factory=dict)
    """As `code.code_of_run`; empty: unknown."""
    init: dict[str, str] | None = None
    """What weights the run began with, as `Start.identity`; None: random ones."""
    held_out_seen: bool = False
    """Whether these, or a teacher, may have been trained on images that the run holds out."""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    """As `environment.machine` and `environment.versions`; empty: unknown."""
    forks: list[dict[str, Any]] = field(default_factory=list)
    """Where the run left another one, as `fork.starting_point` records it."""
    wandb_id: str | None = None
    wandb_position: Any = None
    """Of the run on W&B: its name, and how much of its record counts."""


def read_checkpoint(path: Path) -> Checkpoint:
    """The content of one file.

    Raises:
        UserError: unreadable, damaged, or not a checkpoint of this program.
    """
    if path.suffix == SAFETENSORS:
        raise UserError(f"{path}: holds weights, not a training; begin one with it: model.init")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    match = NAME.fullmatch(path.name)
    if match and hashlib.sha256(content).hexdigest()[:16] != match[3]:
        raise UserError(f"{path}: damaged: its content does not match the checksum in its name")
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each have their own
        line = first_line(error).split(". ")[0]  # torch goes on about its own internals
        raise UserError(f"{path}: not a checkpoint, or damaged: {line}") from None
    version = saved.get("format") if isinstance(saved, dict) else None
    if version not in (1, FORMAT):
        raise UserError(f"{path}: not a checkpoint of dist_resnet (format {FORMAT})")
    return checkpoint_of(path, saved | {"state": _of_now(saved.get("state", {}), version)})


def checkpoint_of(path: Path, saved: dict[str, Any]) -> Checkpoint:
    """The checkpoint that a file's values describe, those of other versions left out.

    Raises:
        UserError: values are missing, or of another kind.
    """
    classes = saved.get("classes", [])
    if not isinstance(classes, list) or not isinstance(saved.get("config", {}), dict):
        raise UserError(f"{path}: damaged: its classes or its configuration are of another kind")
    given = saved | {"state": _filled(path, Snapshot, saved.get("state"))}
    if classes:
        given["classes"] = [printable(str(name)) for name in classes]
    return _filled(path, Checkpoint, given)


def _of_now(state: Any, version: int) -> Any:
    """A state as this version writes it."""
    if version == FORMAT or not isinstance(state, dict) or "momentum" not in state:
        return state
    kept = {name: {"momentum_buffer": tensor} for name, tensor in state["momentum"].items()}
    return state | {"optimizer": {"parameters": kept, "others": {}, "groups": [], "own": {}}}


def _filled(path: Path, kind: type[T], values: Any) -> T:
    """A `kind` of the values that it has fields for."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged: its state is no mapping")
    own = [part for part in fields(kind) if part.init]
    for part in own:
        needed = part.default is MISSING and part.default_factory is MISSING
        if needed and part.name not in values:
            raise UserError(f"{path}: not a checkpoint of a training: it lacks {part.name}")
    return kind(**{part.name: values[part.name] for part in own if part.name in values})
