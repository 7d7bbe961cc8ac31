"""One optimisation step: augment, forward and backward for the local replicas, reduce, update."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from dist_resnet.augment import ChoiceDrawer, Normalisation
from dist_resnet.base import signals
from dist_resnet.base.generators import replica_seeds, set_generators
from dist_resnet.base.randomness import step_keys, turn_keys
from dist_resnet.config.plugins import is_plugin, within_step
from dist_resnet.config.schema import Config
from dist_resnet.data.stream import Batch
from dist_resnet.distributed.group import rank, world_size
from dist_resnet.distributed.reduction import build_reduction
from dist_resnet.machine.allocator import keep_freed_memory
from dist_resnet.models.dropout import dropouts, num_features, probability_of, set_factors
from dist_resnet.models.norm_act import NormAct
from dist_resnet.optim.sgd import ema_weight
from dist_resnet.step.cuda_graph import capturing
from dist_resnet.step.distill import Distillation
from dist_resnet.step.mode import choose_step_mode, forward_function, replicas_at_once
from dist_resnet.step.precision import autocast
from dist_resnet.step.replica_pass import pass_kind
from dist_resnet.step.shadow import Shadow
from dist_resnet.step.state import TrainState
from dist_resnet.step.update import build_update, update_by_torch


class TrainStep:
    """Advances a `TrainState` by one step; nothing in it waits for the device."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        rates: Sequence[float],
        replicas: int,
        precision: torch.dtype,
        statistics: Normalisation,
        image_size: tuple[int, int],
        steps_per_epoch: int,
        distillation: Distillation | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        keep_freed_memory()
        self.config = config
        self.state = state
        self.rates = rates
        self.distillation = distillation
        self.local = replicas // world_size()
        self.precision = precision
        flat = state.flat
        self.device = flat.values.device
        mode, _ = choose_step_mode(config.train.step_mode, config, self.device)
        self.group = replicas_at_once(config, self.local, self.device, state.traits)
        self.own = is_plugin(config.model.name)
        self.seeds = None
        if state.traits.draws or self.own:  # which may begin to draw later than in its trial
            mine = range(rank() * self.local, (rank() + 1) * self.local)
            self.seeds = replica_seeds(step_keys(config.seed, len(rates)), mine)
        on_cpu = self.device.type == "cpu"
        self.reduction = build_reduction(
            config.parallel.reduction, flat, replicas, self.local, on_cpu
        )
        self.shadow = None
        # A net of the user's own may use its weights outside of autocast.
        casts = precision != torch.float32 and not self.own and mode != "compile"
        if casts and not self.reduction.in_chunks:
            self.shadow = Shadow(flat, precision)
        self.leaves = flat.parameters if self.shadow is None else self.shadow.leaves
        # Each gradient where it belongs, as soon as it is there; on a GPU that is a launch each.
        self.in_place = self.shadow is None and on_cpu
        order = config.precision.channels_last
        self.forward = forward_function(mode, flat.model, self.group, order)
        if self.shadow is not None:
            self.forward = self.shadow.forward
        self.update = build_update(state, config.optim)
        self.keys = step_keys(config.seed, len(rates), self.device)
        self.turns = None
        if config.augment.flip == "alternating":
            self.turns = turn_keys(config.seed, len(rates), steps_per_epoch, self.device)
        self.stop = torch.zeros((), device=self.device)
        self.autocast = autocast(self.device, precision)
        self.dropouts = dropouts(flat.model)
        dropped = probability_of(self.dropouts), num_features(self.dropouts)
        draw = ChoiceDrawer(config.augment, image_size, *dropped, self.device)
        settings = config.augment, config.optim.label_smoothing, draw, statistics
        kind = pass_kind(config.augment, self.device)
        self.replica_pass = kind(*settings, self.group, precision, class_weights)

    @contextmanager
    def by_torch(self) -> Iterator[None]:
        """While open, steps are made of PyTorch's operations: what our kernels are held to."""
        own, update, model = self.replica_pass, self.update, self.state.flat.model
        fused = {m: m.fused for m in model.modules() if isinstance(m, NormAct)}
        self.replica_pass = own.by_torch()
        self.update = update_by_torch(self.state, self.config.optim)
        for module in fused:
            module.fused = False
        try:
            yield
        finally:
            self.replica_pass, self.update = own, update
            for module, value in fused.items():
                module.fused = value

    def forget(self) -> None:
        """Be as before a step that was begun and will not be finished."""
        self.reduction.forget()
        self.state.flat.restore_buffers()

    def close(self) -> None:
        """Give up what must not outlive the process group: nothing."""

    def __call__(self, batch: Batch) -> None:
        """Train on `batch`, which must be that of step `state.step`."""
        step = self.state.step
        self.pass_on_signals()
        weight, turn = self.ema_weight(step), self.turn(step)
        self.advance(batch, self.keys[step], self.rates[step], weight, turn)
        self.state.step = step + 1

    def pass_on_signals(self) -> None:
        """Let a request to stop travel with the next step's gradients."""
        if signals.received():
            self.stop.fill_(1.0)

    def turn(self, step: int) -> Tensor | None:
        """int64, 0-dimensional: of the step's epoch; None where nothing asks for it."""
        return None if self.turns is None else self.turns[step]

    def ema_weight(self, step: int) -> float:
        return ema_weight(self.config.train.ema_decay, step)

    def advance(
        self,
        batch: Batch,
        key: Tensor,
        lr: float | Tensor,
        ema_weight: float | Tensor,
        turn: Tensor | None = None,
    ) -> None:
        """What the device does in one step, given all that depends on the step's number.

        Args:
            key, turn: int64, 0-dimensional; random choices follow from them.
            lr, ema_weight: numbers, or 0-dimensional float32 tensors.
        """
        self.average_over_replicas(batch, key, turn)
        self.update(lr, ema_weight)

    def average_over_replicas(self, batch: Batch, key: Tensor, turn: Tensor | None = None) -> None:
        """Leave in `exchange` the means, over all replicas, of what each of them computed."""
        self.sum_over_local(batch, key, turn)
        self.finish_average()

    def sum_over_local(self, batch: Batch, key: Tensor, turn: Tensor | None = None) -> None:
        """The part of an average that needs no other rank, unless gradients travel in chunks."""
        flat, size = self.state.flat, self.group * self.config.data.batch_size_per_replica
        if self.shadow is not None:
            self.shadow.refresh()
        # Every replica starts from the same statistics and moves them by its own batch's.
        start = flat.statistics.clone() if self.local > self.group else None
        flat.counters.note()
        last = self.local // self.group - 1
        for number in range(last + 1):
            part = slice(number * size, (number + 1) * size)
            if start is not None:
                flat.statistics.copy_(start)
                flat.counters.restart()
            if number == last:
                self.reduction.expect_last(flat.exchange)
            self.set_generators(number)
            images, labels, samples = batch.images[part], batch.labels[part], batch.samples[part]
            self.sum_over_group(images, labels, samples, key, turn)
            self.reduction.add(flat.exchange)

    def finish_average(self) -> None:
        """The rest of an average: a collective."""
        flat = self.state.flat
        self.reduction.finish(flat.exchange)
        flat.counters.finish(flat.counts)

    def set_generators(self, number: int) -> None:
        """Set what a net draws from, before the forward pass of local replica `number`.

        Not while a graph is captured: then before the replay, of the one local replica.
        """
        if self.seeds is not None and not capturing(self.device):
            set_generators(int(self.seeds[self.state.step, number]), self.device)

    def sum_over_group(
        self,
        images: Tensor,
        labels: Tensor,
        samples: Tensor,
        key: Tensor,
        turn: Tensor | None = None,
    ) -> None:
        """Put gradients, losses and top-1, summed over replicas side by side, into `exchange`."""
        flat, scaling = self.state.flat, self.state.loss_scale
        inputs, choices = self.replica_pass.inputs(images, samples, key, turn)
        if not self.config.precision.channels_last:
            inputs = inputs.contiguous()
        if self.own:
            inputs = inputs.float()  # our kernels' are of the lower type already
        set_factors(self.dropouts, choices.keep)
        name = self.config.model.name
        with within_step("model.name", name) if self.own else nullcontext(), self.autocast:
            logits = self.forward(inputs)
        scale = None if scaling is None else scaling.scale
        objective = self.replica_pass.objective(logits, labels, choices, scale)
        if self.distillation is not None:
            with self.autocast:
                targets = self.distillation.targets(inputs)
            objective = self.distillation.objective(objective, logits, targets, self.group, scale)
        if self.in_place:
            flat.gradients.zero_()
            torch.autograd.backward(objective.output, objective.gradient, inputs=flat.parameters)
        else:
            found = torch.autograd.grad(
                objective.output, self.leaves, objective.gradient, allow_unused=True
            )
            pairs = zip(found, self.leaves, strict=True)
            flat.collect([torch.zeros_like(p) if g is None else g for g, p in pairs])
        flat.hold_buffers()
        flat.counters.put(flat.counts)
        flat.row[: len(objective.row)].copy_(objective.row)
        flat.stop.copy_(self.stop)
