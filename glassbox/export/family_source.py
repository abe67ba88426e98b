"""The families of a server as they are now: run directory and configuration in, families out.

Owns the caching: snapshots and configuration are looked at with `stat` and read again only if they changed,
so a scrape between two snapshots costs microseconds. It starts no thread; it may be called from several.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glassbox.config.load import GlassboxConfig
from glassbox.core.files import FileVersion
from glassbox.core.logs import get_logger
from glassbox.export.families import build_families, effective_detail
from glassbox.export.family import Family
from glassbox.signals.drift_watch import DriftWatch
from glassbox.store.exporter_status import read_status
from glassbox.store.merge import Detail, MergedEngine, merge
from glassbox.store.score_totals import TotalsFile
from glassbox.store.snapshot import SnapshotReader

logger = get_logger(__name__)


@dataclass(frozen=True, eq=False)
class Merged:
    """All that the workers of a server have measured up to one moment.

    Attributes:
        versions: of the snapshot files it was made of, by name.
        shown: labels of the engines that were asked for; None is all.
        engines: merged snapshots of these.
        has_first: whether the first engine of the directory is among these: who shows that shows the exporter's errors.
    """

    versions: Mapping[str, FileVersion]
    shown: frozenset[str] | None
    engines: tuple[MergedEngine, ...]
    has_first: bool


@dataclass(frozen=True, eq=False)
class View:
    """What a server looks like at one moment.

    Attributes:
        key: changes whenever anything else here does.
        engines: merged snapshots.
        detail: the effective one.
        families: all of them, at that detail.
    """

    key: object
    engines: tuple[MergedEngine, ...]
    detail: Detail
    families: tuple[Family, ...]


class FamilySource:
    """The current families of the server whose workers write to one run directory.

    Args:
        run_dir: where the snapshot files are; it need not exist yet.
        config: returns the configuration of the moment, e.g. a `ConfigFile`.
        clock: Unix time in seconds.
        engines: returns the labels of the engines that are shown; None is all of the run directory.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Callable[[], GlassboxConfig],
        clock: Callable[[], float] = time.time,
        engines: Callable[[], frozenset[str] | None] = lambda: None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._config = config
        self._shown = engines
        self._reader = SnapshotReader(self._run_dir, clock=clock)
        self._lock = threading.Lock()
        self._errors: dict[str, int] = {}
        self._merged: Merged | None = None
        self._clock = clock
        self._totals = TotalsFile(self._run_dir)
        self._drift = DriftWatch(self._on_drift_error)
        self._view: View | None = None
        self._warning: str | None = None

    @property
    def config(self) -> GlassboxConfig:
        """The configuration of the moment."""
        return self._config()

    @property
    def run_dir(self) -> Path:
        """Where the snapshot files are."""
        return self._run_dir

    def count_error(self, stage: str) -> None:
        """Count an error of the reading side; it appears in glassbox_errors_total of the next view."""
        with self._lock:
            self._errors[stage] = self._errors.get(stage, 0) + 1

    def versions(self) -> dict[str, FileVersion]:
        """Versions of the snapshot files of the moment: what tells whether `merged()` would change; reads no file.

        Raises:
            OSError: if the run directory may not be read.
        """
        return self._reader.versions()

    def merged(self) -> Merged:
        """What was measured up to this moment, without the families; the same object as long as no file changed.

        Raises:
            OSError: if the run directory may not be read.
        """
        with self._lock:
            return self._merge(self._reader.versions())

    def _merge(self, versions: dict[str, FileVersion]) -> Merged:
        shown = self._shown()
        if self._merged is None or (self._merged.versions, self._merged.shown) != (versions, shown):
            every = tuple(merge(self._reader.read(versions)))
            engines = tuple(engine for engine in every if shown is None or engine.engine in shown)
            self._merged = Merged(versions, shown, engines, has_first=every[:1] == engines[:1])
        return self._merged

    def _on_drift_error(self, message: str) -> None:
        # Within view(), which holds the lock.
        self._errors["baseline"] = self._errors.get("baseline", 0) + 1
        logger.error(
            '%s (counted in glassbox_errors_total{stage="baseline"}; serving and the other metrics go on)', message
        )

    def view(self) -> View:
        """The state of the moment; the same object as long as nothing changed.

        Raises:
            OSError: if the run directory may not be read.
        """
        with self._lock:
            config = self._config()
            merged = self._merge(self._reader.versions())
            status = read_status(self._run_dir)
            prometheus = config.export.prometheus
            exporter_errors = dict(status.errors) if status and merged.has_first else {}
            scores = self._totals.current()
            baseline, now = self._drift.reload(config.baseline), self._clock()
            key: object = (
                (merged, prometheus.detail, prometheus.max_series),
                (exporter_errors, dict(self._errors)),
                (baseline, config.statistics),
                scores,
            )
            if self._view is not None and self._view.key == key and now <= self._drift.expires_s:
                return self._view
            engines = merged.engines
            detail, warning = effective_detail(
                prometheus.detail, prometheus.max_series, engines, with_drift=self._drift.active, scores=scores
            )
            if warning is not None and warning != self._warning:
                logger.warning("%s", warning)
            self._warning = warning
            drift = self._drift.compare(engines, config, now)
            errors = _add(exporter_errors, self._errors)
            if self._reader.unreadable:
                errors = _add(errors, {"snapshot": self._reader.unreadable})
            self._view = View(key, engines, detail, tuple(build_families(engines, detail, errors, drift, scores)))
            return self._view


def _add(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {stage: first.get(stage, 0) + second.get(stage, 0) for stage in {*first, *second}}
