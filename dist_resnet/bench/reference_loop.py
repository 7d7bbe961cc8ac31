"""The loop everyone writes, to be measured against: nothing of it is used in training.

torchvision's transforms, torch's DataLoader, autocast, SGD and DistributedDataParallel, `.item()`
in every step; the model's layers and the recipe (mixup, dropout, weight decay) are ours, so that
the same work is compared. DDP itself is the subject here: nothing outside of the bench imports
torch.nn.parallel.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from dist_resnet.bench.workers import Gate, in_turns
from dist_resnet.config.schema import AugmentConfig, Config
from dist_resnet.data.beton import read_back
from dist_resnet.data.dataset import Dataset as Prepared
from dist_resnet.distributed.group import World
from dist_resnet.models.build import build_model
from dist_resnet.step.precision import autocast
from dist_resnet.training.session import open_session


class ArrayDataset(Dataset[tuple[Any, int]]):
    """As torchvision.datasets.CIFAR10: an array in memory, a PIL image for the transforms."""

    def __init__(self, prepared: Prepared, augment: AugmentConfig) -> None:
        from torchvision import transforms

        split = read_back(prepared.train_path)
        self.images = np.asarray(split.images)
        self.labels: list[int] = split.labels.tolist()
        steps: list[Any] = []
        if augment.crop_padding:
            size = prepared.height, prepared.width
            steps.append(transforms.RandomCrop(size, padding=augment.crop_padding))
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        mean = [value / 255 for value in prepared.mean]
        std = [(value or 1.0) / 255 for value in prepared.std]  # where a channel never varies
        steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
        self.transform = transforms.Compose(steps)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


def torch_loader(
    data: Dataset[Any], workers: int, device: torch.device, **batching: Any
) -> DataLoader[tuple[Tensor, Tensor]]:
    """torch's, whose workers stay alive from epoch to epoch.

    Args:
        batching: what it takes besides, to put samples into batches.
    """
    return DataLoader(
        data, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda", **batching,
    )  # fmt: skip


class ReferenceLoop:
    """Model, criterion, optimizer, and one step on a batch of normalised images.

    Args:
        precision: float32, or what autocast computes in.
        channels_last: memory layout of model and images.
    """

    def __init__(
        self,
        config: Config,
        classes: int,
        world: World,
        precision: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        self.device = world.device
        self.autocast = autocast(world.device, precision)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.alpha = config.augment.mixup_alpha
        self.model = as_torch_makes_it(config, classes, world, self.layout)
        if world.size > 1:
            self.model = DistributedDataParallel(self.model)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.optim.label_smoothing)
        self.optimizer = torch_sgd(config, self.model)
        self.random = np.random.default_rng(config.seed)
        self.running_loss, self.correct, self.seen = 0.0, 0, 0

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train on one batch; its loss."""
        images = images.to(self.device, memory_format=self.layout, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        lam, others = 1.0, labels
        if self.alpha:
            lam = float(self.random.beta(self.alpha, self.alpha))
            order = torch.randperm(len(labels), device=self.device)
            images = lam * images + (1 - lam) * images[order]
            others = labels[order]
        self.optimizer.zero_grad()
        with self.autocast:
            logits = self.model(images)
            loss = self.criterion(logits, labels)
            if self.alpha:
                loss = lam * loss + (1 - lam) * self.criterion(logits, others)
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        self.running_loss += value
        self.correct += int(logits.argmax(dim=1).eq(labels).sum().item())
        self.seen += len(labels)
        return value


def as_torch_makes_it(
    config: Config, classes: int, world: World, layout: torch.memory_format
) -> nn.Module:
    """The configured model on its device, with nn.BatchNorm2d's counter of batches."""
    model = build_model(config.model, classes, config.seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = torch.tensor(0)
    return model.to(world.device).to(memory_format=layout)


def torch_sgd(config: Config, model: nn.Module) -> torch.optim.SGD:
    """The configured optimizer, as torch has it."""
    optim = config.optim
    return torch.optim.SGD(
        model.parameters(), optim.lr, optim.momentum, 0, optim.weight_decay, optim.nesterov
    )


def train(config: Config, world: World, gate: Gate, steps: int, workers: int, tuned: bool) -> None:
    """Train on the prepared data set, `steps` steps a turn.

    Args:
        workers: of the DataLoader.
        tuned: give it our precision and channels-last; else float32 and NCHW.
    """
    session = open_session(config, world)
    precision = session.precision if tuned else torch.float32
    loop = ReferenceLoop(config, len(session.dataset.classes), world, precision, tuned)
    data = ArrayDataset(session.dataset, config.augment)
    sampler: Any = DistributedSampler(data) if world.size > 1 else RandomSampler(data)
    loader = torch_loader(
        data, workers, world.device, sampler=sampler, drop_last=True,
        batch_size=config.data.batch_size_per_replica,
    )  # fmt: skip

    def epochs() -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            if world.size > 1:
                sampler.set_epoch(epoch)
            yield from loader

    loop.model.train()
    for images, labels in in_turns(epochs().__next__, steps, gate):
        loop.step(images, labels)
