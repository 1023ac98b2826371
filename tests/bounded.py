"""What code under test may take of the processor's time and of memory, also where it runs outside Python."""

import contextlib
import pathlib
import signal
import sys

SECONDS, BYTES = 20, 2**27  # each may take a thousandth of that; what is refused here would take for ever


class TooLong(BaseException):
    """Nothing under test may catch it."""


@contextlib.contextmanager
def bounded():
    """Ends the test where it takes too much time; looks, on Linux, at how far the process grew meanwhile."""

    def stop(number, frame):
        raise TooLong(f"still at it after {SECONDS} seconds")

    linux = sys.platform == "linux"
    if linux:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # what is highest counts from here
    start = linux and _memory("VmRSS")
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
        assert not linux or _memory("VmHWM") - start < BYTES
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _memory(name):
    """In bytes: VmRSS is what the process holds, VmHWM the highest it held."""
    [line] = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024
