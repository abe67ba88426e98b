"""Waiting for what other threads and processes do: for a condition, never for a time in which it should hold by now.

A machine that is half as fast, and busy, passes too: limits are there for what never comes. A bound on how long
something takes is met by the best of a few attempts, as anything but the product can only make one longer.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final, TypeVar

import pytest

_Value = TypeVar("_Value")

# Of a bound: what makes so many attempts in a row too slow is no neighbour.
ATTEMPTS: Final = 5


def wait_for(
    read: Callable[[], _Value],
    accept: Callable[[_Value], bool] = bool,
    timeout_s: float = 30.0,
    what: str = "a value",
    pause_s: float = 0.1,
) -> _Value:
    """Call `read` until `accept` likes what it gives, and return that; fail the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = read()
        if accept(value):
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s for {what}; the last was {value!r}")
        time.sleep(pause_s)


def seconds_of(call: Callable[[], object], clock: Callable[[], float] = time.monotonic) -> float:
    """How long a call takes."""
    began_s = clock()
    call()
    return clock() - began_s


_BUSY: Final = """
import os, sys, time
os.nice(int(sys.argv[1]))
began_s, used_s = time.monotonic(), time.process_time()
while time.process_time() - used_s < 0.1:
    pass
print((time.monotonic() - began_s) / 0.1)
"""


def crowding(niceness: int) -> float:
    """How many times as long as its processor time a process that gives way so far takes at the moment; 1 alone."""
    command = [sys.executable, "-c", _BUSY, str(niceness)]
    return max(1.0, float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def require_within(bound_s: float, attempt: Callable[[], float], attempts: int = ATTEMPTS) -> None:
    """Fail the test unless one of a few attempts, each of which returns its seconds, takes less than `bound_s`."""
    took_s: list[float] = []
    while len(took_s) < attempts:
        took_s.append(attempt())
        if took_s[-1] < bound_s:
            return
    pytest.fail(f"none of {attempts} attempts was within {bound_s:g} s: {took_s}")
