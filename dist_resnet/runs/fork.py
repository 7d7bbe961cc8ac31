"""Whether a checkpoint may be continued under a configuration: as it was, or as a fork of it."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.config.code import changed_code, check_code
from dist_resnet.config.load import to_dict, trajectory_differences
from dist_resnet.config.schema import Config
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.runs.held_out import trained_on

_LENGTH = "train.epochs"
_SPLIT = ("seed", "data.val_split")
_NAME_CODE = ("optim.name", "augment.extra", "distill.teachers")


def starting_point(
    saved: Checkpoint, config: Config, fingerprint: str, named: Collection[str]
) -> Checkpoint:
    """The checkpoint from which `config` goes on: `saved`, or with run.extend a fork of it.

    A fork keeps weights, step and, where optim.name and optim.args stay, momentum, and records
    under "forks" where it began and what differs. It has a W&B record of its own.

    Args:
        named: dotted keys that the command names: only these may differ, and the length.

    Raises:
        UserError: it belongs to another run, with every key that decides what the weights are.
    """
    differences = trajectory_differences(saved.config, to_dict(config))
    other_data = saved.fingerprint != fingerprint
    if not differences and not other_data:
        return saved
    keys = [line.split(":")[0] for line in differences]
    listed = "; ".join([*differences, *["the dataset's content (fingerprint)"] * other_data])
    if not config.run.extend:
        hint = ", or run.extend=true" if keys == [_LENGTH] and not other_data else ""
        raise UserError(
            f"the checkpoint belongs to another run: {listed}; "
            f"set these back, choose another run.name, or run.overwrite=true{hint}"
        )
    silent = [line for line in differences if not _is_named(line, named)]
    if other_data or silent:
        what = "; ".join(silent) or "the dataset's content (fingerprint)"
        raise UserError(
            f"run.extend=true: {what}: "
            + ("only what the command names may change" if silent else "it must be the same data")
        )
    if trained_on(saved.config, config):
        split = "; ".join(line for line in differences if _is_named(line, _SPLIT))
        raise UserError(
            f"run.extend=true: {split}: images held out so were trained on until here; leave that "
            "as it was, or set data.val_split=0"
        )
    if begun := [line for line in differences if line.startswith("model.init")]:
        raise UserError(
            f"run.extend=true: {begun[0]}: these weights were read before the first step; leave it"
        )
    return _forked(saved, config, differences)


def with_code(
    saved: Checkpoint | None, code: Mapping[str, str], main: Mapping[str, str], allowed: bool
) -> Checkpoint | None:
    """`saved`, where code of plug-ins has changed and that is `allowed` with a record of it.

    Args:
        code: of this rank, as `code.code_of_run`.
        main: of rank 0.

    Raises:
        UserError: it is not allowed, or the ranks have not the same code.
    """
    if other := changed_code(main, code):
        raise UserError(f"the ranks have other code of {other[0]}: copy it to every node")
    before = saved.code if saved is not None else {}
    if saved is not None and _brings_code(saved):
        both = before.keys() & code.keys()
        before, code = ({name: found[name] for name in both} for found in (before, code))
    changed = check_code(before, code, allowed)
    if saved is None or not changed:
        return saved
    told = [f"the code of {name}" for name in changed]
    fork = {"step": saved.state.step, "changed": told, "wandb_id": saved.wandb_id}
    return replace(saved, forks=[*saved.forks, fork])


def begins_here(saved: Checkpoint) -> bool:
    """Whether it is the first state of a fork."""
    return bool(saved.forks) and saved.forks[-1]["step"] == saved.state.step


def _brings_code(saved: Checkpoint) -> bool:
    """Whether a fork that begins here names code, which then was not there or is there no more."""
    if not begins_here(saved):
        return False
    return any(_is_named(line, _NAME_CODE) for line in saved.forks[-1]["changed"])


def _is_named(line: str, named: Collection[str]) -> bool:
    """Whether the key of a difference is named, or one that it is within (optim.args.amsgrad)."""
    key = line.split(":")[0]
    return any(key == name or key.startswith(f"{name}.") for name in named)


def forks_told(saved: Checkpoint | None) -> list[str]:
    """A line for each fork on the way to here."""
    return [
        f"fork: at step {fork['step']:,}, {'; '.join(fork['changed'])}"
        for fork in (saved.forks if saved is not None else [])
    ]


def _forked(saved: Checkpoint, config: Config, differences: list[str]) -> Checkpoint:
    state, optim = saved.state, saved.config["optim"]
    # What was true of the old schedule and of the old evaluation set.
    changed: dict[str, Any] = {"stopped_early": False, "best_at_low_rate": 0.0}
    held = saved.config["data"]["val_split"], config.data.val_split
    if held[0] != held[1] or (any(held) and saved.config["seed"] != config.seed):
        changed["best"] = {}
    if config.train.ema_decay and state.ema is None:
        changed["ema"] = state.model  # an average that begins here
    names = {optim.get("name", "sgd"), config.optim.name}
    others = any(_is_named(line, ["optim.args"]) for line in differences)  # other state, too
    if ((len(names) > 1 and names != {"sgd", "muon"}) or others) and state.optimizer:
        changed["optimizer"] = {}  # another one's; these two both keep the momentum
        differences = [*differences, "the optimizer's state: begins anew"]
    fork = {"step": state.step, "changed": differences, "wandb_id": saved.wandb_id}
    return replace(
        saved,
        state=replace(state, **changed),
        forks=[*saved.forks, fork],
        wandb_id=None,
        wandb_position=None,
    )
