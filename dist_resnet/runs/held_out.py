"""Whether images that a run holds out were trained on before, by what it begins with."""

from collections.abc import Mapping
from typing import Any

from dist_resnet.config.schema import Config
from dist_resnet.runs.checkpoint import Checkpoint


def trained_on(before: Mapping[str, Any], config: Config) -> bool:
    """Whether a training by `before`, on the same data, may have seen images `config` holds out.

    Those of fewer, by the same seed, are among those of more (`data.order.split_indices`).

    Args:
        before: a checkpoint's configuration; an exported file's does not tell its seed.
    """
    held, wanted = before["data"]["val_split"], config.data.val_split
    return wanted > held or (wanted > 0 and before.get("seed") != config.seed)


def has_seen(saved: Checkpoint, config: Config, fingerprint: str) -> bool:
    """As `trained_on`, of a checkpoint and of all that it began with or learnt from.

    Args:
        fingerprint: of the data set that `config` trains on.
    """
    if saved.fingerprint != fingerprint or not config.data.val_split:
        return False
    return saved.held_out_seen or trained_on(saved.config, config)
