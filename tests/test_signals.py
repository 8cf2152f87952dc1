"""Interrupted commands: one line and the right code, however many signals come; in real processes, without Ray."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

_COMMAND = """
import sys, time
import cluster.cli

@cluster.cli.app.command()
def linger(seconds: float) -> None:
    '''Wait for a signal, then let go of something for a while.'''
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("letting go", flush=True)
        time.sleep(seconds)
        print("let go", flush=True)

sys.argv = ["pinakes", "linger", sys.argv[1]]
cluster.cli.main()
"""


def started(seconds: float) -> subprocess.Popen[str]:
    """Start a command that lets go for `seconds` once a signal has come; return it when it waits for one."""
    command = [sys.executable, "-c", _COMMAND, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("numbers", "code", "line"),
    [
        ([signal.SIGINT], 130, "interrupted; what is done stays done"),
        ([signal.SIGINT] * 3, 130, "interrupted; what is done stays done"),
        ([signal.SIGINT, signal.SIGTERM], 130, "interrupted; what is done stays done"),
        ([signal.SIGTERM], 143, "terminated; what is done stays done"),
        ([signal.SIGTERM] * 3, 143, "terminated; what is done stays done"),
    ],
)
def test_signals_that_come_together_end_it_once(numbers: list[signal.Signals], code: int, line: str) -> None:
    process = started(0.3)
    for number in numbers:
        process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code
    assert out == "letting go\nlet go\n"
    assert err.count("\n") == 1
    assert err.startswith(line)


def test_a_later_signal_ends_a_command_that_does_not_let_go() -> None:
    process = started(600)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "letting go\n"
    time.sleep(2.5)  # longer than signals count as one
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip().startswith("interrupted")
    assert "Traceback" not in err


def test_handlers_go_back_to_what_they_were() -> None:
    from cluster import signals

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals.handled():
        assert signal.getsignal(signal.SIGINT) is not before[0]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray's native layer would
        signals.renew()
        assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    signals.renew()  # outside a command, in a library or a test, signals are none of our business
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
