"""Files of safetensors: read here, and those of our own export say what net they are of."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_resnet.base.errors import UserError, first_line
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.step.state import Snapshot

SUFFIX = ".safetensors"
_KEY = "dist_resnet"  # of the metadata in a file's header
_KEPT = ("config", "classes", "mean", "std", "image_size", "fingerprint", "reading", "code")
_NETWORK = "network."  # as `trained.Classifier` names the net's tensors


def description(saved: Checkpoint) -> dict[str, str]:
    """Metadata by which a file of the checkpoint's weights is as good as the checkpoint."""
    kept = {name: getattr(saved, name) for name in _KEPT} | {"step": saved.state.step}
    return {_KEY: json.dumps(kept)}


def tensors_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and SHA-256 of a file.

    Raises:
        UserError: it cannot be read; the line does not name the file.
    """
    try:
        from safetensors.torch import load
    except ImportError:
        raise UserError("needs a package: pip install 'dist-resnet[export]'") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    try:
        tensors = load(content)
        # The library tells metadata of files on disk alone: 8 bytes of length, then JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except Exception as error:  # its own, from Rust
        raise UserError(f"not a safetensors file, or damaged: {first_line(error)}") from None
    return tensors, header.get("__metadata__", {}), hashlib.sha256(content).hexdigest()


def exported_checkpoint(path: Path) -> Checkpoint | None:
    """What `description` was written of, with the file's weights; None: it holds weights alone.

    Raises:
        UserError: it cannot be read.
    """
    try:
        tensors, metadata, _ = tensors_of(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if _KEY not in metadata:
        return None
    model = {n.removeprefix(_NETWORK): t for n, t in tensors.items() if n.startswith(_NETWORK)}
    try:
        facts: dict[str, Any] = json.loads(metadata[_KEY])
        state = Snapshot(
            facts.pop("step"), model, optimizer={}, ema=None, loss_scale=None, totals={}, best={}
        )
        return Checkpoint(state, **facts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged: what it says of itself: {first_line(error)}") from None
