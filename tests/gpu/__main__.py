"""Every check and measurement for one GPU, in order of importance: python -m tests.gpu OUT.json

    --seconds=N     end within about N seconds (default 540)
    --only=A,B      these parts only
    --rehearse      without a GPU: the same parts on a CPU, as far as they go

Further arguments are key=value pairs for the trainings, such as data.root=data. Each part is a
process group of its own with a time limit; OUT.json is written anew after each.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Name and limit in seconds, by importance.
PARTS = {
    "facts": 60,
    "checks": 150,
    "times": 120,
    "command": 120,
    "profile": 60,
    "nccl": 60,
    "sharing": 60,
    "tuning": 90,
}


def _run(part: str, limit: float, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What one part found, also if it was cut short."""
    target, started = folder / f"{part}.json", time.monotonic()
    command = [sys.executable, "-m", "tests.gpu.parts", part, str(target), *arguments]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        ending: Any = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        ending = "time limit"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what a part leaves behind
    process.wait()
    found = json.loads(target.read_text()) if target.exists() else {}
    return {"ending": ending, "seconds": round(time.monotonic() - started, 1), **found}


def main(arguments: list[str]) -> int:
    """Run the parts; 0 if each ended well."""
    options = [a for a in arguments if a.startswith("--")]
    rest = [a for a in arguments if not a.startswith("--")]
    if not rest:
        print(__doc__, file=sys.stderr)
        return 2
    target, pairs = Path(rest[0]), rest[1:]
    values = dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)
    rehearsed = ["--rehearse"] if "--rehearse" in options else []
    chosen = values["only"].split(",") if "only" in values else list(PARTS)
    end, found = time.monotonic() + float(values.get("seconds", 540)), {}
    with tempfile.TemporaryDirectory() as name:
        for part in chosen:
            left = end - time.monotonic()
            print(f"== {part} ({left:.0f} s left)", flush=True)
            if left < 5:
                found[part] = {"ending": "no time left"}
            else:
                found[part] = _run(part, min(PARTS[part], left), Path(name), rehearsed + pairs)
            whole = target.with_suffix(".new")
            whole.write_text(json.dumps(found, indent=1))
            whole.replace(target)
            print(f"   {found[part]['ending']} after {found[part].get('seconds')} s", flush=True)
    return int(any(part["ending"] != 0 for part in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
