"""Our own loop on batches in memory, with the configured model or with a single dense layer."""

import torch
from torch import Tensor, nn

from dist_resnet.augment import Choices, Normalisation
from dist_resnet.bench.gate import Gate
from dist_resnet.bench.our_loop import MemoryFedStep, fit_on, quiet
from dist_resnet.config.plan import make_plan, rates
from dist_resnet.config.schema import Config
from dist_resnet.data.stream import Batch
from dist_resnet.distributed.flat import flatten_model
from dist_resnet.distributed.group import World
from dist_resnet.optim.build import build_optimizer
from dist_resnet.step.precision import choose_dtype
from dist_resnet.step.replica_pass import KernelPass, ReplicaChoices
from dist_resnet.step.state import TrainState, build_state
from dist_resnet.step.totals import Totals
from dist_resnet.training.session import with_replicas

FEATURES, CLASSES, KEPT = 32, 10, 8
_IMAGES = 50_000
_UNMIXED = Choices(None, None, None, None, None, None, None, None)


class DenseModel(nn.Module):
    """One dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images)


def train_ours(config: Config, world: World, gate: Gate, steps: int, tiny: bool) -> None:
    """Train, `steps` steps a turn.

    Raises:
        Finished: the gate has closed.
    """
    config = quiet(with_replicas(config, world.size))
    precision, _ = choose_dtype(config.precision, world.device)
    plan = make_plan(config, _IMAGES, world.size)
    state = _dense_state(config, world) if tiny else _model_state(config, precision, world)
    statistics = Normalisation.of((0, 0, 0), (1, 1, 1), 32, world.device)
    step = MemoryFedStep(
        config,
        state,
        rates(config, plan),
        plan.replicas,
        precision,
        statistics,
        (32, 32),
        plan.steps_per_epoch,
    )
    at_once = isinstance(step.replica_pass, KernelPass)
    step.hold(_UNMIXED if at_once else ReplicaChoices([_UNMIXED]))
    size = config.data.batch_size_per_replica
    shape = (size, FEATURES) if tiny else (size, 3, 32, 32)
    layout = torch.contiguous_format
    if not tiny and config.precision.channels_last:
        layout = torch.channels_last
    batches = [
        Batch(
            torch.randn(shape).to(world.device, memory_format=layout),
            torch.randint(CLASSES, (size,)).to(world.device),
            torch.arange(size, device=world.device),
        )
        for _ in range(KEPT)
    ]
    position = 0

    def draw() -> Batch:
        nonlocal position
        position += 1
        return batches[position % KEPT]

    fit_on(step, plan, world, draw, steps, gate)


def _model_state(config: Config, precision: torch.dtype, world: World) -> TrainState:
    return build_state(config, CLASSES, precision, world.device)


def _dense_state(config: Config, world: World) -> TrainState:
    flat = flatten_model(DenseModel().to(world.device))
    return TrainState(
        flat=flat,
        optimizer=build_optimizer(flat, config),
        loss_scale=None,
        ema=None,
        totals=Totals(world.device),
    )
