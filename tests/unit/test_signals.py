"""A request to stop is made once, and only a later second signal means "at once"."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dist_resnet import signals

PROGRAM = """
import sys, time
from dist_resnet import signals
from dist_resnet.cli import run_command

def main():
    signals.install()
    if sys.argv[1] == "deferred":
        signals.defer()
    print("ready", flush=True)
    for _ in range(10_000):
        time.sleep(0.01)
        if signals.received() and sys.argv[2] == "answers":
            return 0
    return 1

run_command(main)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as stdout:
        assert stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_the_first_step_a_signal_ends_the_process_with_75(number: int) -> None:
    process = start("immediate", "answers")
    process.send_signal(number)
    assert process.wait(100) == 75


def test_a_burst_of_signals_is_one_request() -> None:
    process = start("deferred", "answers")
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 0


def test_a_later_second_signal_ends_at_once() -> None:
    process = start("deferred", "ignores")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(50) == 75


def test_a_repeated_request_sends_one_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    signals.request()
    monkeypatch.setattr(signals, "_received", signal.SIGTERM)
    signals.request()
    assert sent == [signal.SIGTERM]
