"""A call that may take so many seconds.

On the main thread of a Unix process an alarm interrupts the call, and nothing of it goes on: Python code, sleeping, and
waiting for a file, a lock or a socket. Elsewhere (another thread, Windows) the call runs in a thread of its own, which
is left behind when it is late: it goes on, and takes processor time, until it ends by itself or the program does.

Neither interrupts C code that never gives Python a turn, such as one endless product of matrices. A process could be
killed even then, but cannot be forked safely where JAX runs, nor be given a function of a notebook or a model on a
device.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def limited(call: Callable[[], T], seconds: float | int) -> T:
    """What `call` returns or raises.

    Raises:
        TimeoutError: it took longer.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        return _with_alarm(call, seconds)
    return _in_thread(call, seconds)


class _Late(BaseException):
    """No Exception, so that a call that catches all of these ends too."""


def _with_alarm(call: Callable[[], T], seconds: float | int) -> T:
    running = True

    def late(signum, frame):
        if running:
            raise _Late

    handler = signal.signal(signal.SIGALRM, late)
    try:
        timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # every second, should the first one be swallowed
        try:
            value = call()
            running = False
            return value
        except _Late:
            raise TimeoutError(f"took longer than {round(seconds, 3):g} s") from None
        finally:
            running = False
            signal.setitimer(signal.ITIMER_REAL, *timer)
    finally:
        signal.signal(signal.SIGALRM, handler)


def _in_thread(call: Callable[[], T], seconds: float | int) -> T:
    values: list[T] = []
    errors: list[BaseException] = []

    def run():
        try:
            values.append(call())
        except BaseException as error:  # raised again by whoever waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="limited call")  # a daemon, so that the program can end
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"took longer than {round(seconds, 3):g} s")
    if errors:
        raise errors[0]
    return values[0]
