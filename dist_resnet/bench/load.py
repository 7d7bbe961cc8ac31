"""Whether anyone else is using the processor: a measurement beside others' work is worth nothing.

The load average alone cannot tell: it remembers for minutes what ran just before, and counts us.
So the busy cores of the whole machine are read from the kernel, and those of our own processes,
living and ended, taken away.
"""

import os
import sys
import time
from pathlib import Path

from dist_resnet.base.errors import UserError

LIMIT = 0.5  # cores
_SAMPLE_SECONDS = 3.0
_PROC = Path("/proc")


class LoadMeter:
    """Cores that others keep busy, on average since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic(), _machine_seconds(), _own_seconds()

    def others(self) -> float | None:
        """Cores; None where the kernel does not tell (no /proc)."""
        start, machine_start, own_start = self._start
        elapsed, machine = time.monotonic() - start, _machine_seconds()
        if machine is None or machine_start is None or elapsed <= 0:
            return None
        ours = max(0.0, _own_seconds() - own_start)
        return round(max(0.0, (machine - machine_start - ours) / elapsed), 2)


def check_idle(force: bool, sample_seconds: float = _SAMPLE_SECONDS) -> float | None:
    """Cores that others keep busy.

    Args:
        force: warn where the machine is loaded, instead of refusing.

    Raises:
        UserError: it is loaded.
    """
    average = os.getloadavg()[0]
    busy: float | None = average
    if average > LIMIT:  # the average may still speak of what has ended
        meter = LoadMeter()
        time.sleep(sample_seconds)
        sampled = meter.others()
        busy = average if sampled is None else min(average, sampled)
    if busy is not None and busy > LIMIT:
        line = f"{busy:.1f} cores are busy with something else (load average {average:.1f})"
        if not force:
            raise UserError(f"{line}; wait until they are idle, or add --force and do not believe")
        print(f"warning: {line}: do not believe these figures", file=sys.stderr)
    return busy


def _machine_seconds() -> float | None:
    """Seconds that all cores together were busy, since the machine started."""
    try:
        first = (_PROC / "stat").read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process and all that descend from it, ended ones included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            # The second field, a name in brackets, may hold anything.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    ours, grew = {os.getpid()}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in ours} - ours
        ours |= more
        grew = bool(more)
    return sum(ticks.get(pid, 0) for pid in ours) / os.sysconf("SC_CLK_TCK")
