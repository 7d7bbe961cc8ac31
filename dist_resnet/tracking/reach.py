"""Online or not: what the user asked for, and whether a W&B server answers."""

import os
import ssl
import threading
import urllib.error
import urllib.request

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


def wanted_mode(configured: str, say: Say = say_on_stderr) -> str:
    """The configured mode; `auto` lets WANDB_MODE decide where that is set."""
    if configured != "auto" or not (asked := os.environ.get("WANDB_MODE")):
        return configured
    if asked.lower() not in MODES:
        say(f"wandb: WANDB_MODE={asked} is not one of {', '.join(MODES)}; ignored")
    return MODES.get(asked.lower(), "auto")


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
