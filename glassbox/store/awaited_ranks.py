"""Whether a request still lacks the part of a rank: each worker writes its own when its own interval is over.

Owns that rule, for everybody who reads traces, and how long a part is waited for. Of a request that a rank has refused
it never comes, and a worker that has died writes nothing any more.
"""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from glassbox.store.snapshot import EngineWorker, EngineWorkers

# Beyond the interval after which a worker writes: what an ended request's numbers need may take it seconds.
WAIT_FOR_RANKS_S: Final = 30.0
# `export.interval_s` is an hour at most.
_LONGEST_S: Final = WAIT_FOR_RANKS_S + 3600.0


def missing_ranks(
    workers: Sequence[EngineWorker], chosen: Collection[int] | None, instances: Collection[str]
) -> list[EngineWorker]:
    """The workers that trace a request and have written nothing of it.

    Args:
        workers: of its engine, that live.
        chosen: layers that it asked for, None is all.
        instances: of the workers that have written it.
    """
    tracing = [worker for worker in workers if worker.traces(chosen)]
    missing = [worker for worker in tracing if worker.instance not in instances]
    # Of workers that were there before a restart nobody knows how many there were.
    return missing if len(missing) < len(tracing) else []


class AwaitedRanks:
    """The workers of a run directory whose parts are waited for.

    Args:
        run_dir: of the server.
        clock: Unix time in seconds.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float]) -> None:
        self._workers, self._clock = EngineWorkers(run_dir), clock

    def now(self) -> "RanksNow":
        """What is known of them at this moment, for any number of requests."""
        return RanksNow(self._workers, self._clock())


class RanksNow:
    """As AwaitedRanks, at one moment: an engine's workers are looked up once, and not if all requests ended long ago.

    Args:
        workers: of the run directory.
        now_s: Unix time in seconds.
    """

    def __init__(self, workers: EngineWorkers, now_s: float) -> None:
        self._workers, self._now_s = workers, now_s
        self._engines: dict[str, list[EngineWorker]] = {}

    def awaited(
        self, engine: str, end_time_s: float | None, chosen: Collection[int] | None, instances: Collection[str]
    ) -> int:
        """How many ranks have written nothing of a request, and may still do so.

        Args:
            engine: its label.
            end_time_s: Unix time, of the newest part; None: it runs.
            chosen, instances: as for `missing_ranks`.

        Raises:
            OSError: the run directory can't be listed.
        """
        age_s = -math.inf if end_time_s is None else self._now_s - end_time_s
        if age_s >= _LONGEST_S:
            return 0
        if engine not in self._engines:
            self._engines[engine] = self._workers.of(engine, at_least=2)
        workers = self._engines[engine]
        if len(workers) < 2:
            return 0
        missing = missing_ranks(workers, chosen, instances)
        return sum(age_s < worker.interval_s + WAIT_FOR_RANKS_S for worker in missing)
