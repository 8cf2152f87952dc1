"""What Ctrl-C and SIGTERM do to a command: it lets go of what it holds and ends with one line, however often they come.

Ray, the shell and `timeout` all send them more than once, and to every process of the group.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143

_PATIENCE_SECONDS = 2.0  # `timeout -s INT` sends two at once, and so do impatient fingers
_LINES = {
    INTERRUPTED: "interrupted; what is done stays done: run the same command to go on",
    TERMINATED: "terminated; what is done stays done: run the same command to go on",
}

_stopping_since: float | None = None
_active = False


@contextmanager
def handled() -> Iterator[None]:
    """Handle both in the block: the first ends it by KeyboardInterrupt or SystemExit, and those just after are ignored.

    One that comes later, while the command still lets go of things, ends the process at once.
    """
    global _active, _stopping_since
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    _active, _stopping_since = True, None
    renew()
    try:
        yield
    finally:
        _active = False
        for number, handler in before:
            signal.signal(number, handler)


def renew() -> None:
    """Take the signals back from Ray, whose native layer takes SIGTERM when it connects and prints a stack."""
    if _active and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)


def say_goodbye(code: object) -> None:
    """Print the line of an exit code that a signal led to; nothing for others."""
    if code in _LINES:
        print(_LINES[int(str(code))], file=sys.stderr)


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopping_since
    now = time.monotonic()
    if _stopping_since is None:
        _stopping_since = now
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)
    if now - _stopping_since > _PATIENCE_SECONDS:
        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        os.write(2, f"\n{_LINES[code]}\n".encode())
        os._exit(code)
