"""What W&B shows beside the curves: the augmented batch, the confusion matrix, the worst mistakes.

Every rank has a gallery, as finding the mistakes takes all of them; the first one's holds the pen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_resnet.augment import Augmenter, ChoiceDrawer, Choices, Normalisation
from dist_resnet.base.randomness import step_keys, turn_keys
from dist_resnet.config.plan import make_plan
from dist_resnet.config.schema import Config
from dist_resnet.data.dataset import Dataset
from dist_resnet.data.stream import Batch
from dist_resnet.tracking import pictures
from dist_resnet.tracking.tracker import Media, Picture
from dist_resnet.tracking.wandb_writer import WandbTracker
from dist_resnet.training.evaluation import Evaluation, Evaluator

SHOWN = 64  # images of the batch
MISTAKES = 32

_HOST = torch.device("cpu")


@dataclass
class Gallery:
    """Pictures of one run, each wandb.media_every_epochs, made by W&B's own thread."""

    config: Config
    dataset: Dataset
    wandb: WandbTracker | None
    """None on all ranks but the first."""
    _batch_shown: bool = False

    def batch(self, step: int, batch: Batch) -> None:
        """Show this process's first batch as training sees it: that of the first local replica."""
        if self._batch_shown:
            return
        self._batch_shown = True
        if self.wandb is None:
            return
        size = self.config.data.batch_size_per_replica
        # Copies: the next batch overwrites this one.
        images, samples = (t[:size].to(_HOST, copy=True) for t in (batch.images, batch.samples))
        self.wandb.show(
            lambda: {
                "step": step,
                "data/train_batch": Picture(
                    pictures.grid(augmented(self.config, self.dataset, step, images, samples)),
                    f"step {step}: the first replica's batch, augmented",
                ),
            }
        )

    def mistakes_at(self, epoch: int, at_end: bool) -> int:
        """How many of the worst mistakes the evaluation after `epoch` epochs is to find."""
        every, before = self.config.wandb.media_every_epochs, epoch - self.config.eval.every_epochs
        due = at_end or epoch // every > before // every
        return MISTAKES if due else 0

    def evaluation(self, step: int, at_end: bool, result: Evaluation, evaluator: Evaluator) -> None:
        """Show an evaluation that was asked for its mistakes; at the end with W&B's own chart."""
        if self.wandb is None or result.mistakes is None:
            return
        worst, classes = result.mistakes, self.dataset.classes
        images = evaluator.images(worst.positions).numpy()
        counts = result.confusion.numpy()

        def make() -> Media:
            caption = f"step {step}: {result.correct} of {result.images} right"
            media: dict[str, int | Picture | list[list[int]]] = {"step": step}
            media["val/confusion_image"] = Picture(pictures.confusion(counts, classes), caption)
            if len(images):
                found = zip(worst.labels, worst.guesses, worst.losses, strict=True)
                captions = [f"{classes[t][:9]}\n>{classes[g][:9]} {x:.1f}" for t, g, x in found]
                text = f"step {step}: true class > prediction, loss"
                media["val/worst"] = Picture(pictures.grid(images, captions), text)
            if at_end:
                media["val/confusion_matrix"] = counts.tolist()
            return media

        self.wandb.show(make, classes)


def choices_at(config: Config, dataset: Dataset, step: int, samples: Tensor) -> Choices:
    """What a replica's batch of step `step` was augmented by, dropout aside.

    Args:
        samples: int64 (N,), indices in the training set.
    """
    draw = ChoiceDrawer(config.augment, (dataset.height, dataset.width), 0.0, 0, _HOST)
    plan = make_plan(config, dataset.num_train - config.data.val_split, 1)
    key = step_keys(config.seed, step + 1, _HOST)[step]
    turn = turn_keys(config.seed, step + 1, plan.steps_per_epoch, _HOST)[step]
    return draw(key, samples, turn)


def augmented(
    config: Config, dataset: Dataset, step: int, images: Tensor, samples: Tensor
) -> np.ndarray:
    """A replica's batch as its step sees it, in visible colours: uint8 (<= SHOWN, H, W, 3).

    Args:
        images: uint8 (N, H, W, 3), the whole batch: mixup takes partners from all of it.
        samples: int64 (N,), indices in the training set.
    """
    size = dataset.height, dataset.width
    scale = dataset.channel_scale(config.data.normalisation)
    statistics = Normalisation.of(*scale, dataset.width, _HOST)
    choices = choices_at(config, dataset, step, samples)
    inputs = Augmenter(config.augment, statistics)(images, choices)[:SHOWN]
    # normalise() backwards: rows of 3 W values.
    rows = inputs.permute(0, 2, 3, 1).flatten(2) / statistics.scale + statistics.mean
    pixels = rows.round().clamp(0, 255).byte()
    return pixels.view(len(inputs), *size, 3).numpy()
