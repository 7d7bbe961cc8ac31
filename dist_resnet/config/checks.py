"""Which values are possible: one line for the first that is not, before anything starts."""

import math
import os
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.config.builtins import AUGMENTATIONS, MODELS, OPTIMIZERS
from dist_resnet.config.keys import did_you_mean
from dist_resnet.config.schema import Config
from dist_resnet.config.values import as_tree, shown

_LONGEST_NAME, _LONGEST_PATH = 255, 1000  # in bytes; Linux takes 255 and 4096


def check(config: Config) -> None:
    """Check every value that its type alone does not.

    Raises:
        UserError: naming the key, the value and what it must be.
    """
    for section, named, builtin in (
        ("model", config.model, MODELS),
        ("optim", config.optim, OPTIMIZERS),
    ):
        _check_name(f"{section}.name", named.name, builtin)
        alone = ":" in named.name or not named.args
        _require(alone, f"{section}.args", named.args, f"empty with {section}.name={named.name}")
    for keys, possible, wanted in _POSSIBLE:
        for key in keys.split():
            value = attrgetter(key)(config)
            _require(possible(value), key, value, wanted)
    for entry in config.augment.extra:
        _check_augmentation(entry)
    _check_together(config)


def _require(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"{key}={shown(as_tree(value))}: must be {wanted}")


def _check_name(key: str, name: str, builtin: Collection[str]) -> None:
    if ":" not in name and name not in builtin:
        hint = did_you_mean(name, list(builtin))
        _require(False, key, name, f"one of {', '.join(builtin)}, or module:callable{hint}")


def _check_augmentation(entry: Any) -> None:
    parts = entry if isinstance(entry, dict) else {"name": entry}
    name, args = parts.get("name"), parts.get("args", {})
    good = isinstance(name, str) and isinstance(args, dict) and parts.keys() <= {"name", "args"}
    wanted = "module:callable, or {name: module:callable, args: {...}}"
    _require(good, "augment.extra", entry, wanted)
    _check_name("augment.extra", str(name), AUGMENTATIONS)


def _check_together(config: Config) -> None:
    """Values that others make impossible."""
    model, augment, optim = config.model, config.augment, config.optim
    kind = model.init_map
    _require(kind == "names" or model.init is not None, "model.init_map", kind, "with a model.init")
    rising = model.widths[0] <= model.widths[1] <= model.widths[2]
    wanted = "non-decreasing with model.shortcut=pad"
    _require(model.shortcut == "projection" or rising, "model.widths", model.widths, wanted)
    reflected = augment.padding_mode == "reflect" and augment.crop_padding == 0
    _require(not reflected, "augment.padding_mode", "reflect", "zero with augment.crop_padding=0")
    alone = augment.mix != "both" or augment.mixup_alpha > 0
    _require(alone, "augment.mix", augment.mix, "cutmix with augment.mixup_alpha=0")
    half = config.precision.dtype == "fp16" and optim.name == "muon"
    _require(not half, "optim.name", "muon", "sgd with fp16; or use bf16")
    usable = not optim.nesterov or optim.momentum > 0
    _require(usable, "optim.nesterov", "true", "false where optim.momentum=0")
    epochs, warmup = config.train.epochs, config.schedule.warmup_epochs
    wanted = f"0 to below train.epochs ({epochs})"
    _require(0 <= warmup < epochs, "schedule.warmup_epochs", warmup, wanted)


def _numbers(row: Any, count: int) -> bool:
    """Whether a list holds `count` finite numbers."""
    return (
        isinstance(row, list)
        and len(row) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in row)
    )


def _is_scale(scale: Any) -> bool:
    """Whether it is a normalisation: a word, or means and deviations."""
    if isinstance(scale, str):
        return scale in ("dataset", "imagenet")
    good = len(scale) == 2 and all(_numbers(row, 3) and max(row) <= 1 for row in scale)
    return good and min(scale[0]) >= 0 and min(scale[1]) > 0


def _are_weights(weights: Any) -> bool:
    """Whether these weigh classes: a word, or a number above 0 for each."""
    if isinstance(weights, str):
        return weights in ("none", "balanced")
    return _numbers(weights, len(weights)) and min(weights, default=0) > 0


def _are_widths(widths: list[int]) -> bool:
    return len(widths) == 3 and all(1 <= width <= 4096 for width in widths)


def _maps_names(kind: Any) -> bool:
    if isinstance(kind, dict):
        return all(isinstance(name, str) for name in kind.values())
    return kind in ("names", "order")


def _names_a_run(name: str | None) -> bool:
    return name is None or (
        0 < len(name) <= 64 and not set(name) & set('/\\#?%:"') and name[0] != "."
    )


def _fits(name: str | None) -> bool:
    return name is None or len(os.fsencode(name)) <= _LONGEST_NAME


def _is_short(path: str) -> bool:
    parts = [len(os.fsencode(part)) for part in path.split("/")]
    return max(parts) <= _LONGEST_NAME and sum(parts) <= _LONGEST_PATH


