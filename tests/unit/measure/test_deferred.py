"""Actions that wait for a device: in order, not before their event, and never in the way of who adds them."""

import logging
import threading

from glassbox.core.errors import ErrorCounter
from glassbox.measure.deferred import DeferredActions


class Event:
    """Happens when a test says so, or when it is waited for."""

    def __init__(self) -> None:
        self.happened = False
        self.waits = 0

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        self.waits += 1
        self.happened = True


def make() -> tuple[DeferredActions, ErrorCounter, list[str]]:
    errors = ErrorCounter(logging.getLogger("test.deferred"))
    return DeferredActions(errors), errors, []


def test_without_anything_to_wait_for_it_is_done_at_once() -> None:
    """As on a CPU."""
    deferred, _, done = make()
    deferred.add(lambda: done.append("a"))
    assert done == ["a"]


def test_nothing_overtakes() -> None:
    """What needs no event waits for those before it that do."""
    deferred, _, done = make()
    first, second = Event(), Event()
    deferred.add(lambda: done.append("a"), first)
    deferred.add(lambda: done.append("b"), second)
    deferred.add(lambda: done.append("c"))
    second.happened = True
    deferred.run()
    assert done == []
    first.happened = True
    deferred.run()
    assert done == ["a", "b", "c"]
    assert first.waits == second.waits == 0


def test_finish_waits() -> None:
    """For every event that has not happened."""
    deferred, _, done = make()
    event = Event()
    deferred.add(lambda: done.append("a"), event)
    deferred.finish()
    assert (done, event.waits) == (["a"], 1)


def test_a_failing_action_is_counted_and_the_next_is_run() -> None:
    """Once each."""
    deferred, errors, done = make()
    event = Event()

    def fail() -> None:
        raise RuntimeError("broken")

    deferred.add(fail, event)
    deferred.add(lambda: done.append("b"))
    event.happened = True
    deferred.run()
    deferred.run()
    assert (done, errors.counts()) == (["b"], {"deferred": 1})


def test_whoever_adds_does_not_wait_for_another_thread() -> None:
    """While the export thread waits for the device, the step thread goes on; its action is run there."""
    deferred, _, done = make()
    waiting, goes_on = threading.Event(), threading.Event()

    class Slow(Event):
        def synchronize(self) -> None:
            waiting.set()
            assert goes_on.wait(60)

    deferred.add(lambda: done.append("a"), Slow())
    thread = threading.Thread(target=deferred.finish)
    thread.start()
    assert waiting.wait(60)
    deferred.add(lambda: done.append("b"))
    assert done == []
    goes_on.set()
    thread.join(60)
    assert done == ["a", "b"]
