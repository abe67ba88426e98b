"""Actions that wait for a device without making anybody else wait: in order, each once the device has got that far.

Numbers of traced rows come from a GPU some milliseconds after the step; what follows from them, and the end of a trace
that was queued behind them, must neither overtake them nor hold up the next step. On a CPU nothing is ever waited for.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from glassbox.core.errors import ErrorCounter


class Awaited(Protocol):
    """What an action waits for, e.g. a torch.cuda.Event."""

    def query(self) -> bool:
        """Whether it has happened."""

    def synchronize(self) -> None:
        """Wait for it."""


class DeferredActions:
    """A queue of actions.

    Args:
        errors: counts actions that fail, as stage `deferred`; the next ones are run all the same.
    """

    def __init__(self, errors: ErrorCounter) -> None:
        self._errors = errors
        self._waiting: deque[tuple[Awaited | None, Callable[[], None]]] = deque()
        # Held while actions run: two threads must not change their order.
        self._lock = threading.Lock()

    def add(self, action: Callable[[], None], awaited: Awaited | None = None) -> None:
        """Run an action after all that were added before, and after `awaited` has happened; at once if it can be."""
        self._waiting.append((awaited, action))
        self.run()

    def run(self) -> None:
        """Run what can be run; returns at once if another thread is doing it."""
        if self._waiting and self._lock.acquire(blocking=False):
            try:
                self._drain(wait=False)
            finally:
                self._lock.release()

    def finish(self) -> None:
        """Wait for everything that was added; for threads that may."""
        with self._lock:
            self._drain(wait=True)

    def _drain(self, wait: bool) -> None:
        while self._waiting:
            awaited, action = self._waiting[0]
            try:
                if awaited is not None and not awaited.query():
                    if not wait:
                        return
                    awaited.synchronize()
                action()
            except Exception as error:
                self._errors.count("deferred", error)
            self._waiting.popleft()
