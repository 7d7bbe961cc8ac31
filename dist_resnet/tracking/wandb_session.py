"""A W&B run and its settings: the only door to wandb, which is imported when a run starts."""

import contextlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_resnet.base.errors import one_line
from dist_resnet.config.schema import WandbConfig
from dist_resnet.tracking import wandb_media
from dist_resnet.tracking.tracker import Artifact, Media, Row, Say
from dist_resnet.tracking.wandb_reach import why_unreachable

_STAGED = set[str]()
"""WANDB_DATA_DIR as runs of this process have set it."""
GLOBS = ("train/*", "val/*", "gap/*", "perf/*")


@dataclass
class WandbSession:
    """wandb.run, for one thread; all but `abandon` and `resend` may raise or block for ever."""

    settings: WandbConfig
    run_dir: Path
    config: Mapping[str, object]
    run_id: str
    """The sweep agent's, once the run is open, where there is one."""
    name: str
    say: Say
    mode: str = "auto"
    """auto, online or offline; one of the last two, once the run is open."""
    asked: str = ""
    """What asked for the mode; empty: nobody."""
    resume_position: int | None = None
    """W&B's `_step` of the first row to come; None: after all that there are."""
    init_seconds: float = 4.0
    finish_seconds: float = 12.0
    _run: Any = None
    _rewound: bool = False
    _continues: bool = False

    def open(self, on_stop: Callable[[], None]) -> None:
        """Start the best mode that works; `on_stop`: for a press of "Stop run" on the dashboard."""
        began = time.monotonic()
        # wandb itself would silently write to the system's temporary folder instead.
        self._folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self._folder, os.W_OK):
            raise PermissionError(f"cannot write to {self._folder}")
        self._continues = any(self._folder.glob(f"*run-*-{self.run_id}*"))
        stage_in(self._folder)
        os.environ.pop("WANDB_SERVICE", None)  # an inherited service could not be killed when hung
        import wandb

        library = wandb.setup(wandb.Settings(silent=True))
        why = self.asked or None
        if self.mode in ("auto", "online"):
            proxied = library.settings.https_proxy or library.settings.http_proxy
            why = why_no_credentials(library.settings.base_url)
            if why is None and not proxied:
                why = why_unreachable(library.settings.base_url)
            self.mode = "offline" if why else "online"
        if self.mode == "online":
            try:
                self._start(wandb, on_stop, deadline=began + 6.0)
            except Exception as error:
                why, self.mode = f"the online start failed ({one_line(error)})", "offline"
        if self.mode == "offline":
            self._start(wandb, on_stop, deadline=began + 60.0)
        self._run.define_metric("step", hidden=True)
        for glob in GLOBS:
            self._run.define_metric(glob, step_metric="step")
        if self.mode == "online":
            self.say(f"wandb: online, {self._run.url}")
        else:
            reason = f", because {why}" if why else ""
            self.say(f"wandb: offline{reason}; to send it: {self.resend()}")

    def log(self, row: Row) -> None:
        """Log the row; the step is a value in it, never wandb's own step, which drops rows."""
        self._run.log(dict(row))

    def show(self, media: Media, classes: Sequence[str]) -> None:
        """Log one row of pictures, and what `classes` its matrices are of."""
        import wandb

        self._run.log(wandb_media.row(wandb, media, classes, self.say))

    def alert(self, title: str, text: str, error: bool) -> None:
        """W&B sends it by the ways that its reader has chosen; offline, when it is synced."""
        self._run.alert(title, text, level="ERROR" if error else "INFO")

    def keep(self, artifact: Artifact) -> None:
        """Log the file as an artifact; it must stay where it is until the run has been sent."""
        import wandb

        self._run.log_artifact(wandb_media.artifact(wandb, artifact))

    def next_step(self) -> int | None:
        """W&B's `_step` of the next row; None if only the server could tell."""
        if self._rewound:
            return self.resume_position
        if self._continues and self.mode == "offline":
            return None  # counts from 0 again; `wandb sync` shifts it to an offset unknown here
        return int(self._run.starting_step)  # run.step is 0 until the first row, resumed or not

    def finish(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Write the summary, send the rest, and take the service down with its exit hook.

        Raises:
            TimeoutError: `finish_seconds` were not enough.
        """
        import wandb

        # A path or a dtype among the values would fail all of them.
        self._run.summary.update(json.loads(json.dumps(dict(summary), default=str)))
        self._run.finish(exit_code=exit_code)
        with contextlib.suppress(SystemExit):  # raised for a service that ended badly
            wandb.teardown()

    def abandon(self) -> None:
        """Kill wandb-core and take back its exit hook, which would raise or wait for ever.

        From any thread, at any time.
        """
        with contextlib.suppress(Exception):
            from wandb.sdk import wandb_setup

            connection = wandb_setup.singleton().assert_service()
            if connection._cleanup:
                connection._cleanup()
            if connection._proc:
                connection._proc._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    connection._proc._process.wait(1.0)

    def resend(self) -> str:
        """The command that sends everything on disk, the parts of a resumed run in their order."""
        folder, run = shlex.quote(str(self._folder)), shlex.quote(self.run_id)
        # The last star: a restart within the same second gets a folder that ends in "-1".
        if self.mode == "offline":
            return f"wandb sync {folder}/offline-run-*-{run}*"
        return f"wandb sync --include-online {folder}/*run-*-{run}*"

    @property
    def _folder(self) -> Path:
        return self.run_dir / "wandb"

    def _start(self, wandb: Any, on_stop: Callable[[], None], deadline: float) -> None:
        """wandb.init; where taking back rows is refused, continue after them, if there is time."""
        sweep = bool(os.environ.get("WANDB_SWEEP_ID"))
        wanted: dict[str, Any] = {
            "dir": str(self.run_dir), "config": dict(self.config), "name": self.name,
            "group": self.settings.group or None, "tags": list(self.settings.tags),
            "job_type": "train", "mode": self.mode,
        }  # fmt: skip
        if not sweep:  # whose agent has already decided these; wandb ignores others with a warning
            wanted |= {"project": self.settings.project, "entity": self.settings.entity or None}
            wanted |= {"id": self.run_id}
        ways = [{"resume": "allow"}]
        if self.resume_position is not None and not sweep:
            ways.insert(0, {"resume_from": f"{self.run_id}?_step={self.resume_position - 1}"})
        refused = ""
        for way in ways:
            try:
                self._run = wandb.init(**wanted, **way, settings=self._settings(wandb, on_stop))
            except Exception as error:
                # The service still holds the id and would refuse it to the next attempt.
                self.abandon()
                with contextlib.suppress(Exception, SystemExit):
                    wandb.teardown()
                wandb.setup(wandb.Settings(silent=True))
                if way is ways[-1] or time.monotonic() > deadline:
                    raise
                refused = one_line(error)
            else:
                self._rewound = "resume_from" in way
                break
        if refused:
            self.say(f"wandb: rows after the checkpoint stay ({refused})")
        self.run_id = str(self._run.id)

    def _settings(self, wandb: Any, on_stop: Callable[[], None]) -> Any:
        """For one call of wandb.init, which writes into them."""
        return wandb.Settings(
            silent=True,  # our own line says it; wandb's ten would break the progress line
            console="off",  # 4 s of a live progress line are 112 KB of control codes in its log
            init_timeout=self.init_seconds,
            login_timeout=1,  # should a prompt come up after all
            finish_timeout=self.finish_seconds,  # default: retries for 7 days
            finish_timeout_raises=True,
            # Default 15 s, and nothing is flushed when the trainer is killed: 15 s of rows lost.
            x_transaction_log_flush_interval=1.0,
            save_code=False,
            disable_code=True,
            disable_git=True,  # the configuration has the commit; the diff may hold anything
            x_disable_meta=True,  # holds the SLURM_* environment variables and the command line
            x_stats_track_process_tree=True,
            # torchrun's process is the root of all ranks on this machine.
            x_stats_pid=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid(),
            stop_fn=on_stop,  # default: SIGINT to rank 0 alone; the others hang in all-reduce
        )


def why_no_credentials(base_url: str) -> str | None:
    """None if there is a key for this server. Prompts nobody; wandb.init would, for ever."""
    try:
        from wandb.sdk.lib import wbauth

        found = wbauth.authenticate_session(
            host=base_url, source="dist_resnet", prompt=False, update_session=False
        )
        return None if found else "there is no API key (wandb login)"
    except Exception as error:  # a malformed key: wandb says what is wrong with it
        return one_line(error)


def stage_in(folder: Path) -> None:
    """Have wandb stage tables and artifacts beside the run, not in the user's home folder.

    Where the user has set WANDB_DATA_DIR that stays; what an earlier run here has set does not.
    """
    if os.environ.get("WANDB_DATA_DIR") in (None, *_STAGED):
        os.environ["WANDB_DATA_DIR"] = str(folder)
        _STAGED.add(str(folder))
