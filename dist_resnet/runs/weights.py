"""A trained model out of a checkpoint or a run folder."""

from pathlib import Path

from torch import nn

from dist_resnet.base.errors import UserError
from dist_resnet.config.code import told_of_net_code
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import rank
from dist_resnet.models.build import build_model, in_layout
from dist_resnet.models.matching import Start
from dist_resnet.runs.checkpoint import SAFETENSORS, Checkpoint, read_checkpoint
from dist_resnet.runs.exported import read_exported
from dist_resnet.runs.store import CheckpointStore
from dist_resnet.step.state import load_tensors
from dist_resnet.tracking.tracker import say_on_stderr

CHECKPOINTS = ("newest", "best")


def find_weights(path: Path, checkpoint: str = "newest") -> tuple[Path, Checkpoint]:
    """As `read_weights`, of files that say what net they are of.

    Raises:
        UserError: there is none.
    """
    file, found = read_weights(path, checkpoint)
    if isinstance(found, Checkpoint):
        return file, found
    raise UserError(
        f"{path}: holds weights alone, and does not say of which net: "
        "python -m dist_resnet.evaluate takes it with model.name, a training as model.init"
    )


def read_weights(path: Path, checkpoint: str = "newest") -> tuple[Path, Checkpoint | Start]:
    """File and content of a checkpoint, an exported file, or of a run folder's newest or best one.

    Of a file of weights that does not say what net they are of, these alone.

    Raises:
        UserError: there is none.
    """
    if checkpoint not in CHECKPOINTS:
        raise UserError(f"checkpoint {checkpoint}: choose {' or '.join(CHECKPOINTS)}")
    if not path.is_dir():
        if checkpoint != CHECKPOINTS[0]:
            raise UserError(f"{path}: is no run folder, which alone has a {checkpoint} checkpoint")
        return path, read_exported(path) if path.suffix == SAFETENSORS else read_checkpoint(path)
    store = CheckpointStore(path / "checkpoints", keep=1)
    best = checkpoint == "best"
    found = store.best() if best else store.newest(say_on_stderr, set_aside=False)
    if found is None:
        kind = "best " if best else ""
        raise UserError(
            f"{path}: holds no {kind}checkpoint; name a run folder, a .pt or a .safetensors file"
        )
    return found


def trained_model(saved: Checkpoint, config: Config) -> nn.Module:
    """The model with the weights that training evaluated, in evaluation mode.

    Says so, on standard error of the first rank, where the code of a plug-in is no longer the
    checkpoint's.

    Raises:
        UserError: `config` describes another model, or its code is not found.
    """
    layout = config.precision.channels_last
    # What a net draws when it is built and does not save is of its own run's seed.
    seed = saved.config.get("seed", 0)
    model = in_layout(build_model(config.model, len(saved.classes), seed), layout)
    load_tensors(model, saved.state.evaluated)
    if rank() == 0:
        for line in told_of_net_code(saved.code, config.model.name):
            say_on_stderr(line)
    model.eval()
    return model
