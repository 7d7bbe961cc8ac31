"""Which values are possible: one line for the first that is not, before anything starts."""

import math
import os
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.config.builtins import AUGMENTATIONS, MODELS, OPTIMIZERS
from dist_resnet.config.keys import nearest
from dist_resnet.config.schema import Config
from dist_resnet.config.values import as_tree, shown

_LONGEST_NAME, _LONGEST_PATH = 255, 1000  # in bytes; Linux takes 255 and 4096


def check(config: Config) -> None:
    """Check every value that its type alone does not.

    Raises:
        UserError: naming the key, the value and what it must be.
    """
    _check_names(config)
    _check_run_and_data(config)
    _check_augmentation(config)
    _check_training(config)
    _check_cadence(config)
    _check_wandb(config)


def _require(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"{key}={shown(as_tree(value))}: must be {wanted}")


def _check_names(config: Config) -> None:
    model, optim = config.model, config.optim
    for key, name, args, builtin in (
        ("model", model.name, model.args, MODELS),
        ("optim", optim.name, optim.args, OPTIMIZERS),
    ):
        if ":" in name:
            continue
        if name not in builtin:
            hint = nearest(name, list(builtin))
            raise UserError(
                f"{key}.name={shown(as_tree(name))}: must be one of {', '.join(builtin)}, or "
                f"module:callable{hint and f'; did you mean {hint}?'}"
            )
        _require(not args, f"{key}.args", args, f"empty with {key}.name={name}")
    _check_own_model(config)


def _check_augmentation(config: Config) -> None:
    augment = config.augment
    padding, alpha = augment.crop_padding, augment.mixup_alpha
    _require(0 <= padding <= 64, "augment.crop_padding", padding, "0 to 64")
    reflected = augment.padding_mode == "reflect" and not padding
    _require(not reflected, "augment.padding_mode", "reflect", "zero with augment.crop_padding=0")
    flips = augment.flip in (True, False, "alternating")
    _require(flips, "augment.flip", augment.flip, "true, false or alternating")
    _require(augment.cutout >= 0, "augment.cutout", augment.cutout, "at least 0")
    for key in ("jitter", "erasing"):
        value = getattr(augment, key)
        _require(0 <= value <= 1, f"augment.{key}", value, "0 to 1")
    _require(0 <= alpha <= 100, "augment.mixup_alpha", alpha, "0 to 100")
    alone = augment.mix != "both" or alpha > 0
    _require(alone, "augment.mix", augment.mix, "cutmix with augment.mixup_alpha=0")
    alpha = augment.cutmix_alpha
    _require(0 < alpha <= 100, "augment.cutmix_alpha", alpha, "above 0, at most 100")
    for entry in augment.extra:
        parts = entry if isinstance(entry, dict) else {"name": entry}
        name, args = parts.get("name"), parts.get("args", {})
        good = isinstance(name, str) and isinstance(args, dict) and parts.keys() <= {"name", "args"}
        wanted = "module:callable, or {name: module:callable, args: {...}}"
        _require(good, "augment.extra", entry, wanted)
        if ":" not in str(name) and name not in AUGMENTATIONS:
            hint = nearest(str(name), list(AUGMENTATIONS))
            raise UserError(
                f"augment.extra={shown(as_tree(name))}: must be one of {', '.join(AUGMENTATIONS)}, "
                f"or module:callable{hint and f'; did you mean {hint}?'}"
            )


def _check_own_model(config: Config) -> None:
    model = config.model
    kind = model.init_map
    usable = isinstance(kind, dict) and all(isinstance(name, str) for name in kind.values())
    wanted = "names, order, or {their prefix: ours, ...}"
    _require(kind in ("names", "order") or usable, "model.init_map", kind, wanted)
    _require(kind == "names" or model.init is not None, "model.init_map", kind, "with a model.init")
    _require(model.init != "", "model.init", model.init, "a path, or null")
    momentum = model.bn_momentum
    good = momentum is None or 0 < momentum <= 1
    _require(good, "model.bn_momentum", momentum, "above 0 and at most 1, or null")


def _check_run_and_data(config: Config) -> None:
    run, data, model = config.run, config.data, config.model
    _require(0 <= config.seed < 2**63, "seed", config.seed, "0 to 2^63 - 1")
    name_ok = run.name is None or (
        0 < len(run.name) <= 64 and not set(run.name) & set('/\\#?%:"') and run.name[0] != "."
    )
    _require(
        name_ok, "run.name", run.name, '1 to 64 characters, no / \\ # ? % : " and no first dot'
    )
    _require(run.resume != "", "run.resume", run.resume, "auto, never or a checkpoint's path")
    for key, path in (("run.dir", run.dir), ("run.resume", run.resume), ("data.root", data.root)):
        parts = [len(os.fsencode(part)) for part in path.split("/")]
        good = max(parts) <= _LONGEST_NAME and sum(parts) <= _LONGEST_PATH
        _require(good, key, path, "shorter: too long for a path")
    size = data.batch_size_per_replica
    _require(size >= 1, "data.batch_size_per_replica", size, "at least 1")
    _require(data.val_split >= 0, "data.val_split", data.val_split, "at least 0")
    plain = data.dataset not in ("", ".", "..") and "/" not in data.dataset
    _require(plain, "data.dataset", data.dataset, "a name, not a path")
    # Beside it lie files whose names hold its own and more.
    short = len(os.fsencode(data.dataset)) <= _LONGEST_NAME - 55
    _require(short, "data.dataset", data.dataset, "shorter: too long for a name")

    _check_lists(config)
    widths = model.widths
    good = len(widths) == 3 and all(1 <= width <= 4096 for width in widths)
    _require(good, "model.widths", widths, "three numbers of filters, such as [16,32,64]")
    rising = widths[0] <= widths[1] <= widths[2]
    _require(
        model.shortcut == "projection" or rising,
        "model.widths",
        widths,
        "non-decreasing with model.shortcut=pad",
    )
    _require(0 <= model.dropout < 1, "model.dropout", model.dropout, "at least 0 and below 1")


