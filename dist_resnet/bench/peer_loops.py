"""The same few batches, model and optimizer in the loop that each framework has one write.

Nothing else in this package imports a framework, and nothing needs one.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dist_resnet.bench.gate import Finished, Gate, in_turns
from dist_resnet.bench.reference_loop import as_torch_makes_it
from dist_resnet.config.schema import Config
from dist_resnet.distributed.group import World
from dist_resnet.step.precision import choose_dtype
from dist_resnet.training.session import choose_threads, sharing_cores

FEATURES, CLASSES, KEPT = 32, 10, 8
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


def train(config: Config, world: World, gate: Gate, framework: str, steps: int, tiny: bool) -> None:
    """Train under `framework`, `steps` steps a turn, until the gate closes.

    Raises:
        Finished: it has.
    """
    torch.set_num_threads(choose_threads(config, sharing_cores(world)))
    if framework == "ours":
        from dist_resnet.bench.tiny import train_ours

        train_ours(config, world, gate, steps, tiny)
    setup = _setup(config, world, gate, steps, tiny)
    loops: dict[str, Callable[[Setup], None]] = {
        "bare loop": _bare,
        "Fabric": _fabric,
        "Lightning": _lightning,
        "Accelerate": _accelerate,
        "Composer": _composer,
        "timm": _timm,
    }
    loops[framework](setup)
    raise Finished


def _setup(config: Config, world: World, gate: Gate, steps: int, tiny: bool) -> Setup:
    generator = torch.Generator().manual_seed(config.seed + world.rank)
    size = config.data.batch_size_per_replica
    shape = (size, FEATURES) if tiny else (size, 3, 32, 32)
    images = [torch.randn(shape, generator=generator).to(world.device) for _ in range(KEPT)]
    labels = [
        torch.randint(CLASSES, (size,), generator=generator).to(world.device) for _ in range(KEPT)
    ]
    model: nn.Module
    if tiny:
        model = nn.Linear(FEATURES, CLASSES)
    else:
        model = as_torch_makes_it(config, CLASSES)
    model = model.to(world.device)
    if not tiny and config.precision.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = [image.to(memory_format=torch.channels_last) for image in images]
    optim = config.optim
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=optim.momentum, weight_decay=optim.weight_decay
    )
    position = 0

    def draw() -> tuple[Tensor, Tensor]:
        nonlocal position
        position += 1
        return images[position % KEPT], labels[position % KEPT]

    precision, _ = choose_dtype(config.precision, world.device)
    return Setup(model, optimizer, draw, steps, world, precision, gate)


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

    def batches() -> Iterator[Any]:
        yield from setup.batches()
        raise Finished  # or it would start another epoch

    loader = torch.utils.data.DataLoader(_Stream(batches), batch_size=None)
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