def _leaves_room(name: str) -> bool:
    # Beside a data set lie files whose names hold its own and more.
    return len(os.fsencode(name)) <= _LONGEST_NAME - 55


def _are_rising(marks: list[int]) -> bool:
    return all(mark > 0 for mark in marks) and sorted(set(marks)) == marks


def _are_replicas(number: int | str) -> bool:
    return number == "auto" if isinstance(number, str) else number >= 1


def _are_tags(tags: list[str]) -> bool:
    return all(1 <= len(tag) <= 64 for tag in tags)


def _names_at_wandb(name: str) -> bool:
    return 1 <= len(name) <= 128 and not set(name) & set("/\\#?%:") and name == name.strip()


_INFINITE = float("inf")
_NAME = '1 to 64 characters, no / \\ # ? % : " and no first dot'
_WANDB_NAME = "1 to 128 characters, no / \\ # ? % : and no space at its ends"
_SCALE = (
    "dataset, imagenet, or [[means],[deviations]] of three channels in 0 to 1, deviations above 0"
)
_WEIGHTS = "none, balanced, or a number above 0 for each class, such as [1,2.5]"
_SOURCE = "module:callable, such as my_data:birds, or null"

_Rule = tuple[str, Callable[[Any], bool], str]
"""Keys, whether a value of theirs is possible, and what to say where it is not."""
# W&B's own rules, which it tells only when it starts: too late to be mended.
_WANDB: tuple[_Rule, ...] = (
    ("project", _names_at_wandb, _WANDB_NAME),
    ("entity", lambda name: not name or _names_at_wandb(name), _WANDB_NAME),
    ("group", lambda group: len(group or "") <= 128, "at most 128 characters"),
    ("tags", _are_tags, "tags of 1 to 64 characters each"),
)
_POSSIBLE: tuple[_Rule, ...] = (
    ("model.init_map", _maps_names, "names, order, or {their prefix: ours, ...}"),
    ("model.init", lambda path: path != "", "a path, or null"),
    ("model.bn_momentum", lambda m: m is None or 0 < m <= 1, "above 0 and at most 1, or null"),
    ("model.widths", _are_widths, "three numbers of filters, such as [16,32,64]"),
    ("seed", lambda seed: 0 <= seed < 2**63, "0 to 2^63 - 1"),
    ("run.name", _names_a_run, _NAME),
    ("run.name", _fits, "shorter: too long for a name"),
    ("run.resume", lambda path: path != "", "auto, never or a checkpoint's path"),
    ("run.dir run.resume data.root", _is_short, "shorter: too long for a path"),
    ("data.dataset", lambda n: n not in ("", ".", "..") and "/" not in n, "a name, not a path"),
    ("data.dataset", _leaves_room, "shorter: too long for a name"),
    ("data.normalisation", _is_scale, _SCALE),
    ("data.source", lambda name: name is None or ":" in name, _SOURCE),
    ("augment.crop_padding", lambda pixels: 0 <= pixels <= 64, "0 to 64"),
    ("augment.flip", lambda f: f in (True, False, "alternating"), "true, false or alternating"),
    ("augment.jitter augment.erasing", lambda share: 0 <= share <= 1, "0 to 1"),
    ("augment.mixup_alpha", lambda alpha: 0 <= alpha <= 100, "0 to 100"),
    ("augment.cutmix_alpha", lambda alpha: 0 < alpha <= 100, "above 0, at most 100"),
    ("optim.class_weights", _are_weights, _WEIGHTS),
    ("optim.clip_norm", lambda norm: 0 <= norm < _INFINITE, "at least 0"),
    ("optim.lr optim.muon_lr optim.bias_lr_factor", lambda r: 0 < r < _INFINITE, "above 0"),
    (
        "model.dropout optim.momentum optim.weight_decay optim.label_smoothing train.ema_decay",
        lambda share: 0 <= share < 1,
        "at least 0 and below 1",
    ),
    ("distill.temperature", lambda t: 0 < t <= 1000, "above 0, up to 1000"),
    ("distill.weight", lambda weight: 0 < weight <= 1, "above 0, up to 1"),
    ("train.epochs parallel.timeout_seconds", lambda n: 1 <= n <= 10**6, "1 to 1000000"),
    ("train.max_steps", lambda limit: limit is None or limit >= 1, "at least 1, or null"),
    ("schedule.milestones", _are_rising, "rising epochs, such as [80,120]"),
    ("parallel.replicas", _are_replicas, "auto or at least 1"),
    ("parallel.threads", lambda threads: 0 <= threads <= 4096, "0 to 4096"),
    (
        "data.batch_size_per_replica optim.reference_batch_size checkpoint.keep eval.every_epochs "
        "log.every_steps",
        lambda number: number >= 1,
        "at least 1",
    ),
    (
        "data.val_split augment.cutout checkpoint.every_epochs checkpoint.every_steps "
        "wandb.media_every_epochs",
        lambda number: number >= 0,
        "at least 0",
    ),
    *((f"wandb.{key}", possible, wanted) for key, possible, wanted in _WANDB),
)
