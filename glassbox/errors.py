"""Counting what goes wrong without disturbing serving: one counter per stage, one log line per stage."""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class ErrorCounter:
    """Counts exceptions by stage and logs the first of each stage; thread-safe."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, stage: str, error: BaseException | None = None) -> None:
        """Count one error of `stage`; the first is logged, with its traceback at debug level."""
        with self._lock:
            self._counts[stage] += 1
            first = self._counts[stage] == 1
        if first:
            self._logger.error(
                "%s failed: %s: %s. Serving goes on; further errors of this stage are only counted "
                "(glassbox_errors_total{stage=%r}).",
                stage,
                type(error).__name__,
                error,
                stage,
            )
            self._logger.debug("Traceback of the first error in %s:", stage, exc_info=error)

    @contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """Swallow and count any exception of the block."""
        try:
            yield
        except Exception as error:
            self.count(stage, error)

    def counts(self) -> dict[str, int]:
        """Errors by stage so far."""
        with self._lock:
            return dict(self._counts)
