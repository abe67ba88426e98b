"""Tells API servers which requests the worker did not trace, so that their answers don't wait for that.

Owns how often it is told: however many are refused, a file a few times a second.
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from glassbox.processes.worker.traces.active import TraceHost
from glassbox.store.trace_refusals import MAX_REFUSALS, Refusal, write_refusals

# Between two files: one of 256 refusals takes half a millisecond.
PAUSE_S: Final = 0.1


class RefusalNotes:
    """The newest refusals of one worker.

    Args:
        run_dir: of the server.
        host: the worker.
        clock: seconds, monotonic.
    """

    def __init__(self, run_dir: Path, host: TraceHost, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir, self._host, self._clock = Path(run_dir), host, clock
        self._refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self._due_s = clock()
        # How many there were, and of these how many the file had.
        self._added = self._written = 0

    def add(self, refusal: Refusal) -> None:
        """A refused request is gone whose answer waits; called by the step thread."""
        self._refusals.append(refusal)
        self._added += 1

    @property
    def wait(self) -> bool:
        """Whether some are still to be told."""
        return self._added != self._written

    def write(self) -> None:
        """Tell what came since, unless it was just told; called by the export thread.

        Raises:
            OSError: it can't be written; it is tried again.
        """
        if not self.wait or self._clock() < self._due_s:
            return
        self._due_s = self._clock() + PAUSE_S
        added, host = self._added, self._host
        write_refusals(self._run_dir, host.engine, host.rank, host.instance, list(self._refusals))
        self._written = added
