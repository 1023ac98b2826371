"""Calls that are late, on the main thread and elsewhere; the limits are generous, so that a slow machine passes."""

import contextlib
import signal
import threading
import time

import pytest

from pjpo.rewards.time_limit import limited


def never_returns():
    while True:
        pass


def catches_everything():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


def elsewhere(call):
    """What `call` raised or returned on another thread."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_call_in_time_gives_its_value_or_its_error():
    assert limited(lambda: 3, 60) == 3
    assert elsewhere(lambda: limited(lambda: 3, 60)) == 3
    with pytest.raises(ZeroDivisionError):
        limited(lambda: 1 / 0, 60)
    assert isinstance(elsewhere(lambda: limited(lambda: 1 / 0, 60)), ZeroDivisionError)


@pytest.mark.parametrize("call", [never_returns, catches_everything, lambda: threading.Event().wait()])
def test_on_the_main_thread_a_late_call_is_ended(call):
    with pytest.raises(TimeoutError, match=r"took longer than 0\.05 s"):
        limited(call, 0.05)


def test_elsewhere_a_late_call_is_left_behind():
    let_go = threading.Event()
    assert str(elsewhere(lambda: limited(let_go.wait, 0.05))) == "took longer than 0.05 s"
    (left,) = [thread for thread in threading.enumerate() if thread.name == "limited call"]
    assert left.daemon  # the program need not wait for it
    let_go.set()
    left.join(60)
    assert not left.is_alive()


def test_alarm_and_handler_of_others_are_put_back():
    def mine(signum, frame):
        raise AssertionError("nobody's alarm")

    before = signal.signal(signal.SIGALRM, mine)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with pytest.raises(TimeoutError):
            limited(never_returns, 0.05)
        assert signal.getsignal(signal.SIGALRM) is mine
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
