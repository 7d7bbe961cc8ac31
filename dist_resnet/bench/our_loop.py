"""Ours as it runs: `loop.Trainer` over real batches, recording to metrics.jsonl and W&B."""

import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from dist_resnet.bench.gate import Finished, Gate
from dist_resnet.config.plan import Plan, make_plan, rates
from dist_resnet.config.schema import Config
from dist_resnet.data.stream import Batch, open_loader, training_batches
from dist_resnet.distributed.group import World, broadcast_object, on_rank_zero
from dist_resnet.runs.folder import RunFolder
from dist_resnet.step.captured import as_configured
from dist_resnet.step.state import build_state
from dist_resnet.step.train_step import TrainStep
from dist_resnet.tracking.tracker import NullTracker
from dist_resnet.training.evaluation import Evaluator
from dist_resnet.training.loop import Trainer
from dist_resnet.training.recording import Recording, open_recording
from dist_resnet.training.session import Session, open_session, with_replicas
from dist_resnet.training.stopwatch import Stopwatch

_KEPT_BATCHES = 8  # of the step fed from memory


class MemoryFedStep(TrainStep):
    """The same step on images that are augmented already, with choices drawn before."""

    def hold(self, choices: Any) -> None:
        """Use these choices in every step."""
        self.replica_pass.inputs = lambda images, samples, key, turn=None: (images, choices)  # type: ignore[method-assign]


def train(config: Config, world: World, gate: Gate, steps: int, from_memory: bool = False) -> None:
    """Train, `steps` steps a turn. The facts of a turn are its steps' milliseconds.

    Args:
        from_memory: no loader, augmentation, logging or W&B: the same few batches, over and over.
    """
    config = quiet(with_replicas(config, world.size))
    session = open_session(config, world)
    plan = make_plan(config, len(session.train_indices), world.size)
    step = make_step(config, session, plan, MemoryFedStep if from_memory else TrainStep)
    batches = open_batches(session, plan)
    if isinstance(step, MemoryFedStep):
        batches = repeat(kept_batches(step, batches))
    with _recording(config, session, plan, from_memory) as recording:
        try:
            fit_on(step, plan, world, lambda: next(batches), steps, gate, recording)
        finally:
            batches.close()


def fit_on(
    step: TrainStep,
    plan: Plan,
    world: World,
    draw: Callable[[], Batch],
    steps: int,
    gate: Gate,
    recording: Recording | None = None,
) -> None:
    """The real loop on what `draw` gives.

    Raises:
        Finished: the gate has closed.
    """
    recording = recording or Recording(NullTracker(), None)
    Trainer(
        config=step.config,
        plan=plan,
        state=step.state,
        train_step=as_configured(step, recording.tracker.message),
        batches=_timed(draw, steps, gate),
        evaluate=cast(Evaluator, None),  # `quiet` asks for no evaluation
        classes=(),
        tracker=recording.tracker,
        watch=Stopwatch(0.0, world.device),
        keeper=recording.keeper,
    ).fit()


def quiet(config: Config) -> Config:
    """`config` without evaluations, without checkpoints, and long enough."""
    return replace(
        config,
        train=replace(config.train, epochs=max(config.train.epochs, 150), max_steps=None),
        eval=replace(config.eval, every_epochs=0),
        checkpoint=replace(config.checkpoint, every_epochs=0, every_steps=0),
    )


def make_step(config: Config, session: Session, plan: Plan, kind: type[TrainStep]) -> TrainStep:
    """A step of class `kind`, from the state that a run starts from."""
    classes, device = len(session.dataset.classes), session.world.device
    return kind(
        config,
        build_state(config, classes, session.precision, device, session.image_size),
        rates(config, plan),
        plan.replicas,
        session.precision,
        session.normalisation(),
        session.image_size,
        plan.steps_per_epoch,
    )


def open_batches(session: Session, plan: Plan) -> Generator[Batch, None, None]:
    """Ours, from the first step on."""
    config, world = session.config, session.world
    size = plan.batch_size_per_replica * plan.replicas_per_rank
    loader = open_loader(config.data.loader, session.dataset.train_path, size, world.device)
    return training_batches(
        loader, config.seed, session.train_indices, plan, world.rank, 0, world.device
    )


def kept_batches(step: MemoryFedStep, batches: Generator[Batch, None, None]) -> list[Batch]:
    """A few batches, augmented once; from here on `step` uses the choices of the first."""
    kept, choices = [], None
    for number in range(_KEPT_BATCHES):
        batch = next(batches)
        key, turn = step.keys[number], step.turn(number)
        inputs, drawn = step.replica_pass.inputs(batch.images, batch.samples, key, turn)
        choices = choices or drawn
        kept.append(Batch(inputs.clone(), batch.labels.clone(), batch.samples.clone()))
    batches.close()
    step.hold(choices)
    return kept


def repeat(kept: list[Batch]) -> Generator[Batch, None, None]:
    while True:
        yield from kept


def _timed(draw: Callable[[], Batch], steps: int, gate: Gate) -> Generator[Batch, None, None]:
    """Batches in turns, the time from one to the next kept for the gate."""
    milliseconds: list[float] = []
    while gate(step_ms=milliseconds):
        milliseconds = []
        for _ in range(steps):
            start = time.perf_counter()
            yield draw()
            milliseconds.append(1000 * (time.perf_counter() - start))
    raise Finished


@contextmanager
def _recording(config: Config, session: Session, plan: Plan, silent: bool) -> Iterator[Recording]:
    """Everything that records, in a folder that is removed afterwards."""
    if silent:
        yield Recording(NullTracker(), None)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = RunFolder(Path(broadcast_object(place)) / "bench")
        on_rank_zero(folder.open)
        recording = open_recording(
            config, session, plan, 0, folder, None, {"code": {}, "init": None}
        )
        try:
            yield recording
        finally:
            recording.close(0, "done", 0, "", {})
