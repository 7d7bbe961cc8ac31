"""The state of a run at a step: a checkpoint is exactly this, and the step its only position."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_resnet.base.errors import UserError
from dist_resnet.config.schema import Config
from dist_resnet.distributed.flat import FlatModel, flatten_model
from dist_resnet.models.contract import Traits, checked_model
from dist_resnet.models.matching import Start, start_from
from dist_resnet.optim.build import RunOptimizer, build_optimizer
from dist_resnet.optim.sgd import LossScale
from dist_resnet.step.measures import MEASURES
from dist_resnet.step.totals import Totals


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bits of a state dict: equal where two models' weights are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + bits.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """A `TrainState` at one step: plain numbers and tensors on the CPU, parameters by name."""

    step: int
    model: dict[str, Tensor]
    """Parameters and buffers, in their own shapes."""
    optimizer: dict[str, Any]
    """As `OptimizerState.state_dict`; empty: as before the first step."""
    ema: dict[str, Tensor] | None
    """As `model`; None: no moving average was kept."""
    loss_scale: dict[str, Any] | None
    totals: dict[str, Any]
    best: dict[str, float]
    best_at_low_rate: float = 0.0
    stopped_early: bool = False

    @property
    def evaluated(self) -> dict[str, Tensor]:
        """What training evaluated: the moving average where one was kept."""
        return self.model if self.ema is None else self.ema


@dataclass
class TrainState:
    """Mutable; owned by the training loop."""

    flat: FlatModel
    optimizer: RunOptimizer
    loss_scale: LossScale | None
    ema: Tensor | None
    """float32 (P + S,): moving average of parameters and BatchNorm statistics."""
    totals: Totals
    traits: Traits = field(default_factory=Traits)
    told: str = ""
    """What the reader should know of the starting weights; empty: nothing."""
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """val/top1 and step of the best evaluation so far."""
    best_at_low_rate: float = 0.0
    """Best val/top1 since the learning rate is low: what train.early_stop compares with."""
    stopped_early: bool = False
    """Whether train.early_stop ended the run at this step."""

    def tensors(self) -> list[Tensor]:
        """All that a step on the device changes."""
        found = [self.flat.values, self.flat.exchange, self.flat.row]
        found += [*self.optimizer.state.tensors(), *self.totals.tensors]
        found += self.flat.counters.values
        if self.ema is not None:
            found.append(self.ema)
        if self.loss_scale is not None:
            found += [self.loss_scale.scale, self.loss_scale.good_steps]
        return found

    def snapshot(self) -> Snapshot:
        """A copy of all of it."""
        with self.evaluated_weights():
            evaluated = _by_name(self.flat.model)
        return Snapshot(
            step=self.step,
            model=evaluated if self.ema is None else _by_name(self.flat.model),
            optimizer=self.optimizer.state.state_dict(),
            ema=None if self.ema is None else evaluated,
            loss_scale=None if self.loss_scale is None else self.loss_scale.state_dict(),
            totals=self.totals.state_dict(),
            best=dict(self.best),
            best_at_low_rate=self.best_at_low_rate,
            stopped_early=self.stopped_early,
        )

    def restore(self, saved: Snapshot) -> None:
        """The inverse of `snapshot`.

        Raises:
            UserError: saved from another model.
        """
        flat = self.flat
        if self.ema is not None:
            load_tensors(flat.model, saved.evaluated)
            self.ema.copy_(_averaged_values(flat))
        load_tensors(flat.model, saved.model)
        if saved.optimizer:
            self.optimizer.state.load_state_dict(saved.optimizer)
        if self.loss_scale is not None and saved.loss_scale is not None:
            self.loss_scale.load_state_dict(saved.loss_scale)
        self.totals.load_state_dict(saved.totals)
        self.step = saved.step
        self.best = dict(saved.best)
        self.best_at_low_rate = saved.best_at_low_rate
        self.stopped_early = saved.stopped_early

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """While open, the model holds the weights to evaluate: their moving average if kept."""
        if self.ema is None:
            yield
            return
        current = _averaged_values(self.flat)
        self._set_values(self.ema)
        try:
            yield
        finally:
            self._set_values(current)

    def _set_values(self, values: Tensor) -> None:
        size = self.flat.values.numel()
        self.flat.values.copy_(values[:size])
        self.flat.statistics.copy_(values[size:])


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model's parameters and buffers of the same names.

    Not `Module.load_state_dict`: without the metadata of its own state_dict, which is no plain
    tensor, BatchNorm takes the saved layers for those of torch 0.4 and asks for a counter.

    Raises:
        UserError: other names or shapes.
    """
    own = model.state_dict()
    if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in tensors.items()}:
        raise UserError("the checkpoint holds another model's weights; choose its configuration")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def build_state(
    config: Config,
    classes: int,
    precision: torch.dtype,
    device: torch.device,
    image_size: tuple[int, int] | None = None,
    start: Start | None = None,
) -> TrainState:
    """The state before the first step: a function of the configuration and `start`.

    Args:
        image_size: (height, width) of what a net of the user's own is tried on.
        start: weights to begin with; None: random ones.

    Raises:
        UserError: the net cannot be trained, or `start` is of another one.
    """
    model, traits = checked_model(config, classes, image_size, precision, device)
    told = ""
    if start is not None:
        told, _ = start_from(model, start, config.model, classes)
    flat = flatten_model(model, len(MEASURES))
    scaled = precision == torch.float16
    return TrainState(
        flat=flat,
        optimizer=build_optimizer(flat, config, scaled),
        loss_scale=LossScale(device) if scaled else None,
        ema=_averaged_values(flat) if config.train.ema_decay else None,
        totals=Totals(device, tuple(MEASURES)),
        traits=traits,
        told=told,
    )


def _averaged_values(flat: FlatModel) -> Tensor:
    return torch.cat([flat.values, flat.statistics])


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    """A copy of its parameters and buffers, on the CPU and dense."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
