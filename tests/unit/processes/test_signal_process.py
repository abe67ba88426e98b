"""Signals on demand in a process of their own: the same numbers, last of all, and gone with whoever asked."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from glassbox.processes.exporter.signal_process import SignalProcess
from glassbox.signals.registry import signal_values
from glassbox.store.trace_record import RequestTrace, write_trace
from tests.signal_truth import measured_trace
from tests.waiting import wait_for

ON_DEMAND = ("routing", "tracker", "cyclic", "magnetic")
# What takes half a second again and again: nobody is done with it before a test has looked.
LONG = ON_DEMAND * 40
AUTOGROUP = Path("/proc/self/autogroup")


def long_trace(tokens: int = 400, heads: int = 8) -> RequestTrace:
    """Whose signals take half a second."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, heads, tokens, 16), dtype=np.float32)
    return measured_trace(q, k)


@pytest.fixture(scope="module")
def long() -> RequestTrace:
    return long_trace()


@pytest.fixture
def short() -> RequestTrace:
    return long_trace(tokens=12, heads=2)


@pytest.fixture
def process() -> Iterator[SignalProcess]:
    process = SignalProcess()
    yield process
    process.close()


def wait_for_end(pid: int) -> None:
    """Of a process that somebody else reaps, or nobody."""
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_for(psutil.Process(pid).status, lambda status: status == psutil.STATUS_ZOMBIE, 60.0, f"the end of {pid}")


def busy(process: SignalProcess, trace: RequestTrace) -> tuple[threading.Thread, list[str], int]:
    """Ask for what takes long; returns the asking thread, the refusals that it will have, and the process's id."""
    refused: list[str] = []
    ask = lambda: refused.extend(one.refused for one in process.values(trace, LONG).values())  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    pid = wait_for(lambda: process.pid, what="the process", pause_s=0.01)
    assert pid is not None
    wait_for_work(pid, 0.1)
    return thread, refused, pid


def wait_for_work(pid: int, used_s: float) -> None:
    """On a busy machine it gets little."""
    wait_for(lambda: psutil.Process(pid).cpu_times().user, lambda user_s: user_s >= used_s, 120.0, "work", 0.01)


class TestValues:
    def test_the_numbers_are_those_of_this_process(self, process: SignalProcess, short: RequestTrace) -> None:
        found, true = process.values(short, ON_DEMAND), signal_values(short, ON_DEMAND)
        assert list(ON_DEMAND) == list(found)
        for name, values in true.items():
            assert values.refused == found[name].refused == ""
            for key, places in values.by_place.items():
                np.testing.assert_array_equal(places, found[name].by_place[key])

    def test_it_comes_last(self, process: SignalProcess, short: RequestTrace) -> None:
        """Also where Linux schedules sessions; one process serves all requests until it is closed."""
        process.values(short, ["cyclic"])
        pid = process.pid
        assert pid is not None
        assert 19 == os.getpriority(os.PRIO_PROCESS, pid)
        assert pid == os.getsid(pid)
        if AUTOGROUP.exists():
            assert Path(f"/proc/{pid}/autogroup").read_text().endswith("nice 19\n")
        process.values(short, ["cyclic"])
        assert pid == process.pid
        process.close()
        assert not psutil.pid_exists(pid)


class TestItsEnd:
    def test_killed(self, process: SignalProcess, long: RequestTrace, short: RequestTrace) -> None:
        """As by the kernel when memory is short: refused with the reason, and the next request is served."""
        thread, refused, pid = busy(process, long)
        os.kill(pid, signal.SIGKILL)
        thread.join(60)
        assert 4 == len(refused)
        assert all("the process that computes it ended with status -9" in one for one in refused)
        assert "" == process.values(short, ["cyclic"])["cyclic"].refused

    def test_patience(self, long: RequestTrace) -> None:
        """What isn't done in time is refused, and its process is ended."""
        process = SignalProcess(patience_s=0.01)
        assert "was not done within 0.01 s beside the model" in process.values(long, ["cyclic"])["cyclic"].refused
        assert process.pid is None

    def test_from_another_thread(self, process: SignalProcess, long: RequestTrace) -> None:
        thread, refused, _ = busy(process, long)
        process.kill()
        thread.join(60)
        assert "ended with status -9" in refused[0]

    def test_whoever_asked_was_killed(self, tmp_path: Path, long: RequestTrace) -> None:
        """Though it is amid a computation."""
        write_trace(tmp_path, long)
        with subprocess.Popen(
            [sys.executable, "-c", _ASK, str(tmp_path), *LONG], stdout=subprocess.PIPE, text=True
        ) as asking:
            try:
                assert asking.stdout is not None
                pid = int(asking.stdout.readline())
                wait_for_work(pid, 0.5)
            finally:
                asking.kill()
            wait_for_end(pid)


_ASK = """
import sys
import threading
import time
from pathlib import Path

from glassbox.processes.exporter.signal_process import SignalProcess
from glassbox.store.trace_record import read_trace

(path,) = Path(sys.argv[1]).iterdir()
process, trace = SignalProcess(), read_trace(path)
threading.Thread(target=process.values, args=(trace, sys.argv[2:])).start()
while process.pid is None:
    time.sleep(0.01)
print(process.pid, flush=True)
time.sleep(3600)
"""
