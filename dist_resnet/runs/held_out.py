"""Whether images that a run holds out were trained on by what it begins with or learns from."""

from collections.abc import Mapping
from typing import Any

from dist_resnet.base.paths import user_path
from dist_resnet.config.schema import Config
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.runs.weights import read_weights


def trained_on(before: Mapping[str, Any], config: Config) -> bool:
    """Whether a training by `before`, on the same data, has seen images that `config` holds out.

    Those of fewer, by the same seed, are among those of more (`data.order.split_indices`).

    Args:
        before: a checkpoint's configuration; one that does not tell its seed may have.
    """
    held, wanted = before["data"]["val_split"], config.data.val_split
    return wanted > held or (wanted > 0 and before.get("seed") != config.seed)


def told_of_held_out(config: Config, fingerprint: str) -> list[str]:
    """A line for each of model.init and distill.teachers that has seen images held out here.

    Weights alone do not say what they were trained on.

    Raises:
        UserError: one cannot be read.
    """
    named = [("distill.teachers", name) for name in config.distill.teachers]
    if config.model.init is not None:
        named.append(("model.init", config.model.init))
    lines = []
    for key, name in named if config.data.val_split else ():
        saved = read_weights(user_path(name))[1]
        if not isinstance(saved, Checkpoint) or saved.fingerprint != fingerprint:
            continue
        if trained_on(saved.config, config):
            lines.append(
                f"{key}={name}: was trained on images that are held out here, so figures on them "
                "flatter"
            )
    return lines
