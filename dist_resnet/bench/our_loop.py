"""Ours as it runs: `training.loop.Trainer` on real batches, with metrics.jsonl and W&B."""

import itertools
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from dist_resnet.bench.workers import Gate, in_turns
from dist_resnet.config.plan import Plan, make_plan
from dist_resnet.config.schema import AugmentConfig, Config
from dist_resnet.data.stream import Batch
from dist_resnet.distributed.group import World, broadcast_object, on_rank_zero
from dist_resnet.runs.folder import RunFolder
from dist_resnet.step.captured import as_configured
from dist_resnet.step.train_step import TrainStep
from dist_resnet.tracking.tracker import Tracker
from dist_resnet.training.evaluation import Evaluator
from dist_resnet.training.loop import Trainer
from dist_resnet.training.outputs import Outputs, open_outputs
from dist_resnet.training.session import Session, open_session, with_replicas
from dist_resnet.training.starting import begin
from dist_resnet.training.stopwatch import Stopwatch

_KEPT = 8  # batches, where there is no loader


def train(config: Config, world: World, gate: Gate, steps: int, from_memory: bool = False) -> None:
    """Train, `steps` steps a turn.

    Args:
        from_memory: no loader, augmentation, logging or W&B: the same few batches, over and over.
    """
    if from_memory:  # its step normalises and mixes images, as its loss demands, and nothing else
        mixed = AugmentConfig(crop_padding=0, flip=False, mixup_alpha=config.augment.mixup_alpha)
        config = replace(config, augment=mixed)
    session, plan = opened(config, world)
    step, batches = make_step(session, plan), session.batches(plan)
    draw = itertools.cycle(kept(batches)).__next__ if from_memory else batches.__next__
    with _outputs(session, plan, from_memory) as outputs, closing(batches):
        trainer = Trainer(
            config=session.config,
            plan=plan,
            state=step.state,
            train_step=as_configured(step, outputs.tracker.message),
            batches=cast(Generator[Batch, None, None], in_turns(draw, steps, gate)),
            evaluate=cast(Evaluator, None),  # `opened` asks for no evaluation
            classes=(),
            tracker=outputs.tracker,
            watch=Stopwatch(0.0, world.device),
            writer=outputs.writer,
        )
        with closing(trainer.train_step):
            trainer.fit()


def opened(config: Config, world: World) -> tuple[Session, Plan]:
    """What a run has that neither evaluates nor saves, and that is long enough."""
    config = replace(
        with_replicas(config, world.size),
        train=replace(config.train, epochs=max(config.train.epochs, 150), max_steps=None),
        eval=replace(config.eval, every_epochs=0),
        checkpoint=replace(config.checkpoint, every_epochs=0, every_steps=0),
    )
    # The wait at the gate, while others take their turns, is no hang.
    config = replace(config, parallel=replace(config.parallel, timeout_seconds=24 * 3600))
    session = open_session(config, world)
    return session, make_plan(config, len(session.train_indices), world.size)


def make_step(session: Session, plan: Plan) -> TrainStep:
    """A step from the state that a run starts from."""
    state, _ = begin(session.config, session, None)
    return session.train_step(plan, state)


def kept(batches: Generator[Batch, None, None]) -> list[Batch]:
    """The first few batches, copied out of the loader's buffers, which is closed."""
    with closing(batches):
        return [
            Batch(batch.images.clone(), batch.labels.clone(), batch.samples.clone())
            for batch in itertools.islice(batches, _KEPT)
        ]


@contextmanager
def _outputs(session: Session, plan: Plan, silent: bool) -> Iterator[Outputs]:
    """Everything that records, in a folder that is removed afterwards."""
    if silent:
        yield Outputs(Tracker(), None)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = RunFolder(Path(broadcast_object(place)) / "bench")
        on_rank_zero(folder.open)
        origin: dict[str, Any] = {"code": {}, "init": None}
        outputs = open_outputs(session.config, session, plan, 0, folder, None, origin)
        try:
            yield outputs
        finally:
            outputs.close(0, "done", 0, "", {})
