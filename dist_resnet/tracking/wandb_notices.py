"""What W&B is told of a run beside its figures: alerts, and what to keep when it has finished."""

from collections.abc import Callable, Mapping, Sequence

from dist_resnet.base.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_PREEMPTED
from dist_resnet.tracking.tracker import Artifact, Row, Tracker
from dist_resnet.tracking.wandb_writer import WandbTracker

STARVED = 0.5
"""Share of a window's time spent waiting for data from which on a run counts as starved."""
STARVED_ROWS = 3  # in a row: the first window holds the loader's compilation


class Notices(Tracker):
    """Alerts for starvation (once), divergence, failure and completion; files of a finished run.

    A tracker, so that it hears of every row and of the end; it only queues, and `Trackers` contains
    its failures.
    """

    name = "notices"

    def __init__(
        self, wandb: WandbTracker, run: str, find: Callable[[], Sequence[Artifact]]
    ) -> None:
        """`find` is called when a run has finished: then no checkpoint is replaced any more."""
        self._wandb = wandb
        self._run = run
        self._find = find
        self._starved = 0
        self._step = 0

    def log(self, row: Row) -> None:
        """Count rows of training that waited for data most of the time."""
        self._step = int(row.get("step", self._step))
        share = row.get("perf/data_wait_fraction")
        if share is None or self._starved >= STARVED_ROWS:
            return
        self._starved = self._starved + 1 if share > STARVED else 0
        if self._starved == STARVED_ROWS:
            self._wandb.alert(
                "starved of data",
                f"{self._run}: {share:.0%} of the time up to step {self._step} went into waiting"
                f" for data, in {STARVED_ROWS} windows in a row; see data.loader=resident",
            )

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Tell how the run ended, and keep its files; one that was preempted goes on."""
        if exit_code == EXIT_DONE:
            figures = f"val/top1 {summary.get('val/top1')}, {self._step} steps"
            self._wandb.alert("finished", f"{self._run}: {figures}")
            for artifact in self._find():
                self._wandb.keep(artifact)
        elif exit_code == EXIT_DIVERGED:
            self._wandb.alert("diverged", f"{self._run}: {summary.get('reason')}", error=True)
        elif exit_code != EXIT_PREEMPTED:
            # Not the reason: an error's text may hold the names of machines.
            text = f"{self._run}: exit code {exit_code} after step {self._step}"
            self._wandb.alert("failed", text, error=True)
