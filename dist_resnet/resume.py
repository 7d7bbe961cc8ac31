"""Which folder a run lives in, and from which checkpoint it goes on."""

from pathlib import Path
from typing import Any

from dist_resnet.checkpoint import CheckpointStore, read_checkpoint
from dist_resnet.config import to_dict, trajectory_differences, trajectory_hash
from dist_resnet.distributed import from_main, on_main, together
from dist_resnet.errors import UserError
from dist_resnet.launcher import restart_count
from dist_resnet.run_folder import RunFolder
from dist_resnet.schema import Config
from dist_resnet.tracking.tracker import say_on_stderr


def run_name(config: Config) -> str:
    """The configured name, or one that the configuration decides: same command, same run."""
    if config.run.name is not None:
        return config.run.name
    return f"{config.model.name}-{config.data.dataset}-s{config.seed}-{trajectory_hash(config)}"


def open_folder(config: Config, folder: RunFolder) -> None:
    """Lock the folder; clear it where that was asked for. On rank 0 only.

    Raises:
        UserError: in use, not writable, or holding a run that was not to be continued.
    """
    folder.open()
    # Workers that torchrun restarts go on with what the first ones have begun.
    if restart_count() > 0:
        return
    if config.run.overwrite:
        folder.clear()
    elif config.run.resume == "never" and any(folder.checkpoints.glob("*.pt")):
        raise UserError(
            f"run.resume=never: {folder.path} holds a run already; "
            "choose another run.name, or run.overwrite=true to delete it"
        )


def find_checkpoint(config: Config, folder: RunFolder) -> dict[str, Any] | None:
    """The content of the checkpoint to continue from, read by every rank; None: start anew.

    Raises:
        UserError: on all ranks, where none of the existing ones is valid.
    """
    store = CheckpointStore(folder.checkpoints, config.checkpoint.keep)
    chosen: list[Path] = []

    def choose() -> None:
        wanted = config.run.resume
        if wanted in ("auto", "never") or (restart_count() > 0 and store.newest_path()):
            found = store.newest(say_on_stderr)
            if found:
                chosen.append(found[0])
            return
        step = int(read_checkpoint(Path(wanted))["state"]["step"])
        store.set_aside_after(step)
        chosen.append(Path(wanted))

    on_main(choose)
    path = from_main(chosen[0] if chosen else None)
    return None if path is None else together(lambda: read_checkpoint(path))


def check_same_run(saved: dict[str, Any], config: Config, fingerprint: str) -> None:
    """Refuse to continue another configuration's or another dataset's run.

    Raises:
        UserError: with every differing key that decides what the weights are.
    """
    differences = trajectory_differences(saved["config"], to_dict(config))
    if saved["fingerprint"] != fingerprint:
        differences.append("the dataset's content (fingerprint)")
    if differences:
        raise UserError(
            f"the checkpoint belongs to another run: {'; '.join(differences)}; "
            "set these back, choose another run.name, or run.overwrite=true"
        )
