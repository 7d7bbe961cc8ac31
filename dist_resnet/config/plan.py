"""Every number that follows from the configuration, the dataset's size and the number of ranks."""

from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.config.plugins import is_plugin
from dist_resnet.config.schedule import learning_rates, scale_factor
from dist_resnet.config.schema import Config
from dist_resnet.config.values import as_tree, shown

_MOST_STEPS = 50_000_000  # the rate of every step is computed before the first
_SHRINKS = 4  # from a side of the image to one of the last stage: two strides of two


@dataclass(frozen=True)
class Plan:
    """Derived once, shown at the start, written to plan.json, never fed back."""

    world_size: int
    replicas: int
    replicas_per_rank: int
    batch_size_per_replica: int
    global_batch_size: int
    train_images: int
    steps_per_epoch: int
    images_left_out_per_epoch: int
    schedule_steps: int
    total_steps: int
    base_lr: float
    lr_factor: float
    peak_lr: float

    def ends_epoch(self, step: int, every: int) -> bool:
        """Whether `step` steps complete an epoch that is a multiple of `every` (0: never)."""
        return bool(every) and step > 0 and step % (self.steps_per_epoch * every) == 0

    def finished(self, step: int) -> bool:
        """Whether `step` steps are all of the run."""
        return step >= self.total_steps

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(config: Config, train_images: int, world_size: int) -> Plan:
    """Derive the plan.

    Args:
        train_images: images trained on, a validation split already taken away.

    Raises:
        UserError: the replicas do not divide among the ranks, or no batch fills.
    """
    wanted = config.parallel.replicas
    replicas = world_size if isinstance(wanted, str) else wanted
    if replicas % world_size:
        raise UserError(
            f"parallel.replicas={replicas}: not a multiple of the {world_size} processes; "
            f"start {_largest_divisor(replicas, world_size)}, or make parallel.replicas a multiple"
        )
    per_replica = config.data.batch_size_per_replica
    global_batch = replicas * per_replica
    steps = train_images // global_batch
    if steps <= 0:
        raise UserError(
            f"data.batch_size_per_replica={per_replica}: {replicas} replicas need {global_batch} "
            f"images for one step, the training set has {train_images}"
        )
    schedule_steps = steps * config.train.epochs
    if schedule_steps > _MOST_STEPS:
        raise UserError(
            f"train.epochs={config.train.epochs}: {schedule_steps:,} steps; at most {_MOST_STEPS:,}"
        )
    factor = scale_factor(config.optim, global_batch)
    return Plan(
        world_size=world_size,
        replicas=replicas,
        replicas_per_rank=replicas // world_size,
        batch_size_per_replica=per_replica,
        global_batch_size=global_batch,
        train_images=train_images,
        steps_per_epoch=steps,
        images_left_out_per_epoch=train_images - steps * global_batch,
        schedule_steps=schedule_steps,
        total_steps=min(schedule_steps, config.train.max_steps or schedule_steps),
        base_lr=config.optim.lr,
        lr_factor=factor,
        peak_lr=config.optim.lr * factor,
    )


def check_statistics(config: Config, height: int, width: int) -> None:
    """BatchNorm needs more than one value a channel in a replica's batch.

    Of a net of the user's own this is found out by trying it.

    Raises:
        UserError: in the last stage there is one.
    """
    if is_plugin(config.model.name):
        return
    if config.data.batch_size_per_replica * -(-height // _SHRINKS) * -(-width // _SHRINKS) == 1:
        raise UserError(
            "data.batch_size_per_replica=1: must be at least 2 with images of "
            f"{width}x{height}, of which BatchNorm sees one value"
        )


def rates(config: Config, plan: Plan) -> list[float]:
    """The learning rate of every step of the schedule."""
    return learning_rates(config.schedule, plan.peak_lr, plan.steps_per_epoch, plan.schedule_steps)


def explain(config: Config, plan: Plan) -> list[str]:
    """The plan for a reader, a line each."""
    optim, size = config.optim, plan.global_batch_size
    rule = {
        "none": "optim.lr_scaling=none: the rate does not follow the batch",
        "linear": f"optim.lr_scaling=linear: x {size} / {optim.reference_batch_size}",
        "sqrt": f"optim.lr_scaling=sqrt: x sqrt({size} / {optim.reference_batch_size})",
    }[optim.lr_scaling]
    return [
        f"replicas: {plan.replicas} of {plan.batch_size_per_replica} images = global batch {size}, "
        f"{plan.replicas_per_rank} on each of {plan.world_size} processes",
        f"steps: {plan.steps_per_epoch} an epoch ({plan.train_images:,} images, "
        f"{plan.images_left_out_per_epoch} left out), {plan.total_steps:,} in all",
        f"learning rate: {plan.base_lr:g} at batch {optim.reference_batch_size} -> "
        f"{plan.peak_lr:g} at batch {size} ({rule}), {config.schedule.name}",
        *[f"{key}: does nothing {where}" for key, where in _idle(config)],
    ]


def _idle(config: Config) -> list[tuple[str, str]]:
    """Keys other than by default that nothing reads, and why."""
    optimizer, mix, schedule = config.optim.name, config.augment.mix, config.schedule.name
    rules: list[tuple[bool, str, str]] = [
        (
            optimizer not in ("sgd", "muon"),
            "optim.momentum optim.nesterov",
            f"with optim.name={optimizer}",
        ),
        (optimizer != "muon", "optim.muon_lr", f"with optim.name={optimizer}"),
        (
            is_plugin(config.model.name),
            "model.widths model.shortcut model.dropout",
            "with a net of your own, which has model.args",
        ),
        (mix == "mixup", "augment.cutmix_alpha", "with augment.mix=mixup"),
        (mix == "cutmix", "augment.mixup_alpha", "with augment.mix=cutmix"),
        (
            not config.distill.teachers,
            "distill.temperature distill.weight",
            "without distill.teachers",
        ),
        (schedule != "step", "schedule.milestones", f"with schedule.name={schedule}"),
        (
            config.optim.lr_scaling == "none",
            "optim.reference_batch_size",
            "with optim.lr_scaling=none",
        ),
    ]
    idle, default = [], Config()
    for applies, keys, why in rules:
        for key in keys.split() if applies else ():
            value = attrgetter(key)(config)
            if value != attrgetter(key)(default):
                idle.append((f"{key}={shown(as_tree(value)).replace(', ', ',')}", why))
    return idle


def _largest_divisor(number: int, limit: int) -> int:
    return max(size for size in range(1, limit + 1) if number % size == 0)
