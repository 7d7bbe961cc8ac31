"""What a configuration key decides: the weights, the figures, or neither."""

# Keys that alter no step's weights but by rounding: they may change when a run is continued.
FREE_SECTIONS = ("run", "eval", "checkpoint", "log", "wandb")
FREE_KEYS = frozenset(
    {
        "parallel.device",
        "data.root",
        "data.loader",
        "data.source",  # the data are known by their fingerprint, wherever they came from
        "parallel.timeout_seconds",
        "parallel.threads",
        "train.early_stop",
        "train.max_steps",
        "train.step_mode",
    }
)
_LENGTHS = ("train.max_steps", "train.early_stop")


def changes_trajectory(key: str) -> bool:
    """Whether `key`, dotted, decides what the weights are after a given number of steps."""
    return key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS


def changes_figures(key: str) -> bool:
    """Whether `key`, dotted, may change a figure of summary.json: its length, its speed, its data.

    Its record and its checkpoints do not.
    """
    return key.split(".")[0] not in ("run", "checkpoint", "log", "wandb")


def changes_result(key: str) -> bool:
    """Whether `key`, dotted, may change what a run finds: not how fast, nor where it lies."""
    return changes_trajectory(key) or key in _LENGTHS or key.startswith("eval.")