def _check_lists(config: Config) -> None:
    """Keys that take a word or numbers."""
    scale, weights, source = (
        config.data.normalisation,
        config.optim.class_weights,
        config.data.source,
    )
    wanted = "dataset, imagenet, or [[means],[deviations]] of three channels in 0 to 1"
    if isinstance(scale, str):
        _require(scale in ("dataset", "imagenet"), "data.normalisation", scale, wanted)
    else:
        good = len(scale) == 2 and all(_numbers(row, 3) and max(row) <= 1 for row in scale)
        good = good and min(scale[0]) >= 0 and min(scale[1]) > 0
        _require(good, "data.normalisation", scale, f"{wanted}, deviations above 0")
    wanted = "none, balanced, or a number above 0 for each class, such as [1,2.5]"
    if isinstance(weights, str):
        _require(weights in ("none", "balanced"), "optim.class_weights", weights, wanted)
    else:
        good = _numbers(weights, len(weights)) and min(weights, default=0) > 0
        _require(good, "optim.class_weights", weights, wanted)
    good = source is None or ":" in source
    _require(good, "data.source", source, "module:callable, such as my_data:birds, or null")


def _numbers(row: Any, count: int) -> bool:
    """Whether a list holds `count` finite numbers."""
    return (
        isinstance(row, list)
        and len(row) == count
        and all(type(value) in (int, float) and math.isfinite(value) for value in row)
    )


def _check_training(config: Config) -> None:
    optim, schedule, train = config.optim, config.schedule, config.train
    clip = optim.clip_norm
    _require(0 <= clip < float("inf"), "optim.clip_norm", clip, "at least 0")
    for key in ("lr", "muon_lr", "bias_lr_factor"):
        value = getattr(optim, key)
        _require(0 < value < float("inf"), f"optim.{key}", value, "above 0")
    half = config.precision.dtype == "fp16"
    _require(
        not (half and optim.name == "muon"), "optim.name", "muon", "sgd with fp16; or use bf16"
    )
    for key in ("momentum", "weight_decay", "label_smoothing"):
        value = getattr(optim, key)
        _require(0 <= value < 1, f"optim.{key}", value, "at least 0 and below 1")
    usable = not optim.nesterov or optim.momentum > 0
    _require(usable, "optim.nesterov", "true", "false where optim.momentum=0")
    size = optim.reference_batch_size
    _require(size >= 1, "optim.reference_batch_size", size, "at least 1")

    distill = config.distill
    good = 0 < distill.temperature <= 1000
    _require(good, "distill.temperature", distill.temperature, "above 0, up to 1000")
    _require(0 < distill.weight <= 1, "distill.weight", distill.weight, "above 0, up to 1")

    _require(1 <= train.epochs <= 10**6, "train.epochs", train.epochs, "1 to 1000000")
    limit = train.max_steps
    _require(limit is None or limit >= 1, "train.max_steps", limit, "at least 1, or null")
    decay = train.ema_decay
    _require(0 <= decay < 1, "train.ema_decay", decay, "at least 0 and below 1")
    warmup, marks = schedule.warmup_epochs, schedule.milestones
    short = 0 <= warmup < train.epochs
    _require(short, "schedule.warmup_epochs", warmup, f"0 to below train.epochs ({train.epochs})")
    rising = all(mark > 0 for mark in marks) and sorted(set(marks)) == list(marks)
    _require(rising, "schedule.milestones", marks, "rising epochs, such as [80,120]")


def _check_cadence(config: Config) -> None:
    parallel, checkpoint = config.parallel, config.checkpoint
    value = parallel.replicas
    usable = value == "auto" or (isinstance(value, int) and value >= 1)
    _require(usable, "parallel.replicas", value, "auto or at least 1")
    timeout = parallel.timeout_seconds
    _require(1 <= timeout <= 10**6, "parallel.timeout_seconds", timeout, "1 to 1000000")
    _require(0 <= parallel.threads <= 4096, "parallel.threads", parallel.threads, "0 to 4096")
    may_be_off = {
        "checkpoint": ("every_epochs", "every_steps"),
        "wandb": ("media_every_epochs",),
    }
    for section, keys in may_be_off.items():
        for key in keys:
            every = getattr(getattr(config, section), key)
            _require(every >= 0, f"{section}.{key}", every, "at least 0")
    _require(checkpoint.keep >= 1, "checkpoint.keep", checkpoint.keep, "at least 1")
    epochs, steps = config.eval.every_epochs, config.log.every_steps
    _require(epochs >= 1, "eval.every_epochs", epochs, "at least 1")
    _require(steps >= 1, "log.every_steps", steps, "at least 1")


def _check_wandb(config: Config) -> None:
    """W&B's own rules, which it tells only when it starts: too late to be mended."""
    settings, section = config.wandb, "wandb"
    for key in ("project", "entity"):
        name = getattr(settings, key) or ""
        good = len(name) <= 128 and not set(name) & set("/\\#?%:") and name == name.strip()
        good = good and (bool(name) or key == "entity")
        wanted = "1 to 128 characters, no / \\ # ? % : and no space at its ends"
        _require(good, f"{section}.{key}", name, wanted)
    group = settings.group or ""
    _require(len(group) <= 128, f"{section}.group", group, "at most 128 characters")
    for tag in settings.tags:
        _require(
            1 <= len(tag) <= 64, f"{section}.tags", settings.tags, "tags of 1 to 64 characters each"
        )
