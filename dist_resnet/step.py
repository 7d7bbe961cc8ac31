"""One optimisation step: augment, forward, backward for each local replica, reduce, update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_resnet import signals
from dist_resnet.allocator import keep_freed_memory
from dist_resnet.augment import ChoiceDrawer, Choices, Normalisation, augment
from dist_resnet.data.stream import Batch
from dist_resnet.distributed import world_size
from dist_resnet.loss import mixed_targets, soft_cross_entropy, weighted_correct
from dist_resnet.optim import SMALLEST_SCALE, ema_weight
from dist_resnet.randomness import step_keys
from dist_resnet.reduction import build_reduction
from dist_resnet.schema import Config
from dist_resnet.state import TrainState
from dist_resnet.step_mode import choose_step_mode, forward_function


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
    ) -> None:
        keep_freed_memory()
        self.config = config
        self.state = state
        self.rates = rates
        self.local = replicas // world_size()
        self.reduction = build_reduction(
            config.parallel.reduction,
            state.flat.exchange.numel(),
            replicas,
            self.local,
            state.flat.exchange.device,
        )
        self.precision = precision
        self.statistics = statistics
        self.device = state.flat.values.device
        head = state.flat.model.head
        self.classes = head.out_features
        mode, _ = choose_step_mode(config.train.step_mode, config, self.device)
        self.forward = forward_function(mode, state.flat.model)
        self.keys = step_keys(config.seed, len(rates), self.device)
        self.steps = torch.arange(len(rates), device=self.device)
        self.draw = ChoiceDrawer(
            config.augment, image_size, config.model.dropout, head.in_features, self.device
        )

    def __call__(self, batch: Batch) -> None:
        """Train on `batch`, which must be that of step `state.step`."""
        step = self.state.step
        self._average_over_replicas(batch, self.keys[step])
        self._update(step)
        self.state.step = step + 1

    def _average_over_replicas(self, batch: Batch, key: Tensor) -> None:
        """Leave in `exchange` the means, over all replicas, of what each of them computed."""
        flat, size = self.state.flat, self.config.data.batch_size_per_replica
        stop = float(signals.received() != 0)
        # Every replica starts from the same statistics and moves them by its own batch's.
        start = flat.statistics.clone() if self.local > 1 else None
        for index in range(self.local):
            part = slice(index * size, (index + 1) * size)
            flat.gradients.zero_()
            flat.extras.zero_()
            if start is not None:
                flat.statistics.copy_(start)
            self._replica(batch.images[part], batch.labels[part], batch.samples[part], key)
            flat.extras[2] = stop
            self.reduction.add(flat.exchange)
        self.reduction.finish(flat.exchange)

    def _replica(self, images: Tensor, labels: Tensor, samples: Tensor, key: Tensor) -> None:
        """Add one replica's gradients, loss and top-1 to `exchange`."""
        extras = self.state.flat.extras
        choices = self.draw(key, samples)
        loss, correct = self._forward(images, labels, choices)
        scaling = self.state.loss_scale
        (loss if scaling is None else loss * scaling.scale).backward()
        extras[0] += loss.detach()
        extras[1] += correct / len(labels)

    def _forward(self, images: Tensor, labels: Tensor, choices: Choices) -> tuple[Tensor, Tensor]:
        inputs = augment(images, choices, self.config.augment, self.statistics)
        if not self.config.precision.channels_last:
            inputs = inputs.contiguous()
        targets = mixed_targets(labels, choices, self.classes, self.config.optim.label_smoothing)
        with torch.autocast(
            self.device.type, self.precision, enabled=self.precision != torch.float32
        ):
            logits = self.forward(inputs, choices.keep)
        return soft_cross_entropy(logits, targets), weighted_correct(logits, labels, choices)

    def _update(self, step: int) -> None:
        state, flat = self.state, self.state.flat
        overflow = None
        if state.loss_scale is not None:
            flat.gradients.div_(state.loss_scale.scale)
        norm = torch.linalg.vector_norm(flat.gradients)
        if state.loss_scale is not None:
            overflow = (~torch.isfinite(norm)).float()
            norm = torch.where(overflow > 0, 0.0, norm)  # skipped steps leave the mean norm finite
            state.loss_scale.update(overflow)
        state.optimizer.step(self.rates[step], overflow)
        if state.ema is not None:
            weight, size = ema_weight(self.config.train.ema_decay, step), flat.values.numel()
            state.ema[:size].lerp_(flat.values, weight)
            state.ema[size:].lerp_(flat.statistics, weight)
        loss, top1, _ = flat.extras.unbind()
        # fp16 probes for overflow: an infinite gradient is then a skipped step, no divergence,
        # unless no scale is small enough.
        finite = torch.isfinite(loss + norm)
        if state.loss_scale is not None:
            finite &= state.loss_scale.scale > SMALLEST_SCALE
        state.totals.add(loss, top1, norm, self.steps[step], ~finite)
