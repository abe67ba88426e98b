"""What glassbox has in this process, for tests that run vLLM in it."""

from glassbox.adapter.seat import SEAT
from glassbox.processes.worker.hook import StepHook
from glassbox.processes.worker.observer import Observer


def attached_hook() -> StepHook:
    """The hook of this process, in which an observed layer has been built."""
    found = SEAT.hook
    assert isinstance(found, StepHook), "no hook: the plugin did not attach"
    return found


def running_observer() -> Observer:
    """The observer of this process's worker."""
    worker = attached_hook().worker
    assert worker is not None, "no observer: the plugin did not attach"
    return worker.observer
