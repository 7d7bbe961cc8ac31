"""Whether anyone else is using the processor: a measurement beside others' work is worth nothing.

The load average alone cannot tell: it remembers for minutes what ran just before, and counts us.
So the busy cores of the whole machine are read from the kernel, and those of this process and of
the children it has waited for taken away.
"""

import os
import sys
import time
from pathlib import Path

from dist_resnet.base.errors import UserError

LIMIT = 0.5  # cores
_SAMPLE_SECONDS = 3.0
_STAT = Path("/proc/stat")


class LoadMeter:
    """Cores that others keep busy, on average since it was made; our children must have ended."""

    def __init__(self) -> None:
        self._start = time.monotonic(), _machine_seconds(), sum(os.times()[:4])

    def others(self) -> float | None:
        """Cores; None where the kernel does not tell (no /proc)."""
        start, machine_start, own_start = self._start
        elapsed, machine = time.monotonic() - start, _machine_seconds()
        if machine is None or machine_start is None or elapsed <= 0:
            return None
        ours = sum(os.times()[:4]) - own_start
        return round(max(0.0, (machine - machine_start - ours) / elapsed), 2)


def check_idle(force: bool, sample_seconds: float = _SAMPLE_SECONDS) -> float | None:
    """Cores that others keep busy.

    Args:
        force: warn where the machine is loaded, instead of refusing.

    Raises:
        UserError: it is loaded.
    """
    average = busy = os.getloadavg()[0]
    if average > LIMIT:  # the average may still speak of what has ended
        meter = LoadMeter()
        time.sleep(sample_seconds)
        sampled = meter.others()
        busy = average if sampled is None else min(average, sampled)
    if busy > LIMIT:
        line = f"{busy:.1f} cores are busy with something else (load average {average:.1f})"
        if not force:
            raise UserError(f"{line}; wait until they are idle, or add --force and do not believe")
        print(f"warning: {line}: do not believe these figures", file=sys.stderr)
    return busy


def _machine_seconds() -> float | None:
    """Seconds that all cores together were busy, since the machine started."""
    try:
        first = _STAT.read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
