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

from dist_resnet.bench import our_loop
from dist_resnet.bench.reference_loop import as_torch_makes_it, torch_sgd
from dist_resnet.bench.workers import Gate, in_turns
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import World
from dist_resnet.step.precision import autocast

SIDE = 4  # of the tiny model's images
DENSE = "dist_resnet.bench.peer_loops:dense"
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

    @property
    def lightning(self) -> dict[str, Any]:
        """What both of Lightning's trainers take."""
        return {
            "accelerator": self.accelerator,
            "devices": self.world.local_size,
            "strategy": "ddp" if self.world.size > 1 else "auto",
            "precision": _LIGHTNING[self.precision],
        }


def dense(num_classes: int) -> nn.Module:
    """One dense layer, on images of SIDE x SIDE."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, num_classes))


def train(config: Config, world: World, gate: Gate, framework: str, steps: int) -> None:
    """Train the configured model under `framework`, `steps` steps a turn."""
    if framework == "ours":
        our_loop.train(config, world, gate, steps, from_memory=True)
        return
    loop = LOOPS[framework][1]
    session, plan = our_loop.opened(config, world)
    last = config.precision.channels_last and config.model.name != DENSE
    layout = torch.channels_last if last else torch.contiguous_format
    draw = itertools.cycle([
        ((b.images.permute(0, 3, 1, 2).float() / 255).contiguous(memory_format=layout), b.labels)
        for b in our_loop.kept(session.batches(plan))
    ]).__next__  # fmt: skip
    model = as_torch_makes_it(config, len(session.dataset.classes), world, layout)
    loop(Setup(model, torch_sgd(config, model), draw, steps, world, session.precision, gate))


def _bare(setup: Setup) -> None:
    model = setup.model
    if setup.world.size > 1:
        model = DistributedDataParallel(model)
    mixed = autocast(setup.world.device, setup.precision)
    for images, labels in setup.batches():
        setup.optimizer.zero_grad()
        with mixed:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        setup.optimizer.step()


def _fabric(setup: Setup) -> None:
    lightning: Any = importlib.import_module("lightning.fabric")
    fabric = lightning.Fabric(**setup.lightning)
    fabric.launch()
    _loop(setup, fabric.setup(setup.model, setup.optimizer), fabric.backward)


def _accelerate(setup: Setup) -> None:
    accelerate: Any = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(
        cpu=setup.accelerator == "cpu", mixed_precision=_ACCELERATE[setup.precision]
    )
    _loop(setup, accelerator.prepare(setup.model, setup.optimizer), accelerator.backward)


def _loop(setup: Setup, wrapped: Any, backward: Callable[[Tensor], None]) -> None:
    """The loop to write where a framework wraps model and optimizer, and takes backward over."""
    model, optimizer = wrapped
    for images, labels in setup.batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        backward(loss)
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
        **setup.lightning,
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
    mixed = autocast(world.device, setup.precision)
    for images, labels in setup.batches():
        with mixed:
            loss = task(images, labels)["loss"]
        loss.backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        losses.update(loss.item(), len(labels))


LOOPS: dict[str, tuple[str | None, Callable[[Setup], None]]] = {
    "bare loop": (None, _bare),
    "Fabric": ("lightning", _fabric),
    "Lightning": ("lightning", _lightning),
    "Accelerate": ("accelerate", _accelerate),
    "Composer": ("mosaicml", _composer),
    "timm": ("timm", _timm),
}
"""Beside ours: the package that is measured, if any, and its loop."""
