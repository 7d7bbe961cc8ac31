"""Start the W&B tracker of a run. Importing this imports no wandb."""

from collections.abc import Mapping
from pathlib import Path

from dist_resnet.tracking.tracker import Say, say_on_stderr
from dist_resnet.tracking.wandb_reach import wanted_mode
from dist_resnet.tracking.wandb_session import WandbSession, WandbSettings
from dist_resnet.tracking.wandb_writer import WandbTracker

__all__ = ["WandbSettings", "WandbTracker", "start_wandb"]


def start_wandb(
    settings: WandbSettings,
    run_dir: Path | str,
    config: Mapping[str, object],
    run_id: str,
    name: str,
    *,
    resume_position: int | None = None,
    say: Say = say_on_stderr,
    init_seconds: float = 4.0,
    close_seconds: float = 15.0,
) -> WandbTracker | None:
    """Start or continue the run `run_id`; None if W&B is disabled or does not start.

    Never prompts, never raises, never waits more than 16 s (offline about 1 s; 5 s if the server
    does not answer, 7 s if it stops answering). `resume_position` is what `position()` returned
    when the checkpoint was written: later rows are taken back, so that a rewind doubles no step.
    """
    mode, asked = wanted_mode(settings.mode, say)
    if mode == "disabled":
        say(f"wandb: off, because {asked}")
        return None
    session = WandbSession(settings, Path(run_dir), config, run_id, name, say)
    session.asked = asked
    session.mode, session.resume_position = mode, resume_position
    session.init_seconds, session.finish_seconds = init_seconds, max(1.0, close_seconds - 3.0)
    tracker = WandbTracker(session, say, close_seconds)
    return tracker if tracker.start(init_seconds + 12.0) else None
