"""What one process trains and evaluates with: threads, precision, data, batches and the step."""

import os
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dist_resnet.augment import Normalisation
from dist_resnet.base.errors import UserError
from dist_resnet.base.launcher import environment_int
from dist_resnet.base.paths import user_path
from dist_resnet.config.plan import Plan, rates
from dist_resnet.config.schema import Config
from dist_resnet.data.beton import read_back
from dist_resnet.data.content import Channels
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.order import split_indices
from dist_resnet.data.prepare import check_source, prepare_builtin
from dist_resnet.data.stream import Batch, open_loader, training_batches
from dist_resnet.distributed.group import (
    World,
    gather_objects,
    on_every_rank,
    on_rank_zero,
)
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.step.distill import Distillation
from dist_resnet.step.mode import choose_step_mode
from dist_resnet.step.precision import (
    TYPES,
    choose_precision,
    make_deterministic,
    set_up_cuda,
)
from dist_resnet.step.state import TrainState
from dist_resnet.step.train_step import TrainStep
from dist_resnet.training.evaluation import BATCH_SIZE, Evaluator


@dataclass(frozen=True)
class Session:
    """One process's share of the machine and the dataset."""

    config: Config
    world: World
    dataset: Dataset
    precision: torch.dtype
    precision_reason: str
    threads: int
    train_indices: np.ndarray
    """int64: samples of train.beton to train on."""
    held_out: np.ndarray
    """int64: samples of train.beton to evaluate on in place of the test set; may be empty."""

    @property
    def eval_set(self) -> str:
        """Name of the set that is evaluated, for the reader."""
        return "held-out training images" if len(self.held_out) else "test set"

    @property
    def image_size(self) -> tuple[int, int]:
        return self.dataset.height, self.dataset.width

    @property
    def channel_scale(self) -> tuple[Channels, Channels]:
        """Mean and standard deviation that images are normalised by, on the scale 0 to 255."""
        return self.dataset.channel_scale(self.config.data.normalisation)

    def normalisation(self) -> Normalisation:
        return Normalisation.of(*self.channel_scale, self.dataset.width, self.world.device)

    def class_weights(self) -> Tensor | None:
        """float32 (K,): the loss's weight of each class; None: all alike.

        Raises:
            UserError: not as many as there are classes, or a class without training images.
        """
        chosen, classes = self.config.optim.class_weights, self.dataset.classes
        if chosen == "none":
            return None
        weights = chosen if isinstance(chosen, list) else self._balanced()
        if len(weights) != len(classes):
            raise UserError(
                f"optim.class_weights: {len(weights)} numbers; {self.dataset.folder} has "
                f"{len(classes)} classes: {', '.join(classes[:5])}{', ...' * (len(classes) > 5)}"
            )
        return torch.tensor(weights, dtype=torch.float32, device=self.world.device)

    def _balanced(self) -> list[float]:
        """images / (classes x images of the class), over the images that are trained on."""
        data = self.dataset
        labels = read_back(data.train_path).labels[self.train_indices]
        counts = np.bincount(labels, minlength=len(data.classes))
        if counts.min() == 0:
            raise UserError(
                "optim.class_weights=balanced: no image of class "
                f"{data.classes[int(counts.argmin())]} is trained on; give numbers, or such images"
            )
        return (len(labels) / (len(counts) * counts)).tolist()

    def batches(self, plan: Plan, step: int = 0) -> Generator[Batch, None, None]:
        """This rank's share of the batch of each step, from `step` to the last one."""
        size = plan.batch_size_per_replica * plan.replicas_per_rank
        device, config = self.world.device, self.config
        loader = open_loader(config.data.loader, self.dataset.train_path, size, device)
        return training_batches(
            loader, config.seed, self.train_indices, plan, self.world.rank, step, device
        )

    def train_step(
        self, plan: Plan, state: TrainState, distillation: Distillation | None = None
    ) -> TrainStep:
        """What advances `state` by a batch of `batches`."""
        return TrainStep(
            self.config,
            state,
            rates(self.config, plan),
            plan.replicas,
            self.precision,
            self.normalisation(),
            self.image_size,
            plan.steps_per_epoch,
            distillation,
            self.class_weights(),
        )

    def evaluator(self, statistics: Normalisation) -> Evaluator:
        """Evaluates on the held-out images if there are any, else on the test set.

        Args:
            statistics: of the set that the model was trained on.
        """
        data, held_out = self.dataset, self.held_out
        path = data.train_path if len(held_out) else data.test_path
        indices = held_out if len(held_out) else np.arange(data.num_test)
        loader = open_loader(self.config.data.loader, path, BATCH_SIZE, self.world.device)
        return Evaluator(
            loader,
            indices,
            statistics,
            self.precision,
            self.config.eval.flip_tta,
            self.world,
            len(data.classes),
            self.config.precision.channels_last,
            self.config.model.name,
        )


