"""Run a sweep's grid here, without W&B's server:

    python -m dist_resnet.sweep FILE [--retry-failed] [-- ARGUMENT ...]

FILE is a sweep file such as configs/sweep.yaml, which `wandb agent` reads too; ARGUMENTs (files,
key=value) are added to every training. One run folder a combination. Started again, it continues
where it was stopped or killed and leaves out what has finished; at the end it prints a table. A
training that fails or is impossible is a row with its reason, and the exit code is 1;
--retry-failed tries it again.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from dist_resnet.base.cli import Parser, run_command
from dist_resnet.base.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_PREEMPTED, UserError
from dist_resnet.base.paths import user_path
from dist_resnet.base.signals import end_with_parent
from dist_resnet.base.tables import columns
from dist_resnet.base.terminal import forgive
from dist_resnet.config.effects import changes_result
from dist_resnet.config.keys import did_you_mean
from dist_resnet.config.load import load_config, to_dict, trajectory_differences
from dist_resnet.runs.folder import RunFolder
from dist_resnet.sweep.grid import Grid, Trial, read_grid, word

_FINISHED = ("done", "diverged")


def main(arguments: Sequence[str]) -> int:
    """Run every combination that is not done, then print the table; the exit code."""
    parser = Parser("python -m dist_resnet.sweep", __doc__)
    parser.add_argument("file", type=user_path, metavar="FILE")
    parser.add_argument("--retry-failed", action="store_true", help="train those again")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    asked, extra = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    forgive()
    grid = read_grid(asked.file, extra)
    runner, warned = _Runner(), False
    for number, trial in enumerate(grid.trials, 1):
        title = f"sweep: {number} of {len(grid.trials)}, {trial.folder}"
        if trial.impossible:
            print(f"{title}: {trial.impossible}", flush=True)
            continue
        before, why = _outcome(trial)
        if before in _FINISHED or (before == "failed" and not asked.retry_failed):
            hint = f": {why}; to try again: --retry-failed" if before == "failed" else ""
            print(f"{title}: {before} already{hint}", flush=True)
            continue
        print(title, flush=True)
        code = runner.run(trial)
        if runner.stopped or code == EXIT_PREEMPTED:
            print("sweep: stopped; start the same command again to continue", file=sys.stderr)
            return EXIT_PREEMPTED
        if code == EXIT_DONE:
            warned = warned or _warns(grid, trial)
    outcomes = [_outcome(trial) for trial in grid.trials]
    print(_table(grid, outcomes))
    states = [state for state, _ in outcomes]
    done = [trial for trial, state in zip(grid.trials, states, strict=True) if state == "done"]
    if done and not any(grid.metric in RunFolder(trial.folder).summary() for trial in done):
        raise UserError(_no_figure(grid, done[0]))
    return EXIT_DONE if all(state in _FINISHED for state in states) else 1


class _Runner:
    """Starts trainings one after the other and passes a request to stop on."""

    def __init__(self) -> None:
        self.stopped = False
        self._job: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def run(self, trial: Trial) -> int:
        """Train; the trainer's exit code as status.json has it, since torchrun itself returns 1."""
        before = _written(trial)
        RunFolder(trial.folder).forget_refusal()
        try:
            # Killed ourselves, we would leave a child that holds the run's folder.
            self._job = subprocess.Popen(trial.command, preexec_fn=end_with_parent)
        except OSError as error:
            raise UserError(f"{trial.command[0]}: cannot be started: {error.strerror}") from None
        if self.stopped:
            self._job.terminate()
        code = self._job.wait()
        if code == 0 or _written(trial) == before:  # refused, or torchrun did not come to start it
            return code
        return int(RunFolder(trial.folder).status().get("exit_code", code))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._job is not None and self._job.poll() is None:
            self._job.terminate()


def _table(grid: Grid, outcomes: Sequence[tuple[str, str]]) -> str:
    """One line a combination, the best first; those without a figure last."""
    keys = list(grid.trials[0].values)
    rows: list[tuple[float, list[str]]] = []
    for trial, (state, why) in zip(grid.trials, outcomes, strict=True):
        value = _figure(trial, grid.metric) if state == "done" else None
        order = float("inf") if value is None else -value if grid.maximize else value
        shown = "-" if value is None else f"{value:.4f}"
        settings = [word(trial.values[key]) for key in keys]
        reason = why if state == "failed" else ""
        rows.append((order, [*settings, shown, state, str(trial.folder), reason]))
    rows.sort(key=lambda row: row[0])
    lines = [[*keys, grid.metric, "state", "run", ""], *(row for _, row in rows)]
    return "\n".join(columns(lines))


def _written(trial: Trial) -> int:
    """When the status was written, in nanoseconds; 0: never."""
    try:
        return (trial.folder / "status.json").stat().st_mtime_ns
    except OSError:
        return 0


def _outcome(trial: Trial) -> tuple[str, str]:
    """done, diverged, failed, preempted, running, killed or not started; and why, on one line."""
    folder = RunFolder(trial.folder)
    status, refusal = folder.status(), folder.refusal()
    state, why = str(status.get("state", "not started")), status.get("reason", "")
    diverged = status.get("exit_code") == EXIT_DIVERGED
    if trial.impossible:
        state, why = "failed", trial.impossible
    # A whole run is one, whatever another command was refused there since.
    elif diverged or (state == "done" and folder.summary()):
        why = _another(trial)
        state = "failed" if why else "diverged" if diverged else "done"
    elif refusal:
        state, why = "failed", refusal.get("reason", "")
    elif state == "done":
        state = "killed"
    return state, " ".join(str(why).split())[:200]


def _another(trial: Trial) -> str:
    """What is another in the folder's run, extended since; empty: it is this training."""
    try:
        found = to_dict(load_config([str(trial.folder / "config.yaml")]))
    except UserError as error:
        return str(error)
    wanted = {
        name: {k: found[name][k] if v == "auto" else v for k, v in section.items()}
        if isinstance(section, dict)
        else section
        for name, section in to_dict(trial.config).items()
    }
    differing = trajectory_differences(
        wanted, found, lambda key: changes_result(key) or key in trial.values
    )
    if not differing:
        return ""
    return f"{trial.folder} holds another run since: {'; '.join(differing)}; move it away"


def _warns(grid: Grid, trial: Trial) -> bool:
    """Tell of a metric that a training has not, which others may have: it may be mistyped."""
    if grid.metric in RunFolder(trial.folder).summary():
        return False
    print(f"sweep: warning: {_no_figure(grid, trial)}", file=sys.stderr, flush=True)
    return True


def _no_figure(grid: Grid, trial: Trial) -> str:
    hint = did_you_mean(grid.metric, list(RunFolder(trial.folder).summary()))
    return f"metric {grid.metric}: {trial.folder / 'summary.json'} has no such figure{hint}"


def _figure(trial: Trial, metric: str) -> float | None:
    value = RunFolder(trial.folder).summary().get(metric)
    return float(value) if isinstance(value, int | float) else None


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
