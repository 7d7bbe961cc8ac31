"""What works here, and what does not: one line each, with a remedy for each failure."""

import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from dist_resnet.base.errors import UserError, one_line

Level = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's; `remedy` is empty where there is nothing to mend."""

    level: Level
    subject: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        advice = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<5} {self.subject:<14} {self.text}{advice}"


Examination = Callable[[], Finding]


def examine(subject: str, action: Examination) -> Finding:
    """What `action` finds; an exception of any kind is a finding too."""
    try:
        return action()
    except UserError as error:
        text, _, remedy = str(error).partition("; ")
        return Finding("FAIL", subject, text, remedy or "mend that and run this again")
    except Exception as error:  # a broken installation raises anything
        return Finding("FAIL", subject, one_line(error), "run `make setup` again, then this")


def show(findings: Iterable[Finding], several_nodes: bool) -> bool:
    """Print them, headed by the host where there are several; whether none of them failed."""
    good = True
    for finding in findings:
        good &= finding.level != "FAIL"
        head = f"[{socket.gethostname()}] " if several_nodes else ""
        sys.stdout.write(f"{head}{finding.line()}\n")  # one write: nodes share a terminal
        sys.stdout.flush()
    return good
