"""Where a run leaves its traces: console, metrics.jsonl, W&B, checkpoints and status."""

import secrets
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dist_resnet.base import signals
from dist_resnet.base.errors import EXIT_DIVERGED, UserError
from dist_resnet.config.code import run_hash
from dist_resnet.config.load import to_dict, to_yaml
from dist_resnet.config.plan import Plan
from dist_resnet.config.schema import Config
from dist_resnet.data.dataset import DESCRIPTION, Dataset
from dist_resnet.machine.environment import git_commit, machine, versions
from dist_resnet.runs.checkpoint import Checkpoint
from dist_resnet.runs.folder import RunFolder
from dist_resnet.runs.store import CheckpointStore
from dist_resnet.step.state import TrainState
from dist_resnet.tracking.console import Console
from dist_resnet.tracking.jsonl import MetricsFile, rewind
from dist_resnet.tracking.tracker import Artifact, Tracker, Trackers
from dist_resnet.tracking.wandb_notices import Notices
from dist_resnet.tracking.wandb_writer import WandbTracker, start_wandb
from dist_resnet.training.ending import ending
from dist_resnet.training.session import Session


@dataclass
class RunWriter:
    """Writes a run's checkpoints and status.json; on rank 0 only."""

    folder: RunFolder
    store: CheckpointStore
    header: dict[str, Any]
    """What of a checkpoint does not change during the run."""
    tracker: Tracker
    wandb: WandbTracker | None

    def heartbeat(self, step: int) -> None:
        """Show launchers that the run lives, and pass on the dashboard's stop button."""
        self.folder.set_status("running", step)
        if self.wandb is not None and self.wandb.stop_requested():
            signals.request()

    def save(self, state: TrainState, seconds: float, best: bool, must: bool) -> None:
        """Write a checkpoint.

        Raises:
            UserError: it cannot be written though it `must`; else that is told, and we go on.
        """
        position = self.wandb and self.wandb.position()
        content = Checkpoint(
            state=state.snapshot(), seconds=seconds, wandb_position=position, **self.header
        )
        try:
            self.store.save(content, best)
        except OSError as error:
            last = self.store.newest_path() or "none"
            line = (
                f"no checkpoint at step {state.step}: {error.strerror} ({self.store.folder});"
                f" the last one: {last}"
            )
            if must:
                raise UserError(f"{line}; make room, then start again to continue") from None
            self.tracker.message(f"warning: {line}; training goes on")
        else:
            self.heartbeat(state.step)


@dataclass
class Outputs:
    """Where this rank's figures go; all but the first rank have the null tracker only."""

    tracker: Tracker
    writer: RunWriter | None

    def close(
        self, code: int, status: str, step: int, reason: str, summary: dict[str, Any]
    ) -> None:
        """Leave the status that launchers read first: what follows may take seconds."""
        if self.writer is not None:
            self.writer.folder.set_status(status, step, reason, code)
        # Of other ends not: an error's text may hold what must not leave this machine.
        told = {"reason": reason} if code == EXIT_DIVERGED else {}
        self.tracker.close(code, summary | told)

    def fail(self, error: BaseException, step: int) -> None:
        """Close with what ended the training."""
        status, reason, code = ending(error)
        self.close(code, status, step, reason, {})


def open_outputs(
    config: Config,
    session: Session,
    plan: Plan,
    step: int,
    folder: RunFolder,
    saved: Checkpoint | None,
    origin: dict[str, Any],
) -> Outputs:
    """Bring the run folder's files to `step` and open everything that records, on rank 0 only.

    Args:
        origin: `Checkpoint.code`, `.init` and `.held_out_seen`.

    Raises:
        UserError: the folder cannot be written.
    """
    if not session.world.is_main:
        return Outputs(Tracker(), None)
    known, forks = (saved.wandb_id, saved.forks) if saved is not None else (None, [])
    derived = plan.as_dict() | ({"forks": forks} if forks else {}) | origin
    derived["hash"] = run_hash(config, origin["code"])
    name, anew = folder.path.name, bool(forks) and known is None
    run_id = folder.wandb_id(lambda: f"{name[:52]}-{secrets.token_hex(4)}", known, anew)
    try:
        folder.write_text("config.yaml", to_yaml(config))
        folder.write_json("plan.json", derived)
        rewind(folder.metrics, step)
        (folder.path / "summary.json").unlink(missing_ok=True)  # of a shorter run
        best = saved.state.best.get("val/top1") if saved is not None else None
        console = Console(plan.total_steps, step, best=best)
        metrics = MetricsFile(folder.metrics, console.message)
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be written: {error.strerror}") from None
    data, resolved = session.dataset, to_dict(config)
    place = {"versions": versions(), "machine": machine(session.world.device, session.threads)}
    facts = {"dataset": data.fingerprint, "git_commit": git_commit(), **place}
    wandb = start_wandb(
        config.wandb,
        folder.path,
        resolved | facts | {"plan": derived},
        run_id,
        name,
        resume_position=saved.wandb_position if saved is not None and run_id == known else None,
        say=console.message,
    )
    store = CheckpointStore(folder.checkpoints, config.checkpoint.keep)
    parts: list[Tracker] = [console, metrics]
    wandb_id = run_id if wandb is None else wandb.run_id
    if wandb is not None:
        find = partial(_to_keep, config, store, data, wandb_id)
        # W&B last: its end sends what the notices have queued at theirs.
        parts += [Notices(wandb, name, find), wandb]
    tracker = Trackers(parts, console.message)
    header = {"forks": forks, "wandb_id": wandb_id, **_header(config, session), **place, **origin}
    writer = RunWriter(folder, store, header, tracker, wandb)
    writer.heartbeat(step)
    return Outputs(tracker, writer)


def _header(config: Config, session: Session) -> dict[str, Any]:
    """What a checkpoint holds of the configuration and the dataset."""
    data = session.dataset
    mean, std = session.channel_scale
    return {
        "config": to_dict(config),
        "fingerprint": data.fingerprint,
        "classes": list(data.classes),
        "mean": list(mean),
        "std": list(std),
        "image_size": list(session.image_size),
        "reading": asdict(data.reading),
    }


def _to_keep(config: Config, store: CheckpointStore, data: Dataset, run_id: str) -> list[Artifact]:
    """The best checkpoint and the dataset's description, if asked for; never the data itself."""
    if not config.wandb.artifacts:
        return []
    about: dict[str, object] = {"fingerprint": data.fingerprint, "name": data.name}
    found = [Artifact(f"dataset-{data.name}", "dataset", data.folder / DESCRIPTION, about)]
    best = store.best_path()
    if best is not None:
        step = int(best.name.split("-")[1])
        about = {"step": step, "dataset": data.fingerprint, "classes": list(data.classes)}
        found.append(Artifact(f"best-{run_id}", "model", best, about))
    return found
