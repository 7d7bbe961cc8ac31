"""Files of safetensors: read here, and those of our own export say what net they are of."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import UserError, first_line, one_line
from dist_resnet.config.plugins import is_plugin
from dist_resnet.models.matching import Start, natural
from dist_resnet.runs.checkpoint import Checkpoint, checkpoint_of

_KEY = "dist_resnet"  # of the metadata in a file's header
_KEPT = (
    "classes", "mean", "std", "image_size", "fingerprint", "reading", "code", "held_out_seen",
)  # fmt: skip
# Written and read: no folders and projects, as files are published; no names of code.
_CONFIG = {
    "model": ("name", "widths", "shortcut", "dropout", "bn_momentum"),
    "data": ("dataset", "normalisation", "val_split"),
    "precision": ("dtype", "channels_last"),
    "eval": ("flip_tta",),
}
_NETWORK = "network."  # as `trained.Classifier` names the net's tensors


def description(saved: Checkpoint) -> dict[str, str]:
    """Metadata by which a file of the checkpoint's weights is as good as the checkpoint.

    Empty of a net of the user's own: whoever loads a file of weights expects to run no code of it.
    """
    if is_plugin(saved.config["model"]["name"]):
        return {}
    kept = {name: getattr(saved, name) for name in _KEPT}
    return {_KEY: json.dumps(kept | {"step": saved.state.step, "config": _told(saved.config)})}


def read_tensors(path: Path) -> tuple[Start, dict[str, str]]:
    """A file's tensors, and its metadata.

    Raises:
        UserError: it cannot be read.
    """
    try:
        from safetensors.torch import load
    except ImportError:
        raise UserError(f"{path}: needs a package: pip install 'dist-resnet[export]'") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tensors = load(content)
        # The library tells metadata of files on disk alone: 8 bytes of length, then JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except Exception as error:  # its own, from Rust
        line = first_line(error)
        raise UserError(f"{path}: not a safetensors file, or damaged: {line}") from None
    ordered = {name: tensors[name] for name in natural(tensors)}  # the file keeps no order
    start = Start(str(path), hashlib.sha256(content).hexdigest(), ordered)
    return start, header.get("__metadata__", {})


def read_exported(path: Path) -> Checkpoint | Start:
    """What `description` was written of, with the file's weights; else the weights alone.

    Raises:
        UserError: it cannot be read.
    """
    start, metadata = read_tensors(path)
    if _KEY not in metadata:
        return start
    try:
        facts = json.loads(metadata[_KEY])
        facts["config"] = config = _told(facts["config"])
        name, step = config["model"]["name"], int(facts["step"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged: what it says of itself: {one_line(error)}") from None
    if is_plugin(str(name)):
        raise UserError(f"{path}: names code, {name}, which a file of weights may not run")
    tensors = start.tensors.items()
    model = {n.removeprefix(_NETWORK): t for n, t in tensors if n.startswith(_NETWORK)}
    state = {"step": step, "model": model, "optimizer": {}, "ema": None, "loss_scale": None}
    return checkpoint_of(path, facts | {"state": state | {"totals": {}, "best": {}}})


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration a file says."""
    found: dict[str, Any] = {
        section: {key: config[section][key] for key in keys if key in config[section]}
        for section, keys in _CONFIG.items()
        if section in config
    }
    return found | {"seed": config.get("seed", 0)}
