"""A W&B run behind a bounded queue and a thread of its own: it can neither block nor end training.

Measured with wandb 0.31: a killed wandb-core makes the next `run.log` raise, a stopped one makes it
block for ever once the socket is full, and both make the interpreter's exit raise or hang. Here the
training thread only ever puts a row into a queue (about 5 us).

Not a process of its own: one that outlives a killed trainer, to send the rest, would mix its late
rows with those of the same run started again. Importing this imports no wandb.
"""

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dist_resnet.base.errors import one_line
from dist_resnet.config.schema import WandbConfig
from dist_resnet.tracking.tracker import Artifact, Media, Row, Say, Tracker, say_on_stderr
from dist_resnet.tracking.wandb_reach import wanted_mode
from dist_resnet.tracking.wandb_session import WandbSession

QUEUE_ROWS = 4096  # at a row a second, more than an hour of silence from wandb-core; about 4 MB
FAILURES_IN_A_ROW = 3
COUNTED = ("row", "picture")  # what W&B's `_step` grows with, by one each
END = "end"


def start_wandb(
    settings: WandbConfig,
    run_dir: Path | str,
    config: Mapping[str, object],
    run_id: str,
    name: str,
    *,
    resume_position: int | None = None,
    say: Say = say_on_stderr,
    init_seconds: float = 4.0,
    close_seconds: float = 15.0,
) -> "WandbTracker | None":
    """Start or continue the run `run_id`; None if W&B is disabled or does not start.

    Never prompts, never raises, never waits more than 16 s (offline about 1 s; 5 s if the server
    does not answer, 7 s if it stops answering). `resume_position` is what `position()` returned
    when the checkpoint was written: later rows are taken back, so that a rewind doubles no step.
    """
    mode, asked = wanted_mode(settings.mode, say)
    if mode == "disabled":
        say(f"wandb: off, because {asked}")
        return None
    session = WandbSession(settings, Path(run_dir), config, run_id, name, say, mode, asked)
    session.resume_position = resume_position
    session.init_seconds, session.finish_seconds = init_seconds, max(1.0, close_seconds - 3.0)
    tracker = WandbTracker(session, close_seconds)
    return tracker if tracker.start(init_seconds + 12.0) else None


