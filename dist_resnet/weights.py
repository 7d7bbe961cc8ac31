"""A trained model out of a checkpoint or a run folder."""

from pathlib import Path
from typing import Any

import torch

from dist_resnet.checkpoint import CheckpointStore, read_checkpoint
from dist_resnet.errors import UserError
from dist_resnet.models.resnet import ResNet, build_model
from dist_resnet.schema import Config
from dist_resnet.state import load_tensors
from dist_resnet.tracking.tracker import say_on_stderr


def find_weights(path: Path) -> tuple[Path, dict[str, Any]]:
    """File and content of a checkpoint, or of the newest valid one of a run folder.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        return path, read_checkpoint(path)
    store = CheckpointStore(path / "checkpoints", keep=1)
    found = store.newest(say_on_stderr, set_aside=False)
    if found is None:
        raise UserError(f"{path}: holds no checkpoint; name a run folder or a .pt file")
    return found


def trained_model(saved: dict[str, Any], config: Config) -> ResNet:
    """The model with the weights that training evaluated: the moving average where one was kept.

    Raises:
        UserError: `config` describes another model.
    """
    model = build_model(config.model, len(saved["classes"])).to(memory_format=torch.channels_last)
    state = saved["state"]
    load_tensors(model, state["model"] if state["ema"] is None else state["ema"])
    return model.eval()
