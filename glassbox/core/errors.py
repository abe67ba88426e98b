"""Counting what goes wrong without disturbing serving: one counter per stage, and few log lines."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class ErrorCounter:
    """Counts exceptions by stage; thread-safe.

    A stage's first error is logged, with its traceback at debug level. Where stages can recover (a collector that is
    back), so is the first one after the stage has worked again; elsewhere further ones are only counted.

    Args:
        logger: of the part whose errors these are.
        recovers: whether a stage that works counts as mended.
        counts: to go on from, e.g. those of a process that died, so that the counters never fall.
        prefix: of a stage's name in the log.
        advice: returns what to do about a stage that fails, for the log; empty if there is nothing to say.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        recovers: bool = False,
        counts: Mapping[str, int] | None = None,
        prefix: str = "",
        advice: Callable[[str], str] = lambda _: "",
    ) -> None:
        self._logger, self._recovers, self._prefix = logger, recovers, prefix
        self._advice = advice
        self._counts: Counter[str] = Counter(counts)
        self._failing: set[str] = set()
        self._lock = threading.Lock()

    def count(self, stage: str, error: BaseException | str) -> None:
        """Count one error of `stage`."""
        with self._lock:
            self._counts[stage] += 1
            first = stage not in self._failing
            self._failing.add(stage)
        if not first:
            return
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        text += f"; {advice}" if (advice := self._advice(stage)) else ""
        if self._recovers:
            self._logger.warning(
                '%s%s failed: %s (counted in glassbox_errors_total{stage="%s"}, not logged again until it works)',
                self._prefix,
                stage,
                text,
                stage,
            )
        else:
            self._logger.error(
                "%s%s failed: %s. Serving goes on; further errors of this stage are only counted "
                "(glassbox_errors_total{stage=%r}).",
                self._prefix,
                stage,
                text,
                stage,
            )
        if not isinstance(error, str):
            self._logger.debug("Traceback of the first error in %s:", stage, exc_info=error)

    def worked(self, stage: str) -> None:
        """Note that `stage`, which can recover, works."""
        with self._lock:
            again = stage in self._failing
            self._failing.discard(stage)
        if again:
            self._logger.info("%s%s works again", self._prefix, stage)

    @contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """Count and swallow any exception of the block; without one, a stage that can recover works."""
        try:
            yield
        except Exception as error:
            self.count(stage, error)
        else:
            if self._recovers:
                self.worked(stage)

    def counts(self) -> dict[str, int]:
        """Errors by stage so far."""
        with self._lock:
            return dict(self._counts)


def export_errors(
    logger: logging.Logger, counts: Mapping[str, int] | None = None, advice: Callable[[str], str] = lambda _: ""
) -> ErrorCounter:
    """Of an exporter, whose targets come and go; see ErrorCounter for the arguments."""
    return ErrorCounter(logger, recovers=True, counts=counts, prefix="glassbox export to ", advice=advice)
