"""Errors of the exporter: counted by stage, logged once until the stage works again."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from glassbox.logs import get_logger

logger = get_logger(__name__)


class Faults:
    """Counts by stage; thread-safe. A missing collector is one line in the log, not one per interval.

    Args:
        counts: to go on from, e.g. those of an exporter that died, so that the counters never fall.
    """

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self._counts = dict(counts or {})
        self._failing: set[str] = set()
        self._lock = threading.Lock()

    def failed(self, stage: str, error: BaseException | str) -> None:
        """Count an error of `stage`; it is logged if the stage worked before."""
        with self._lock:
            self._counts[stage] = self._counts.get(stage, 0) + 1
            first = stage not in self._failing
            self._failing.add(stage)
        if first:
            text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
            logger.warning(
                'glassbox export to %s failed: %s (counted in glassbox_errors_total{stage="%s"}, '
                "not logged again until it works)",
                stage,
                text,
                stage,
            )

    def worked(self, stage: str) -> None:
        """Note that `stage` works."""
        with self._lock:
            again = stage in self._failing
            self._failing.discard(stage)
        if again:
            logger.info("glassbox export to %s works again", stage)

    @contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """Count and swallow any exception of the block; without one, the stage works."""
        try:
            yield
        except Exception as error:
            self.failed(stage, error)
        else:
            self.worked(stage)

    def counts(self) -> dict[str, int]:
        """Errors by stage so far."""
        with self._lock:
            return dict(self._counts)
