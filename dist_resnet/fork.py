"""Whether a checkpoint may be continued under a configuration: as it was, or as a fork of it."""

from collections.abc import Collection
from typing import Any

from dist_resnet.config import to_dict, trajectory_differences
from dist_resnet.errors import UserError
from dist_resnet.schema import Config

_LENGTH = "train.epochs"


def starting_point(
    saved: dict[str, Any], config: Config, fingerprint: str, named: Collection[str]
) -> dict[str, Any]:
    """The checkpoint from which `config` goes on: `saved`, or with run.extend a fork of it.

    A fork keeps weights, momentum and step, and records under "forks" where it began and what
    differs. It has a W&B record of its own.

    Args:
        named: dotted keys that the command names: only these may differ, and the length.

    Raises:
        UserError: it belongs to another run, with every key that decides what the weights are.
    """
    differences = trajectory_differences(saved["config"], to_dict(config))
    other_data = saved["fingerprint"] != fingerprint
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
    silent = [line for line in differences if line.split(":")[0] not in (*named, _LENGTH)]
    if other_data or silent:
        what = "; ".join(silent) or "the dataset's content (fingerprint)"
        raise UserError(
            f"run.extend=true: {what}: "
            + ("only what the command names may change" if silent else "it must be the same data")
        )
    if begun := [line for line in differences if line.startswith("model.init")]:
        raise UserError(
            f"run.extend=true: {begun[0]}: these weights were read before the first step; leave it"
        )
    return _forked(saved, config, differences)


def forks_told(saved: dict[str, Any] | None) -> list[str]:
    """A line for each fork on the way to here."""
    return [
        f"fork: at step {fork['step']:,}, {'; '.join(fork['changed'])}"
        for fork in (saved or {}).get("forks", [])
    ]


def _forked(saved: dict[str, Any], config: Config, differences: list[str]) -> dict[str, Any]:
    state = dict(saved["state"])
    # What was true of the old schedule and of the old evaluation set.
    state |= {"stopped_early": False, "best_at_low_rate": 0.0}
    if saved["config"]["data"]["val_split"] != config.data.val_split:
        state["best"] = {}
    if config.train.ema_decay and state["ema"] is None:
        state["ema"] = state["model"]  # an average that begins here
    fork = {"step": state["step"], "changed": differences, "wandb_id": saved["wandb_id"]}
    forks = [*saved.get("forks", []), fork]
    own = {"state": state, "forks": forks, "wandb_id": None, "wandb_position": None}
    return saved | own