class WandbTracker(Tracker):
    """A tracker around a session. `log` never blocks and never raises; `close` is bounded."""

    name = "wandb"

    def __init__(self, session: WandbSession, close_seconds: float) -> None:
        self.dropped = 0
        self._session = session
        self._say = session.say
        self._close_seconds = close_seconds
        self._queue: queue.Queue[tuple[str, Callable[[], None]]] = queue.Queue(QUEUE_ROWS)
        self._broken: str | None = None
        self._closing = self._finished = False
        self._first_step: int | None = None
        self._accepted = 0
        self._stop, self._ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb-writer", daemon=True)

    def start(self, seconds: float) -> bool:
        """Open the session in the writer thread; whether it is open within `seconds`."""
        self._thread.start()
        if not self._ready.wait(seconds):
            self._broken = f"it did not start within {seconds:g} s"
            self._session.abandon()
        if self._broken:
            self._say(f"wandb: off, because {self._broken}; metrics.jsonl has every figure")
            return False
        # wandb's own exit hook, registered in the meantime, waits for ever for a stopped service.
        # Hooks run in reverse order, so this one goes first, should nobody have called close.
        atexit.register(self.close, 1, {})
        return True

    @property
    def run_id(self) -> str:
        """The run's id; the sweep agent's where there is one."""
        return self._session.run_id

    @property
    def mode(self) -> str:
        """'online' or 'offline'; 'off' once W&B no longer works."""
        return "off" if self._broken else self._session.mode

    def log(self, row: Row) -> None:
        """Queue a row; with a full queue, a dead service or a bad value, count it in `dropped`."""
        try:
            # What cannot become a number must fail here, where the row can still be left out.
            plain = {key: v if isinstance(v, int) else float(v) for key, v in row.items()}
        except (TypeError, ValueError):
            self.dropped += 1
            return
        self.dropped += not self._put("row", lambda: self._session.log(plain))

    def show(self, make: Callable[[], Media], classes: Sequence[str] = ()) -> None:
        """Queue pictures, which `make` draws in the writer thread; `classes`: of its matrices."""
        self._put("picture", lambda: self._session.show(make(), classes))

    def alert(self, title: str, text: str, error: bool = False) -> None:
        """Queue an alert."""
        self._put("alert", lambda: self._session.alert(title, text, error))

    def keep(self, artifact: Artifact) -> None:
        """Queue a file, which must stay where it is until the run has been sent."""
        self._put("artifact", lambda: self._session.keep(artifact))

    def position(self) -> int | None:
        """W&B's `_step` of the next row, queued ones counted; None when that cannot be known.

        To be saved with a checkpoint and given back as `resume_position`.
        """
        if self._broken or self._first_step is None:
            return None
        return self._first_step + self._accepted

    def stop_requested(self) -> bool:
        """Whether somebody pressed "Stop run" on the dashboard (noticed within about 15 s)."""
        return self._stop.is_set()

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Send what is queued and end the run, in `close_seconds` at most; again: does nothing."""
        if self._closing:
            return
        end = time.monotonic() + self._close_seconds
        self._closing = True
        atexit.unregister(self.close)
        if self._broken is None:
            last = dict(summary)
            with contextlib.suppress(queue.Full):
                job = (END, lambda: self._session.finish(exit_code, last))
                self._queue.put(job, timeout=self._close_seconds)
            self._thread.join(max(0.1, end - time.monotonic()))
            if self._thread.is_alive():
                self._broken = f"it did not finish within {self._close_seconds:g} s"
            elif not (self._broken or self._finished):
                self._broken = "its thread has ended"
        if self._broken:
            self._session.abandon()
            # How many rows it lost nobody knows: some sit in the socket of a service that is gone.
            self._say(
                f"wandb: {self._broken}; metrics.jsonl has every row; "
                f"send what wandb has: {self._session.resend()}"
            )
        elif self.dropped:
            self._say(f"wandb: {self.dropped} rows are in metrics.jsonl only")

    def _put(self, what: str, do: Callable[[], None]) -> bool:
        """Queue a job, if W&B works and has room for it."""
        if self._broken or self._closing:
            return False
        try:
            self._queue.put_nowait((what, do))
        except queue.Full:
            if not self.dropped:
                self._say("wandb: has stopped answering; rows now go to metrics.jsonl only")
            return False
        self._accepted += what in COUNTED
        return True

    def _work(self) -> None:
        try:
            self._session.open(self._stop.set)
            self._first_step = self._session.next_step()
        except BaseException as error:  # SystemExit and its like too: this is the end of the thread
            self._broken = self._broken or f"it did not start: {one_line(error)}"
        late = self._broken
        self._ready.set()
        if late:  # training may have gone on without it; then nothing of it may be left at exit
            self._session.abandon()
        else:
            self._write()

    def _write(self) -> None:
        """Do what is queued until the end or until the service is given up."""
        failures, what = 0, ""
        while what != END:
            what, do = self._queue.get()
            try:
                do()
                failures = 0
            except BaseException as error:
                failures += 1
                self.dropped += what == "row"
                self._accepted -= what in COUNTED
                if self._broken:
                    return  # abandoned by close, which has said so
                # A lost connection never comes back: wandb does not restart its service. An
                # artifact's file may be missing, too.
                lost = (OSError, EOFError) if what == "row" else (ConnectionError, EOFError)
                if what == END and isinstance(error, TimeoutError):
                    self._broken = "not everything could be sent in time"
                elif what == END:
                    self._broken = f"it did not finish ({one_line(error)})"
                elif isinstance(error, lost) or failures == FAILURES_IN_A_ROW:
                    self._broken = f"it stopped working ({one_line(error)})"
                    self._say(f"wandb: {self._broken}; training and metrics.jsonl go on")
                    return
                elif what != "row":
                    self._say(f"wandb: no {what} ({one_line(error)})")
        self._finished = True
