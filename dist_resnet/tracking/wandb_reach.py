"""Online or not: what the user asked for, and whether a W&B server answers."""

import configparser
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dist_resnet.tracking.tracker import Say, say_on_stderr

# What WANDB_MODE may say, with wandb's older names.
MODES = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_QUERY = b'{"query": "query Viewer { viewer { id } }"}'


def wanted_mode(configured: str, say: Say = say_on_stderr) -> tuple[str, str]:
    """The mode, and what asked for it: the first of these that says anything but auto.

    wandb.mode; WANDB_MODE; WANDB_DISABLED; W&B's settings files, into which `wandb disabled` and
    `wandb offline` write: that of the working folder, then the user's. Else auto, asked by nobody.
    """
    if configured != "auto":
        return configured, f"wandb.mode={configured}"
    asked = os.environ.get("WANDB_MODE", "")
    if asked.lower() in MODES:
        return MODES[asked.lower()], f"WANDB_MODE={asked}"
    if asked:
        say(f"wandb: WANDB_MODE={asked} is not one of {', '.join(MODES)}; ignored")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled", f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
    for path in _settings_files():
        found = _mode_in(path)
        if found in MODES:
            return MODES[found], f"{path} says mode = {found} (undone by: wandb enabled)"
    return "auto", ""


def _settings_files() -> Iterator[Path]:
    here = Path(os.environ.get("WANDB_DIR") or ".")
    yield here / (".wandb" if (here / ".wandb").exists() else "wandb") / "settings"
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    yield Path(folder) / "settings"


def _mode_in(path: Path) -> str:
    """Lower case; empty where the file says nothing, or cannot be read."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path)
        return parser.get("default", "mode", fallback="").strip().lower()
    except (OSError, ValueError, configparser.Error):
        return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def why_unreachable(base_url: str, seconds: float = 4.0) -> str | None:
    """Why the server cannot be used now, or None if it answers (or this check cannot tell).

    wandb.init itself takes its time-out plus about 11 s to give up: 100.9 s by default without a
    network, 16 s with a time-out of 5 s. One request of our own knows it in at most `seconds`, in a
    thread because name resolution has no time-out (10 to 30 s where a firewall swallows DNS).
    """
    result: list[str | None] = []
    probe = threading.Thread(
        target=lambda: result.append(_ask(base_url, seconds)), name="wandb-probe", daemon=True
    )
    probe.start()
    probe.join(seconds)
    return result[0] if result else f"no answer from {base_url} in {seconds:g} s"


def _ask(base_url: str, seconds: float) -> str | None:
    try:
        request = urllib.request.Request(
            base_url.rstrip("/") + "/graphql", _QUERY, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        # 401 and the like come from a server that works: whether the key does, wandb.init finds out
        # in about 1 s. A server in trouble costs it 16 s.
        return f"{base_url} answers {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return None  # wandb-core has certificates of its own; it may succeed where we do not
        return f"cannot reach {base_url} ({reason})"
