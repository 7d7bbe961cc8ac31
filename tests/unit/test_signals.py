"""A request to stop is made once, and only a later second signal means "at once"."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dist_resnet.base import signals

PROGRAM = """
import sys, time
from dist_resnet.base import signals
from dist_resnet.base.cli import run_command

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


def start(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal, sys; {before}\n{PROGRAM}", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as stdout:
        assert stdout.readline() == "ready\n"
    return process


ASKING = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGALRM"]
ENDING = {
    number
    for number in signal.valid_signals()
    if number not in (signal.SIGKILL, signal.SIGSTOP)
    # Kept for itself, ignored by Python, faults of the process itself, stops and news.
    and signal.getsignal(number) is not None
} - {
    signal.SIGPIPE, signal.SIGXFSZ, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL,
    signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS, signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP,
    signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG, signal.SIGWINCH,
}  # fmt: skip


def test_whatever_ends_a_process_asks_it_to_stop() -> None:
    before = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGPIPE)}
    with signals.borrowed():
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # somebody's timer
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signals.install()
        signals.defer()
        deaf = {number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL}
        assert deaf == set()
        assert (
            signal.getsignal(signal.SIGALRM) == signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
        )
        os.kill(os.getpid(), signal.SIGRTMIN + 3)
        assert signals.received_name() == f"signal {signal.SIGRTMIN + 3}"
    assert before == {number: signal.getsignal(number) for number in before}
    assert signals.received() == 0


@pytest.mark.parametrize("name", ASKING)
def test_a_first_signal_only_asks(name: str) -> None:
    process = start("deferred", "answers")
    process.send_signal(signal.Signals[name])
    assert process.wait(10) == 0


def test_under_nohup_a_closed_terminal_asks_nothing() -> None:
    process = start("deferred", "answers", before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.Signals[name] for name in ASKING])
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


def test_a_request_in_a_thread_asks_once_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_received", 0)
    monkeypatch.setattr(signals, "_received_at", 0.0)
    monkeypatch.setattr(signals, "_deferred", True)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("a second one means at once"))
    for _ in range(2):
        thread = threading.Thread(target=signals.request)
        thread.start()
        thread.join()
        assert signals.received() == signal.SIGTERM
        monkeypatch.setattr(signals, "_received_at", -100.0)
