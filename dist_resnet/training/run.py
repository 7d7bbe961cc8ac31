"""One run from start to end: open what it needs, train, close whatever happened."""

from collections.abc import Collection, Generator
from functools import partial
from pathlib import Path

from dist_resnet.augment.trial import try_extras
from dist_resnet.base import signals, watchdog
from dist_resnet.base.errors import EXIT_DONE, Preempted, UserError
from dist_resnet.base.paths import user_path
from dist_resnet.base.terminal import say
from dist_resnet.config.code import code_of_run, told_of_code
from dist_resnet.config.load import stored_config, to_dict
from dist_resnet.config.plan import Plan, check_statistics, make_plan
from dist_resnet.config.schema import Config
from dist_resnet.data.stream import Batch
from dist_resnet.distributed.group import (
    World,
    broadcast_object,
    on_every_rank,
    on_rank_zero,
    start,
    stop,
)
from dist_resnet.machine.gpu_memory import explaining_memory
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.runs.diagnosis import Row
from dist_resnet.runs.folder import RunFolder
from dist_resnet.runs.fork import begins_here, forks_told, starting_point, with_code
from dist_resnet.runs.resume import (
    check_folder,
    check_same_configuration,
    check_same_machines,
    find_checkpoint,
    open_folder,
    other_rounding,
    run_name,
    take_over,
)
from dist_resnet.step.captured import as_configured
from dist_resnet.step.distill import Distillation
from dist_resnet.step.precision import make_deterministic
from dist_resnet.step.state import TrainState
from dist_resnet.tracking.jsonl import read_rows
from dist_resnet.training.ending import at_exit, of_all_ranks, raise_told, tell_ending
from dist_resnet.training.evaluation import Evaluator
from dist_resnet.training.gallery import Gallery
from dist_resnet.training.introduction import conclusion, introduction, write_summary
from dist_resnet.training.loop import Trainer
from dist_resnet.training.outputs import Outputs, open_outputs
from dist_resnet.training.session import Session, open_session, resolve_auto
from dist_resnet.training.starting import all_machines, begin, check_own_code, origin_of
from dist_resnet.training.stopwatch import Stopwatch
from dist_resnet.training.teachers import build_distillation, find_teachers, who_saw_held_out


def run(config: Config, named: Collection[str] = ()) -> Path:
    """Train as configured, from the newest checkpoint if there is one.

    Args:
        named: dotted keys that the command names, for run.extend.

    Returns:
        The run folder.

    Raises:
        DistResnetError: how it ended, if not well; status.json tells it too.
    """
    signals.install()
    if config.precision.deterministic:
        make_deterministic()  # which NCCL asks for when it starts
    world = start(config.parallel.device, config.parallel.timeout_seconds)
    orderly = False
    folder = RunFolder(user_path(config.run.dir) / run_name(config))
    forget = at_exit(world.is_main, folder)
    try:
        on_rank_zero(lambda: open_folder(config, folder))
        try:
            _run_in(config, named, world, folder)
        except BaseException as error:
            if world.is_main:
                tell_ending(error, folder)
            orderly = of_all_ranks(error)
            raise_told(error)
        orderly = True
    finally:
        forget()
        folder.close()
        watchdog.rearm(config.parallel.timeout_seconds)  # NCCL's own end may hang
        try:
            stop(orderly)
        finally:
            watchdog.disarm()
    return folder.path


