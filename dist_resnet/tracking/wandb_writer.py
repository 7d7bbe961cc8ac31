"""A W&B run behind a bounded queue and a thread of its own: it can neither block nor end training.

Measured with wandb 0.31: a killed wandb-core makes the next `run.log` raise, a stopped one makes it
block for ever once the socket is full, and both make the interpreter's exit raise or hang. Here the
training thread only ever puts a row into a queue (about 5 us).
"""

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_resnet.base.errors import one_line
from dist_resnet.tracking.tracker import Artifact, Media, Row, Say, say_on_stderr

QUEUE_ROWS = 4096  # at a row a second, more than an hour of silence from wandb-core; about 4 MB
FAILURES_IN_A_ROW = 3


class Session(Protocol):
    """A run as the writer thread sees it. All but `abandon` may raise or block for ever."""

    run_id: str
    mode: str

    def open(self, on_stop: Callable[[], None]) -> None:
        """Start the run; `on_stop` is called when somebody stops it on the dashboard."""

    def log(self, row: Row) -> None:
        """Record a row."""

    def show(self, media: Media, classes: Sequence[str]) -> None:
        """Record pictures; as `log`, a row of W&B's own."""

    def alert(self, title: str, text: str, error: bool) -> None:
        """Tell whoever subscribed to the run's alerts."""

    def keep(self, artifact: Artifact) -> None:
        """Record a file; it must stay where it is until the run has been sent."""

    def next_step(self) -> int | None:
        """W&B's own `_step` of the row that comes next; None if only the server could tell."""

    def finish(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Send what is left; TimeoutError if that took too long."""

    def abandon(self) -> None:
        """Kill the service; nothing may wait for it at exit. From any thread, at any time."""

    def resend(self) -> str:
        """The command that sends what is on disk."""


@dataclass(frozen=True)
class _Job:
    """Something for the writer thread to do."""

    what: str
    """row, picture, alert or artifact."""
    do: Callable[[], None]

    @property
    def positions(self) -> int:
        """By how much W&B's `_step` grows."""
        return 1 if self.what in ("row", "picture") else 0


class WandbTracker:
    """A tracker around a `Session`. `log` never blocks and never raises; `close` is bounded."""

    name = "wandb"

    def __init__(
        self, session: Session, say: Say = say_on_stderr, close_seconds: float = 15.0
    ) -> None:
        self.dropped = 0
        self._session = session
        self._say = say
        self._close_seconds = close_seconds
        self._queue: queue.Queue[_Job | None] = queue.Queue(QUEUE_ROWS)
        self._broken: str | None = None
        self._closing = self._stop = False
        self._first_step: int | None = None
        self._accepted = 0
        self._exit_code = 1
        self._summary: Mapping[str, object] = {}
        self._ready, self._done = threading.Event(), threading.Event()

    def start(self, seconds: float) -> bool:
        """Open the session in the writer thread; whether it is open within `seconds`."""
        threading.Thread(target=self._work, name="wandb-writer", daemon=True).start()
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
        self.dropped += not self._put(_Job("row", lambda: self._session.log(plain)))

    def show(self, make: Callable[[], Media], classes: Sequence[str] = ()) -> None:
        """Queue pictures, which `make` draws in the writer thread; `classes`: of its matrices."""
        self._put(_Job("picture", lambda: self._session.show(make(), classes)))

    def alert(self, title: str, text: str, error: bool = False) -> None:
        """Queue an alert."""
        self._put(_Job("alert", lambda: self._session.alert(title, text, error)))

    def keep(self, artifact: Artifact) -> None:
        """Queue a file, which must stay where it is until the run has been sent."""
        self._put(_Job("artifact", lambda: self._session.keep(artifact)))

    def message(self, text: str) -> None:
        """Do nothing: the console shows it."""

    def position(self) -> int | None:
        """W&B's `_step` of the next row, queued ones counted; None when that cannot be known.

        To be saved with a checkpoint and given back as `resume_position`.
        """
        if self._broken or self._first_step is None:
            return None
        return self._first_step + self._accepted

    def stop_requested(self) -> bool:
        """Whether somebody pressed "Stop run" on the dashboard (noticed within about 15 s)."""
        return self._stop

    def close(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Send what is queued and end the run, in `close_seconds` at most; again: does nothing."""
        if self._closing:
            return
        end = time.monotonic() + self._close_seconds
        self._exit_code, self._summary = exit_code, dict(summary)
        self._closing = True
        atexit.unregister(self.close)
        if self._broken is None:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=self._close_seconds)
            if not self._done.wait(max(0.1, end - time.monotonic())):
                self._broken = f"it did not finish within {self._close_seconds:g} s"
        if self._broken:
            self._session.abandon()
            # How many rows it lost nobody knows: some sit in the socket of a service that is gone.
            self._say(
                f"wandb: {self._broken}; metrics.jsonl has every row; "
                f"send what wandb has: {self._session.resend()}"
            )
        elif self.dropped:
            self._say(f"wandb: {self.dropped} rows are in metrics.jsonl only")

    def _put(self, job: _Job) -> bool:
        """Queue a job, if W&B works and has room for it."""
        if self._broken or self._closing:
            return False
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            if not self.dropped:
                self._say("wandb: has stopped answering; rows now go to metrics.jsonl only")
            return False
        self._accepted += job.positions
        return True

    def _on_stop(self) -> None:
        self._stop = True

    def _work(self) -> None:
        try:
            self._session.open(self._on_stop)
            self._first_step = self._session.next_step()
        except BaseException as error:  # SystemExit and its like too: this is the end of the thread
            self._broken = self._broken or f"it did not start: {one_line(error)}"
        late = self._broken
        self._ready.set()
        if late:  # training may have gone on without it; then nothing of it may be left at exit
            self._session.abandon()
            return
        self._write()
        if self._broken is None:
            self._finish()
        self._done.set()

    def _write(self) -> None:
        """Do what is queued until the sentinel comes or the service is given up."""
        failures = 0
        while (job := self._queue.get()) is not None:
            try:
                job.do()
                failures = 0
            except BaseException as error:
                failures += 1
                self.dropped += job.what == "row"
                self._accepted -= job.positions
                if self._broken:
                    return  # abandoned by close, which has said so
                # A lost connection never comes back: wandb does not restart its service. An
                # artifact's file may be missing, too.
                lost = (OSError, EOFError) if job.what == "row" else (ConnectionError, EOFError)
                if isinstance(error, lost) or failures == FAILURES_IN_A_ROW:
                    self._broken = f"it stopped working ({one_line(error)})"
                    self._say(f"wandb: {self._broken}; training and metrics.jsonl go on")
                    return
                if job.what != "row":
                    self._say(f"wandb: no {job.what} ({one_line(error)})")

    def _finish(self) -> None:
        try:
            self._session.finish(self._exit_code, self._summary)
        except TimeoutError:
            self._broken = self._broken or "not everything could be sent in time"
        except BaseException as error:
            self._broken = self._broken or f"it did not finish ({one_line(error)})"
