"""The same few batches, model and optimizer in the loop that each framework has one write.

Nothing else in this package imports a framework, and nothing needs one.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dist_resnet.bench.our_loop import train_on
from dist_resnet.bench.peers import DENSE
from dist_resnet.bench.reference_loop import as_torch_makes_it, torch_sgd
from dist_resnet.bench.workers import Gate, in_turns
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import World
from dist_resnet.step.precision import choose_dtype
from dist_resnet.training.session import choose_threads, sharing_cores

SIDE, CLASSES, KEPT = 4, 10, 8
_LIGHTNING = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
_ACCELERATE = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
_COMPOSER = {torch.float32: "fp32", torch.bfloat16: "amp_bf16", torch.float16: "amp_fp16"}


@dataclass(frozen=True)
class Setup:
    """What every framework is given."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    draw: Callable[[], tuple[Tensor, Tensor]]
    """The next batch, on the device."""
    steps: int
    world: World
    precision: torch.dtype
    gate: Gate

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return in_turns(self.draw, self.steps, self.gate)

    @property
    def accelerator(self) -> str:
        return "gpu" if self.world.device.type == "cuda" else "cpu"


def dense(num_classes: int) -> nn.Module:
    """One dense layer, on images of SIDE x SIDE."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, num_classes))


def train(config: Config, world: World, gate: Gate, framework: str, steps: int) -> None:
    """Train the configured model under `framework`, `steps` steps a turn, until the gate closes.

    Raises:
        Finished: it has.
    """
    torch.set_num_threads(choose_threads(config, sharing_cores(world)))
    side = SIDE if config.model.name == DENSE else 32
    generator = torch.Generator().manual_seed(config.seed + world.rank)
    size = config.data.batch_size_per_replica
    pixels = torch.randint(256, (KEPT, size, side, side, 3), generator=generator).byte()
    labels = torch.randint(CLASSES, (KEPT, size), generator=generator)
    pixels, labels = pixels.to(world.device), labels.to(world.device)
    if framework == "ours":
        train_on(config, world, gate, steps, pixels, labels, CLASSES)
        return
    model = as_torch_makes_it(config, CLASSES).to(world.device)
    images = pixels.permute(0, 1, 4, 2, 3).float() / 255
    if config.precision.channels_last and config.model.name != DENSE:
        model = model.to(memory_format=torch.channels_last)
    else:
        images = images.contiguous()
    draw = itertools.cycle(list(zip(images, labels, strict=True))).__next__
    precision, _ = choose_dtype(config.precision, world.device)
    optimizer = torch_sgd(config, model)
    _LOOPS[framework](Setup(model, optimizer, draw, steps, world, precision, gate))


def _bare(setup: Setup) -> None:
    model = setup.model
    if setup.world.size > 1:
        model = DistributedDataParallel(model)
    is_mixed = setup.precision != torch.float32
    for images, labels in setup.batches():
        setup.optimizer.zero_grad()
        with torch.autocast(setup.world.device.type, setup.precision, enabled=is_mixed):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        setup.optimizer.step()


def _fabric(setup: Setup) -> None:
    lightning: Any = importlib.import_module("lightning.fabric")
    fabric = lightning.Fabric(
        accelerator=setup.accelerator,
        devices=setup.world.local_size,
        strategy="ddp" if setup.world.size > 1 else "auto",
        precision=_LIGHTNING[setup.precision],
    )
    fabric.launch()
    model, optimizer = fabric.setup(setup.model, setup.optimizer)
    for images, labels in setup.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        fabric.backward(loss)
        optimizer.step()


class _Stream(torch.utils.data.IterableDataset[Any]):
    """A data set whose batches come in turns."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


def _lightning(setup: Setup) -> None:
    lightning: Any = importlib.import_module("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = setup.model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return setup.optimizer

    trainer = lightning.Trainer(
        accelerator=setup.accelerator,
        devices=setup.world.local_size,
        strategy="ddp" if setup.world.size > 1 else "auto",
        precision=_LIGHTNING[setup.precision],
        max_epochs=1,
        log_every_n_steps=50,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    loader = torch.utils.data.DataLoader(_Stream(setup.batches), batch_size=None)
    trainer.fit(Module(), loader)


def _accelerate(setup: Setup) -> None:
    accelerate: Any = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(
        cpu=setup.accelerator == "cpu", mixed_precision=_ACCELERATE[setup.precision]
    )
    model, optimizer = accelerator.prepare(setup.model, setup.optimizer)
    for images, labels in setup.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()


def _composer(setup: Setup) -> None:
    composer: Any = importlib.import_module("composer")
    models: Any = importlib.import_module("composer.models")

    class Model(models.ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = setup.model

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return self.model(batch[0])

        def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

    loader = torch.utils.data.DataLoader(_Stream(setup.batches), batch_size=None)
    trainer = composer.Trainer(
        model=Model(),
        train_dataloader=loader,
        optimizers=setup.optimizer,
        max_duration="1000000000ba",
        device_train_microbatch_size=len(setup.draw()[1]),
        device=setup.accelerator,
        precision=_COMPOSER[setup.precision],
        progress_bar=False,
        log_to_console=False,
    )
    trainer.fit()


def _timm(setup: Setup) -> None:
    """timm's task in the loop of its train.py, which reads the loss back after every update."""
    tasks: Any = importlib.import_module("timm.task")
    utils: Any = importlib.import_module("timm.utils")
    world = setup.world
    criterion = nn.CrossEntropyLoss()
    task = tasks.ClassificationTask(setup.model, criterion, device=world.device, verbose=False)
    if world.size > 1:
        task.prepare_distributed([world.local_rank] if world.device.type == "cuda" else None)
    losses = utils.AverageMeter()
    is_mixed = setup.precision != torch.float32
    for images, labels in setup.batches():
        with torch.autocast(world.device.type, setup.precision, enabled=is_mixed):
            loss = task(images, labels)["loss"]
        loss.backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        losses.update(loss.item(), len(labels))


_LOOPS: dict[str, Callable[[Setup], None]] = {
    "bare loop": _bare,
    "Fabric": _fabric,
    "Lightning": _lightning,
    "Accelerate": _accelerate,
    "Composer": _composer,
    "timm": _timm,
}