@explaining_memory
def _run_in(wanted: Config, named: Collection[str], world: World, folder: RunFolder) -> None:
    saved = find_checkpoint(wanted, folder)
    config = on_every_rank(lambda: resolve_auto(wanted, world, saved))
    ours, theirs = to_dict(config), broadcast_object(to_dict(config))
    on_every_rank(lambda: check_same_configuration(ours, theirs))
    on_every_rank(lambda: check_own_code(config))  # before any download
    session = open_session(config, world)
    kinds = all_machines(session)
    mixed = on_every_rank(lambda: check_same_machines(kinds, config.parallel.reduction))
    plan = make_plan(config, len(session.train_indices), world.size)
    check_statistics(config, *session.image_size)
    on_every_rank(lambda: try_extras(config.augment, session.image_size, session.normalisation()))
    on_every_rank(session.class_weights)  # refused before anything is written
    if saved is not None:
        saved = starting_point(saved, config, session.dataset.fingerprint, named)
    step = saved.state.step if saved is not None else 0
    if step > plan.total_steps:
        raise UserError(
            f"{folder.path}: is at step {step:,} already, beyond the {plan.total_steps:,} of this "
            "command; choose more train.epochs or train.max_steps, or another run.name"
        )
    early = saved is not None and config.train.early_stop and saved.state.stopped_early
    on_rank_zero(lambda: check_folder(config, folder))
    complete = broadcast_object(not folder.to_clear and folder.summary().get("step") == step)
    if (plan.finished(step) or early) and complete:
        if world.is_main:
            say(f"{folder.path}: complete already; to train it again: run.overwrite=true")
            folder.set_status("done", step, exit_code=EXIT_DONE)
        return
    teachers = on_every_rank(lambda: find_teachers(config))
    found = [t.saved for t in teachers if isinstance(t.saved, Checkpoint)]
    nets = on_every_rank(lambda: [stored_config(teacher.config) for teacher in found])
    code = on_every_rank(lambda: code_of_run(config, nets)) | {t.name: t.sha256 for t in teachers}
    before, everywhere = saved.code if saved is not None else {}, broadcast_object(code)
    saved = on_every_rank(lambda: with_code(saved, code, everywhere, config.run.allow_code_change))
    state, begun = begin(config, session, saved)
    seen = who_saw_held_out(teachers, begun, session)
    normalisation = session.normalisation()
    distillation = on_every_rank(lambda: build_distillation(teachers, session, normalisation))
    if world.is_main:
        told = [*forks_told(saved), *told_of_code(before, code), mixed]
        told += [f"{name}: may have been trained on images that are held out here" for name in seen]
        if saved is not None:
            told.append(other_rounding(saved, kinds[0], config.train.step_mode))
        for line in (*introduction(wanted, session, plan, state, folder), *filter(None, told)):
            say(line)
    on_rank_zero(lambda: take_over(config, folder, step))
    origin = {"code": code} | origin_of(begun, seen, saved)
    outputs = on_every_rank(
        lambda: open_outputs(config, session, plan, state.step, folder, saved, origin)
    )
    try:
        parts = plan, state, outputs, saved, distillation
        trainer = _trainer(config, session, *parts, folder.metrics)
    except BaseException as error:
        outputs.fail(error, state.step)
        raise
    _fit_and_close(trainer, session, folder, outputs, code)


def _trainer(
    config: Config,
    session: Session,
    plan: Plan,
    state: TrainState,
    outputs: Outputs,
    saved: Checkpoint | None,
    distillation: Distillation | None,
    metrics: Path,
) -> Trainer:
    def open_data() -> tuple[Generator[Batch, None, None], Evaluator]:
        batches = session.batches(plan, state.step)
        evaluator = session.evaluator(session.normalisation())
        session.dataset.check_not_replaced()
        return batches, evaluator

    def recorded() -> list[Row]:
        return [row for row in read_rows(metrics) if row.get("step") == state.step]

    batches, evaluator = on_every_rank(open_data)
    step = session.train_step(plan, state, distillation)
    wandb = outputs.writer.wandb if outputs.writer is not None else None
    # Rank 0 alone knows whether W&B has started, and finding mistakes takes all ranks.
    pictures = broadcast_object(wandb is not None) and config.wandb.media_every_epochs > 0
    return Trainer(
        config=config,
        plan=plan,
        state=state,
        train_step=as_configured(step, outputs.tracker.message),
        batches=batches,
        evaluate=evaluator,
        classes=session.dataset.classes,
        tracker=outputs.tracker,
        watch=Stopwatch(saved.seconds if saved else 0.0, session.world.device),
        writer=outputs.writer,
        gallery=Gallery(config, session.dataset, wandb) if pictures else None,
        recorded=on_rank_zero(recorded),
        begins_fork=saved is not None and begins_here(saved),
    )


def _fit_and_close(
    trainer: Trainer,
    session: Session,
    folder: RunFolder,
    outputs: Outputs,
    sources: dict[str, str],
) -> None:
    state, world = trainer.state, session.world
    signals.defer()
    try:
        label = f"rank {world.rank} of {world.size}"
        watchdog.call_as(label, trainer.fit)
    except BaseException as error:
        close = partial(outputs.fail, error, state.step)
        if isinstance(error, Preempted):
            # All ranks are here. Those that left before rank 0 has closed would end it early.
            on_rank_zero(close)
        else:
            close()
        raise
    finally:
        trainer.batches.close()
        trainer.train_step.close()
        watchdog.disarm()

    def finish() -> None:
        try:
            summary = write_summary(trainer, session, folder, sources)
        except BaseException as error:
            outputs.fail(error, state.step)
            raise
        outputs.close(EXIT_DONE, "done", state.step, "", summary)
        for line in conclusion(summary, session, folder):
            say(line)

    # The other ranks wait: torchrun would take a rank that left early for the end of the job.
    on_rank_zero(finish)
