"""Whether anyone else is using the processor: a measurement beside others' work is worth nothing.

The load average cannot tell: it remembers for minutes what ran just before, and counts us. So the
busy cores of the whole machine are read from the kernel, and those of this process and of the
children it has waited for taken away.
"""

import os
import sys
import time
from pathlib import Path

from dist_resnet.base.errors import UserError

LIMIT = 0.5  # cores
_STAT = Path("/proc/stat")


class LoadMeter:
    """Cores that others keep busy, on average since it was made; our children must have ended."""

    def __init__(self) -> None:
        self._start = _seconds()

    def others(self) -> float:
        """Cores."""
        both = zip(_seconds(), self._start, strict=True)
        elapsed, machine, ours = (now - before for now, before in both)
        return round(max(0.0, (machine - ours) / elapsed), 2)


def check_idle(force: bool, sample_seconds: float) -> float:
    """Cores that others keep busy, while nothing of ours runs.

    Args:
        force: warn where the machine is loaded, instead of refusing.

    Raises:
        UserError: it is loaded.
    """
    meter = LoadMeter()
    time.sleep(sample_seconds)
    busy = meter.others()
    if busy > LIMIT:
        line = f"{busy:.1f} cores are busy with something else"
        if not force:
            raise UserError(f"{line}; wait until they are idle, or add --force and do not believe")
        print(f"warning: {line}: do not believe these figures", file=sys.stderr)
    return busy


def _seconds() -> tuple[float, float, float]:
    """On the clock; that all cores together were busy since the machine started; that we were."""
    ticks = map(int, _STAT.read_text().split()[1:9])
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, sum(os.times()[:4])
