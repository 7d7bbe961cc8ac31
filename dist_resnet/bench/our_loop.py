"""Ours as it runs: `training.loop.Trainer` on real batches, with metrics.jsonl and W&B."""

import itertools
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dist_resnet.augment import Normalisation
from dist_resnet.bench.workers import Gate, in_turns
from dist_resnet.config.plan import Plan, make_plan, rates
from dist_resnet.config.schema import AugmentConfig, Config
from dist_resnet.data.stream import Batch
from dist_resnet.distributed.group import World, broadcast_object, on_rank_zero
from dist_resnet.runs.folder import RunFolder
from dist_resnet.step.captured import as_configured
from dist_resnet.step.precision import choose_dtype
from dist_resnet.step.state import build_state
from dist_resnet.step.train_step import TrainStep
from dist_resnet.tracking.tracker import NullTracker
from dist_resnet.training.evaluation import Evaluator
from dist_resnet.training.loop import Trainer
from dist_resnet.training.outputs import Outputs, open_outputs
from dist_resnet.training.session import Session, open_session, with_replicas
from dist_resnet.training.stopwatch import Stopwatch


def train(config: Config, world: World, gate: Gate, steps: int, from_memory: bool = False) -> None:
    """Train, `steps` steps a turn.

    Args:
        from_memory: no loader, augmentation, logging or W&B: the same few batches, over and over.
    """
    config = quiet(with_replicas(config, world.size))
    if from_memory:
        config = unaugmented(config)
    session = open_session(config, world)
    plan = make_plan(config, len(session.train_indices), world.size)
    step, batches = make_step(session, plan), session.batches(plan)
    draw = itertools.cycle(kept(batches)).__next__ if from_memory else batches.__next__
    with _outputs(config, session, plan, from_memory) as outputs:
        try:
            fit(step, plan, world, draw, steps, gate, outputs)
        finally:
            batches.close()


def train_on(
    config: Config,
    world: World,
    gate: Gate,
    steps: int,
    pixels: Tensor,
    labels: Tensor,
    classes: int,
) -> None:
    """As `train` from memory, on batches (B, N, S, S, 3) of uint8 and their labels (B, N)."""
    config = unaugmented(quiet(with_replicas(config, world.size)))
    device, size = world.device, (pixels.shape[2], pixels.shape[3])
    precision, _ = choose_dtype(config.precision, device)
    plan = make_plan(config, 50_000, world.size)
    state = build_state(config, classes, precision, device, size)
    statistics = Normalisation.of((0, 0, 0), (255, 255, 255), size[1], device)
    step = TrainStep(
        config, state, rates(config, plan), plan.replicas, precision, statistics, size,
        plan.steps_per_epoch,
    )  # fmt: skip
    samples = torch.arange(pixels.shape[1], device=device)
    batches = [Batch(x, y, samples) for x, y in zip(pixels, labels, strict=True)]
    fit(step, plan, world, itertools.cycle(batches).__next__, steps, gate)


def fit(
    step: TrainStep,
    plan: Plan,
    world: World,
    draw: Callable[[], Batch],
    steps: int,
    gate: Gate,
    outputs: Outputs | None = None,
) -> None:
    """The real loop on what `draw` gives.

    Raises:
        Finished: the gate has closed.
    """
    outputs = outputs or Outputs(NullTracker(), None)
    trainer = Trainer(
        config=step.config,
        plan=plan,
        state=step.state,
        train_step=as_configured(step, outputs.tracker.message),
        batches=cast(Generator[Batch, None, None], in_turns(draw, steps, gate)),
        evaluate=cast(Evaluator, None),  # `quiet` asks for no evaluation
        classes=(),
        tracker=outputs.tracker,
        watch=Stopwatch(0.0, world.device),
        writer=outputs.writer,
    )
    try:
        trainer.fit()
    finally:
        trainer.train_step.close()


def quiet(config: Config) -> Config:
    """`config` without evaluations, without checkpoints, and long enough."""
    return replace(
        config,
        train=replace(config.train, epochs=max(config.train.epochs, 150), max_steps=None),
        eval=replace(config.eval, every_epochs=0),
        checkpoint=replace(config.checkpoint, every_epochs=0, every_steps=0),
        # The wait at the gate, while others take their turns, is no hang.
        parallel=replace(config.parallel, timeout_seconds=24 * 3600),
    )


def unaugmented(config: Config) -> Config:
    """`config` whose step normalises and mixes images, as its loss demands, and nothing else."""
    alpha = config.augment.mixup_alpha
    plain = AugmentConfig(crop_padding=0, flip=False, mixup_alpha=alpha)
    return replace(config, augment=plain)


def make_step(session: Session, plan: Plan) -> TrainStep:
    """A step from the state that a run starts from."""
    device, classes = session.world.device, len(session.dataset.classes)
    state = build_state(session.config, classes, session.precision, device, session.image_size)
    return session.train_step(plan, state)


def kept(batches: Generator[Batch, None, None], count: int = 8) -> list[Batch]:
    """The first few batches, copied out of the loader's buffers, which is closed."""
    found = [
        Batch(batch.images.clone(), batch.labels.clone(), batch.samples.clone())
        for batch in itertools.islice(batches, count)
    ]
    batches.close()
    return found


@contextmanager
def _outputs(config: Config, session: Session, plan: Plan, silent: bool) -> Iterator[Outputs]:
    """Everything that records, in a folder that is removed afterwards."""
    if silent:
        yield Outputs(NullTracker(), None)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = RunFolder(Path(broadcast_object(place)) / "bench")
        on_rank_zero(folder.open)
        origin: dict[str, Any] = {"code": {}, "init": None}
        outputs = open_outputs(config, session, plan, 0, folder, None, origin)
        try:
            yield outputs
        finally:
            outputs.close(0, "done", 0, "", {})
