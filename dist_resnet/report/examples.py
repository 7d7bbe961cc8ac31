"""What a checkpoint does with images: its confusions, its worst mistakes, what it was trained on.

Computed from the newest checkpoint and the dataset by the code that trains and evaluates.
Shapes: N images, H W pixels, K classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dist_resnet.augment import Choices
from dist_resnet.base.errors import UserError
from dist_resnet.base.paths import user_path
from dist_resnet.config.load import stored_config
from dist_resnet.config.plan import make_plan
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.stream import open_loader, training_batches
from dist_resnet.distributed.group import start, stop
from dist_resnet.runs.weights import find_weights, trained_model
from dist_resnet.training.gallery import augmented, choices_at
from dist_resnet.training.session import Session, open_session

SHOWN = 24
"""Mistakes, and augmented samples."""


@dataclass(frozen=True)
class Mistake:
    """An image that the model got wrong."""

    pixels: NDArray[np.uint8]
    """(H, W, 3)."""
    truth: str
    predicted: str
    loss: float
    """Cross-entropy in nats."""


@dataclass(frozen=True)
class Augmented:
    """What the network was given in one step of training."""

    step: int
    """From 0."""
    pixels: NDArray[np.uint8]
    """(N, H, W, 3)."""
    labels: list[str]
    lam: float | None
    """Mixup's weight of the image itself; None: no mixup."""


@dataclass(frozen=True)
class Examples:
    """All of it, for one checkpoint."""

    file: str
    step: int
    eval_set: str
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    """(K, K): rows are true classes, columns predictions."""
    mistakes: list[Mistake]
    """Those of the largest loss, the largest first."""
    augmented: Augmented


def find_examples(run: Path) -> Examples:
    """The examples of a run's newest checkpoint. Nothing is prepared or downloaded.

    Raises:
        UserError: no valid checkpoint, or its dataset is not here.
    """
    file, saved = find_weights(run)
    config = stored_config(saved.config, ["parallel.device=auto"])
    folder = user_path(config.data.root) / config.data.dataset
    if not Dataset.exists(folder):
        raise UserError(f"there is no dataset at {folder}")
    world = start("auto", config.parallel.timeout_seconds)
    try:
        session = open_session(config, world)
        data = session.dataset
        if data.fingerprint != saved.fingerprint:
            raise UserError(f"{folder} is not the dataset of this run")
        evaluator = session.evaluator(session.normalisation())
        result = evaluator(trained_model(saved, config).to(world.device), mistakes=SHOWN)
        assert result.mistakes is not None
        worst = result.mistakes
        pixels = evaluator.images(worst.positions).numpy()
        found = zip(pixels, worst.labels, worst.guesses, worst.losses, strict=True)
        step = saved.state.step
        return Examples(
            file=file.name,
            step=step,
            eval_set=session.eval_set,
            classes=data.classes,
            confusion=result.confusion.numpy(),
            mistakes=[Mistake(x, data.classes[t], data.classes[g], n) for x, t, g, n in found],
            augmented=_augmented(session, step),
        )
    finally:
        stop()


@torch.inference_mode()
def _augmented(session: Session, done: int) -> Augmented:
    """The first replica's batch of the last step before `done`, as the network was given it."""
    config, data, host = session.config, session.dataset, torch.device("cpu")
    plan = make_plan(config, len(session.train_indices), session.world.size)
    step, size = max(done - 1, 0), plan.batch_size_per_replica
    loader = open_loader("ffcv", data.train_path, size * plan.replicas_per_rank, host)
    indices, rank = session.train_indices, session.world.rank
    batches = training_batches(loader, config.seed, indices, plan, rank, step, host)
    batch = next(batches)
    samples = batch.samples[:size]
    pixels = augmented(config, data, step, batch.images[:size], samples)
    labels = [data.classes[k] for k in batch.labels[:size].tolist()]
    batches.close()  # only now: its buffers hold the batch
    choices = choices_at(config, data, step, samples)
    lam = None if choices.lam is None else float(choices.lam)
    return Augmented(step, pixels[:SHOWN], _mixed_labels(labels, choices, lam)[:SHOWN], lam)


def _mixed_labels(labels: list[str], choices: Choices, lam: float | None) -> list[str]:
    if choices.partner is None or lam is None:
        return labels
    if 1 - lam < 0.005:  # would be shown as 1.00 and 0.00
        return labels
    partners = [labels[i] for i in choices.partner.tolist()]
    return [f"{lam:.2f} {a} + {1 - lam:.2f} {b}" for a, b in zip(labels, partners, strict=True)]
