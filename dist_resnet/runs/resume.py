"""Which folder a run lives in, and which checkpoint it finds there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dist_resnet.base.errors import EXIT_DIVERGED, Diverged, UserError
from dist_resnet.base.launcher import job_id, restart_count
from dist_resnet.base.paths import user_path
from dist_resnet.config.load import (
    load_config,
    to_dict,
    trajectory_differences,
    trajectory_hash,
)
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import on_rank_zero
from dist_resnet.machine.environment import differences
from dist_resnet.runs.checkpoint import Checkpoint, read_checkpoint
from dist_resnet.runs.folder import RunFolder
from dist_resnet.runs.store import CheckpointStore
from dist_resnet.tracking.tracker import say_on_stderr

# What the bits of a run on GPUs depend on.
_OF_GPUS = ("device", "gpu", "cuda", "cudnn", "torch", "Triton")


def run_name(config: Config) -> str:
    """The configured name, or one that the configuration decides: same command, same run."""
    if config.run.name is not None:
        return config.run.name
    model = config.model.name.replace(":", ".")
    return f"{model}-{config.data.dataset}-s{config.seed}-{trajectory_hash(config)}"


def open_folder(config: Config, folder: RunFolder) -> None:
    """Lock the folder. On rank 0 only.

    What lies in it is not touched before the run begins: a command that is refused leaves it as it
    was, its status too.

    Raises:
        UserError: in use, not writable, or holding a run that was not to be continued.
        Diverged: torchrun has restarted what diverged, and would compute the same again.
    """
    folder.open()
    before = folder.status()
    if _goes_on(folder):
        # Workers that torchrun restarts go on with what the first ones have begun.
        if before.get("exit_code") == EXIT_DIVERGED and restart_count() > 0:
            raise Diverged(str(before.get("reason")))
    elif config.run.overwrite:
        folder.to_clear = True
    elif config.run.resume == "never" and any(folder.checkpoints.glob("*.pt")):
        reason = (
            f"run.resume=never: {folder.path} holds a run already; "
            "choose another run.name, or run.overwrite=true to delete it"
        )
        folder.refuse(reason, UserError.exit_code)
        raise UserError(reason)
    if not before or _goes_on(folder):
        folder.set_status("running", before.get("step", 0))


def _goes_on(folder: RunFolder) -> bool:
    """Whether this job has begun or continued the run in the folder already."""
    return folder.is_of_job(job_id()) if job_id() else restart_count() > 0


def find_checkpoint(config: Config, folder: RunFolder) -> Checkpoint | None:
    """The content of the checkpoint to continue from, as rank 0 reads it; None: start anew.

    Raises:
        UserError: on all ranks, where none of the existing ones is valid.
    """
    store = CheckpointStore(folder.checkpoints, config.checkpoint.keep)

    def choose() -> Checkpoint | None:
        wanted = config.run.resume
        begun = _goes_on(folder) and store.newest_path()
        if wanted in ("auto", "never") or begun:
            newest = None if folder.to_clear else store.newest(say_on_stderr)
            if newest is None and config.run.extend:
                raise UserError(
                    f"run.extend=true: {folder.path} holds no run to extend; "
                    "name it with run.name, or a checkpoint with run.resume"
                )
            return None if newest is None else newest[1]
        content = read_checkpoint(user_path(wanted))
        if user_path(wanted).resolve().parent != folder.checkpoints.resolve():
            # Another run's: that one's record on W&B is not this one's to rewind.
            content = replace(content, wandb_id=None, wandb_position=None)
        return content

    return on_rank_zero(choose)


def check_folder(config: Config, folder: RunFolder) -> None:
    """Keep a checkpoint from elsewhere out of the folder of another run. On rank 0 only.

    Raises:
        UserError: the folder holds a run of another configuration, or one that cannot be told.
    """
    wanted = config.run.resume
    if wanted in ("auto", "never") or folder.to_clear or _goes_on(folder):
        return
    if user_path(wanted).resolve().parent == folder.checkpoints.resolve():
        return
    if not (any(folder.checkpoints.glob("*.pt")) or folder.metrics.exists()):
        return
    try:
        there = to_dict(load_config([str(folder.path / "config.yaml")]))
        found = "; ".join(trajectory_differences(there, to_dict(config)))
    except UserError as error:
        found = str(error)
    if found:
        raise UserError(
            f"run.resume={wanted}: {folder.path} holds another run already ({found}); "
            "choose another run.name, run.resume=auto to go on with that one, or "
            "run.overwrite=true to delete it"
        )


def take_over(config: Config, folder: RunFolder, step: int) -> None:
    """Make the folder this job's own: clear it where that was asked for, and set checkpoints of
    later steps aside. On rank 0 only.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder.to_clear:
        folder.clear()
    try:
        CheckpointStore(folder.checkpoints, config.checkpoint.keep).set_aside_after(step)
        folder.set_job(job_id())
        folder.forget_refusal()
        folder.set_status("running", step)
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be written: {error.strerror}") from None


def other_rounding(saved: Checkpoint, machine: dict[str, Any], step_mode: str) -> str:
    """A line where a run goes on on another kind of machine or in another mode; else empty.

    Not refused: it is the same training, up to roundings, which grow.

    Args:
        saved: those of older versions do not tell the machine.
        machine: `environment.machine` here.
    """
    found = differences(
        saved.machine | {"train.step_mode": saved.config["train"]["step_mode"]},
        machine | {"train.step_mode": step_mode},
    )
    if not found:
        return ""
    return (
        "continued where sums may round otherwise: from here on not bit for bit the undisturbed run"
        f" ({'; '.join(found)})"
    )


def check_same_machines(kinds: Sequence[dict[str, Any]], reduction: str) -> str:
    """A line where processes of one run are on different kinds of machine; else empty.

    Each updates its own weights: these part, bit by bit, where the arithmetic is not the same.

    Args:
        kinds: `environment.machine` of every process, the first one's first.
        reduction: parallel.reduction.

    Raises:
        UserError: with `exact`, which promises the bits of one process.
    """
    # Nothing of a training on GPUs is computed by processors.
    counts = _OF_GPUS if kinds[0]["device"] == "cuda" else kinds[0].keys() - {"threads_per_rank"}
    first, *others = ({name: kind[name] for name in counts if name in kind} for kind in kinds)
    for other in others:
        found = differences(first, other)
        if not found:
            continue
        where = f"the processes are on different kinds of machine ({'; '.join(found)})"
        if reduction == "exact":
            raise UserError(f"parallel.reduction=exact: {where}; use machines of one kind, or fast")
        return f"{where}: their weights may part in the last bits; those of the first are saved"
    return ""


def check_same_configuration(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse to train with ranks that were given another configuration than rank 0.

    Raises:
        UserError: with every differing key, rank 0's value first; where files lie, and how rank 0
            opens them, may differ.
    """
    found = trajectory_differences(
        theirs, ours, lambda key: key != "data.root" and not key.startswith("run.")
    )
    if found:
        raise UserError(
            f"the processes differ in {'; '.join(found)}: give all of them the same command, and "
            "name what is auto"
        )
