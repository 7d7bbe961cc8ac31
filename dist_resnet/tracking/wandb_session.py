"""A W&B run and its settings: the only door to wandb, which is imported when a run starts."""

import contextlib
import json
import netrc
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dist_resnet.base.errors import one_line
from dist_resnet.tracking import wandb_media
from dist_resnet.tracking.tracker import Artifact, Media, Row, Say
from dist_resnet.tracking.wandb_options import wandb_options
from dist_resnet.tracking.wandb_reach import why_unreachable

GLOBS = ("train/*", "val/*", "gap/*", "perf/*")


class WandbSettings(Protocol):
    """The `wandb` section of the configuration."""

    @property
    def mode(self) -> str:
        """auto, online, offline or disabled."""

    @property
    def project(self) -> str:
        """Where the run goes."""

    @property
    def entity(self) -> str | None:
        """Whose project; None or empty: the account's default."""

    @property
    def group(self) -> str | None:
        """What ties the runs of one experiment together."""

    @property
    def tags(self) -> Sequence[str]:
        """Words to find the run by."""


class WandbSession:
    """`wandb_writer.Session` on wandb.run. Not thread-safe, but for `abandon`."""

    mode: str
    asked: str
    """What asked for the mode; empty: nobody."""
    resume_position: int | None
    init_seconds: float
    finish_seconds: float

    def __init__(
        self,
        settings: WandbSettings,
        run_dir: Path,
        config: Mapping[str, object],
        run_id: str,
        name: str,
        say: Say,
    ) -> None:
        self.run_id = run_id
        self._folder = run_dir / "wandb"
        self._say = say
        self._run: Any = None
        self._rewound = False
        self._continues = False
        self._init: dict[str, Any] = {"dir": str(run_dir), "config": dict(config), "name": name}
        self._init |= {"group": settings.group or None, "tags": list(settings.tags)}
        self._init |= {"job_type": "train"}
        # A sweep agent has already decided these; wandb ignores others with a warning.
        self._sweep = bool(os.environ.get("WANDB_SWEEP_ID"))
        if not self._sweep:
            self._init |= {"project": settings.project, "entity": settings.entity or None}
            self._init |= {"id": run_id}

    def open(self, on_stop: Callable[[], None]) -> None:
        """Start the run in the best mode that works."""
        began = time.monotonic()
        # wandb itself would silently write to the system's temporary folder instead.
        self._folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self._folder, os.W_OK):
            raise PermissionError(f"cannot write to {self._folder}")
        self._continues = any(self._folder.glob(f"*run-*-{self.run_id}*"))
        # Where it stages tables and artifacts: beside the run, not in the user's home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(self._folder))
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
        options = wandb_options(wandb, self.init_seconds, self.finish_seconds, on_stop)
        if self.mode == "online":
            try:
                self._start(wandb, options, "online", deadline=began + 6.0)
            except Exception as error:
                why, self.mode = f"the online start failed ({one_line(error)})", "offline"
        if self.mode == "offline":
            self._start(wandb, options, "offline", deadline=began + 60.0)
        self._define_metrics()
        self._tell(why)

    def log(self, row: Row) -> None:
        """Log the row; the step is a value in it, never wandb's own step, which drops rows."""
        self._run.log(dict(row))

    def show(self, media: Media, classes: Sequence[str]) -> None:
        """Log one row of pictures."""
        import wandb

        shown = {key: value for key, value in media.items() if not wandb_media.too_large(value)}
        for key in media.keys() - shown.keys():
            self._say(
                f"wandb: no {key}: {len(classes):,} classes have more than the"
                f" {wandb_media.MOST_CELLS:,} cells that a table takes; its picture shows all"
            )
        self._run.log(wandb_media.row(wandb, shown, classes))

    def alert(self, title: str, text: str, error: bool) -> None:
        """W&B sends it by the ways that its reader has chosen; offline, when it is synced."""
        self._run.alert(title, text, level="ERROR" if error else "INFO")

    def keep(self, artifact: Artifact) -> None:
        """Log the file as an artifact."""
        import wandb

        self._run.log_artifact(wandb_media.artifact(wandb, artifact))

    def next_step(self) -> int | None:
        """W&B's `_step` of the next row."""
        if self._rewound:
            return self.resume_position
        if self._continues and self.mode == "offline":
            return None  # counts from 0 again; `wandb sync` shifts it to an offset unknown here
        return int(self._run.starting_step)  # run.step is 0 until the first row, resumed or not

    def finish(self, exit_code: int, summary: Mapping[str, object]) -> None:
        """Write the summary, send the rest, and take the service down with its exit hook."""
        import wandb

        # A path or a dtype among the values would fail all of them.
        self._run.summary.update(json.loads(json.dumps(dict(summary), default=str)))
        self._run.finish(exit_code=exit_code)
        with contextlib.suppress(SystemExit):  # raised for a service that ended badly
            wandb.teardown()

    def abandon(self) -> None:
        """Kill wandb-core and take back its exit hook, which would raise or wait for ever."""
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

    def _start(self, wandb: Any, options: dict[str, Any], mode: str, deadline: float) -> None:
        """wandb.init; where taking back rows is refused, continue after them, if there is time."""

        def begin(**resume: str) -> Any:
            # A Settings object of its own each time: init writes into it.
            settings = wandb.Settings(**options)
            try:
                return wandb.init(**self._init, mode=mode, settings=settings, **resume)
            except Exception:
                # The service still holds the id and would refuse it to the next attempt.
                self.abandon()
                with contextlib.suppress(Exception, SystemExit):
                    wandb.teardown()
                wandb.setup(wandb.Settings(silent=True))
                raise

        refused: Exception | None = None
        if self.resume_position is not None and not self._sweep:
            moment = f"{self.run_id}?_step={self.resume_position - 1}"
            try:
                self._run = begin(resume_from=moment)
                self._rewound = True
            except Exception as error:
                if time.monotonic() > deadline:
                    raise
                refused = error
        if self._run is None:
            self._run = begin(resume="allow")
        if refused:
            self._say(f"wandb: rows after the checkpoint stay ({one_line(refused)})")
        self.run_id = str(self._run.id)

    def _define_metrics(self) -> None:
        self._run.define_metric("step", hidden=True)
        for glob in GLOBS:
            self._run.define_metric(glob, step_metric="step")

    def _tell(self, why: str | None) -> None:
        if self.mode == "online":
            self._say(f"wandb: online, {self._run.url}")
        else:
            self._say(
                f"wandb: offline{', because ' + why if why else ''}; to send it: {self.resend()}"
            )


def why_no_credentials(base_url: str) -> str | None:
    """None if there is a key for this server. Prompts nobody; wandb.init would, for ever."""
    missing = "there is no API key (wandb login)"
    try:
        from wandb.sdk.lib import wbauth

        found = wbauth.authenticate_session(
            host=base_url, source="dist_resnet", prompt=False, update_session=False
        )
        return None if found else missing
    except (ImportError, AttributeError, TypeError):  # private; another version may lack it
        if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return None
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            hosts = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc")).hosts
            if urlsplit(base_url).netloc in hosts:
                return None
        return missing
    except Exception as error:  # a malformed key: wandb says what is wrong with it
        return one_line(error)
