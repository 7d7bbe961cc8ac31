"""What a run tells its reader before the first step and after the last, and its summary."""

from typing import Any

from dist_resnet.base.errors import UserError
from dist_resnet.config.code import plugins_of
from dist_resnet.config.plan import Plan, explain
from dist_resnet.config.schema import Config
from dist_resnet.machine.environment import git_commit, hardware, versions
from dist_resnet.runs.folder import RunFolder
from dist_resnet.runs.summary import last_evaluation, summarise
from dist_resnet.step.mode import choose_step_mode, told_of_net
from dist_resnet.step.state import TrainState, weights_sha256
from dist_resnet.tracking.jsonl import read_rows
from dist_resnet.training.loop import Trainer
from dist_resnet.training.session import Session


def introduction(
    wanted: Config, session: Session, plan: Plan, state: TrainState, folder: RunFolder
) -> list[str]:
    """What a run is about to do, before its first step.

    Args:
        wanted: the configuration as it was given, with what was left to the machine.
    """
    data, config = session.dataset, session.config
    _, step = choose_step_mode(wanted.train.step_mode, config, session.world.device)
    lines = [
        f"run: {folder.path}" + (f", continued at step {state.step:,}" if state.step else ""),
        f"data: {data.name}, {data.num_train:,} training images, {len(data.classes)} classes;"
        f" evaluated on the {session.eval_set}",
        f"model: {config.model.name}, {state.flat.num_parameters:,} parameters",
        f"device: {session.world.device.type}, {session.precision_reason},"
        f" {session.threads} CPU threads a process; step: {step}",
        *explain(config, plan),
        *told_of_net(config.model, state, plan.replicas_per_rank),
        *state.optimizer.remarks,
        *(f"code: {key}={name}" for key, name in plugins_of(config)),
    ]
    if session.world.device.type == "cpu" and session.world.size == 1 and session.threads > 1:
        lines.append(
            f"faster on a CPU, a process a core: torchrun --nproc_per_node={session.threads}"
        )
    return lines


def conclusion(summary: dict[str, Any], session: Session, folder: RunFolder) -> list[str]:
    """What it found, after its last step."""
    return [
        *(f"{finding['name']}: {finding['text']}" for finding in summary["diagnosis"]),
        f"done: val/top1 {summary['val/top1']:.4f} on the {session.eval_set}"
        f" ({summary['val/images']:,} images) after {summary['step']:,} steps,"
        f" {summary['wall_seconds']:.0f} s; {folder.path / 'summary.json'}",
    ]


def _facts(trainer: Trainer, session: Session) -> dict[str, Any]:
    """What a summary holds beside figures: speed, plan, dataset, versions, hardware."""
    plan, world = trainer.plan, session.world
    return {
        "stopped_early": trainer.state.stopped_early and trainer.config.train.early_stop,
        "weights_sha256": weights_sha256(trainer.state.flat.model.state_dict()),
        "eval_set": session.eval_set,
        "images_per_second": trainer.watch.images_per_second(plan.global_batch_size),
        "wall_seconds": trainer.watch.seconds(),
        "world_size": world.size,
        "replicas": plan.replicas,
        "parameters": trainer.state.flat.num_parameters,
        "dataset": {"name": session.dataset.name, "fingerprint": session.dataset.fingerprint},
        "precision": str(session.precision).removeprefix("torch."),
        "versions": versions(),
        "git_commit": git_commit(),
        "hardware": hardware(world.device, session.threads),
    }


def write_summary(
    trainer: Trainer, session: Session, folder: RunFolder, sources: dict[str, str]
) -> dict[str, Any]:
    """The content of summary.json, written.

    Args:
        sources: `Checkpoint.code`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        rows = read_rows(folder.metrics)
        last = trainer.last_evaluation or last_evaluation(rows)
        known = _facts(trainer, session) | {"code": {n: c[:16] for n, c in sources.items()}}
        summary = summarise(rows, last, trainer.state.best, known)
        folder.write_json("summary.json", summary)
    except OSError as error:
        raise UserError(f"{folder.path}: no summary.json: {error.strerror}") from None
    return summary