def open_session(config: Config, world: World) -> Session:
    """Set the process up and open the dataset, which is prepared when missing.

    Raises:
        UserError: on all ranks alike, whichever met it.
    """
    threads = choose_threads(config, sharing_cores(world))
    torch.set_num_threads(threads)
    if config.precision.deterministic:
        make_deterministic()
    wanted = config.precision.dtype
    precision, reason = on_every_rank(lambda: choose_precision(wanted, world.device))
    if world.device.type == "cuda":
        exact = config.parallel.reduction == "exact"
        reason = f"{reason}, {set_up_cuda(exact or config.precision.deterministic)}"
    dataset = _open_dataset(config)
    held_out = config.data.val_split
    if held_out >= dataset.num_train:
        raise UserError(
            f"data.val_split={held_out}: the training set has {dataset.num_train} images"
        )
    kept, out = split_indices(config.seed, dataset.num_train, held_out)
    return Session(config, world, dataset, TYPES[precision], reason, threads, kept, out)


def sharing_cores(world: World) -> int:
    """How many ranks may use the cores of this one: all of the machine, unless each was bound."""
    mine = os.sched_getaffinity(0)
    machine = environment_int("GROUP_RANK", 0)
    everyone = gather_objects((machine, mine))
    return sum(1 for other, cores in everyone if other == machine and cores & mine)


def choose_threads(config: Config, sharing: int) -> int:
    """CPU threads of one of `sharing` ranks that use the same cores.

    One with parallel.reduction=exact: oneDNN's weight gradients depend on the number of threads,
    which must not follow the number of ranks.
    """
    if config.parallel.threads:
        return config.parallel.threads
    if config.parallel.reduction == "exact":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // sharing)


def resolve_auto(config: Config, world: World, saved: Checkpoint | None) -> Config:
    """`config` with what was left to the machine decided: replicas, precision, mode of the step.

    A run that is continued keeps what it began with, wherever it goes on.

    Raises:
        UserError: the precision or the mode does not exist here, or torch crashes on the net.
    """
    if config.parallel.replicas == "auto":
        began = saved.config["parallel"]["replicas"] if saved else world.size
        config = with_replicas(config, began)
    if config.precision.dtype == "auto":
        began = saved.config["precision"]["dtype"] if saved else "auto"
        dtype = cast(Any, choose_precision(began, world.device)[0])
        config = replace(config, precision=replace(config.precision, dtype=dtype))
    mode = config.train.step_mode
    if mode == "auto" and saved and saved.config["train"]["step_mode"] in ("eager", "compile"):
        # Not the other modes: a machine that lacks them continues all the same, as the mode
        # alters rounding only.
        mode = saved.config["train"]["step_mode"]
    mode = cast(Any, choose_step_mode(mode, config, world.device)[0])
    return replace(config, train=replace(config.train, step_mode=mode))


def with_replicas(config: Config, replicas: int) -> Config:
    """`config` with parallel.replicas settled."""
    return replace(config, parallel=replace(config.parallel, replicas=replicas))


def _open_dataset(config: Config) -> Dataset:
    folder = user_path(config.data.root) / config.data.dataset

    def prepare_and_verify() -> None:
        if not Dataset.exists(folder):
            prepare_builtin(config.data.dataset, user_path(config.data.root), config.data.source)
        check_source(Dataset.load(folder, verify=True), config.data.source)

    on_rank_zero(prepare_and_verify)
    dataset = on_every_rank(lambda: Dataset.load(folder, verify=False))
    first, *others = gather_objects(dataset.fingerprint)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise UserError(
                f"{folder}: rank {rank} sees another dataset than rank 0; "
                "copy the prepared folder to every node"
            )
    return dataset
