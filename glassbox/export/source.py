"""The families of a server as they are now: run directory and configuration in, families out.

Owns the caching: snapshots and configuration are looked at with `stat` and read again only if they changed,
so a scrape between two snapshots costs microseconds. It starts no thread; it may be called from several.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glassbox.config import ConfigError, GlassboxConfig, load_config
from glassbox.export.drift_watch import DriftWatch
from glassbox.export.families import Family, build_families, effective_detail
from glassbox.export.merge import Detail, MergedEngine, merge
from glassbox.export.snapshot import FileVersion, SnapshotReader, write_atomically
from glassbox.logs import get_logger

logger = get_logger(__name__)

STATUS_NAME: Final = "exporter.json"


@dataclass(frozen=True, eq=False)
class Merged:
    """All that the workers of a server have measured up to one moment.

    Attributes:
        versions: of the snapshot files it was made of, by name.
        engines: merged snapshots.
    """

    versions: Mapping[str, FileVersion]
    engines: tuple[MergedEngine, ...]


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


class ConfigFile:
    """The configuration file, read again when it changed: for processes that may not run a watcher thread.

    An edit that makes the file invalid keeps the last good configuration (the workers report it).

    Args:
        path: of the YAML file.
        config: what the caller loaded from it already; else it is loaded now.
        on_change: called, by whoever asks for the configuration, after a good edit was read.

    Raises:
        ConfigError: if there is no `config` and the file is bad.
    """

    def __init__(
        self,
        path: Path,
        config: GlassboxConfig | None = None,
        on_change: Callable[[GlassboxConfig], None] = lambda _: None,
    ) -> None:
        self._path = Path(path)
        self._on_change = on_change
        # What the caller loaded may be older than the file is now: the first call reads it.
        self._version = self._stat() if config is None else None
        self._config = load_config(self._path) if config is None else config

    def _stat(self) -> FileVersion | None:
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return (stat.st_ino, stat.st_mtime_ns, stat.st_size)

    def __call__(self) -> GlassboxConfig:
        """The configuration of this moment."""
        version = self._stat()
        if version is not None and version != self._version:
            self._version = version
            try:
                self._config = load_config(self._path)
            except ConfigError as error:
                logger.debug("glassbox keeps the last good configuration: %s", error)
            else:
                self._on_change(self._config)
        return self._config


@dataclass(frozen=True)
class ExporterStatus:
    """What the exporter process says about itself.

    Attributes:
        pid: of the exporter.
        time_s: Unix time of its last round.
        errors: by stage, of this and earlier exporters of the server.
    """

    pid: int
    time_s: float
    errors: Mapping[str, int]


def write_status(run_dir: Path, status: ExporterStatus) -> None:
    """Write the status file.

    Raises:
        OSError: if it cannot be written.
    """
    text = json.dumps({"pid": status.pid, "time_s": status.time_s, "errors": dict(status.errors)})
    write_atomically(Path(run_dir) / STATUS_NAME, text.encode())


def read_status(run_dir: Path) -> ExporterStatus | None:
    """The status file, or None if there is none that can be read."""
    try:
        content = json.loads((Path(run_dir) / STATUS_NAME).read_bytes())
        errors = {str(stage): int(count) for stage, count in content["errors"].items()}
        return ExporterStatus(int(content["pid"]), float(content["time_s"]), errors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class FamilySource:
    """The current families of the server whose workers write to one run directory.

    Args:
        run_dir: where the snapshot files are; it need not exist yet.
        config: returns the configuration of the moment, e.g. a `ConfigFile`.
        clock: Unix time in seconds.
    """

    def __init__(
        self, run_dir: Path, config: Callable[[], GlassboxConfig], clock: Callable[[], float] = time.time
    ) -> None:
        self._run_dir = Path(run_dir)
        self._config = config
        self._reader = SnapshotReader(self._run_dir)
        self._lock = threading.Lock()
        self._errors: dict[str, int] = {}
        self._merged: Merged | None = None
        self._clock = clock
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
        if self._merged is None or self._merged.versions != versions:
            self._merged = Merged(versions, tuple(merge(self._reader.read(versions))))
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
            versions = self._reader.versions()
            status = read_status(self._run_dir)
            prometheus = config.export.prometheus
            exporter_errors = dict(status.errors) if status else {}
            baseline, now = self._drift.reload(config.baseline), self._clock()
            key: object = (
                (versions, prometheus.detail, prometheus.max_series),
                (exporter_errors, dict(self._errors)),
                (baseline, config.statistics),
            )
            if self._view is not None and self._view.key == key and now <= self._drift.expires_s:
                return self._view
            engines = self._merge(versions).engines
            detail, warning = effective_detail(
                prometheus.detail, prometheus.max_series, engines, with_drift=self._drift.active
            )
            if warning is not None and warning != self._warning:
                logger.warning("%s", warning)
            self._warning = warning
            drift = self._drift.compare(engines, config, now)
            errors = _add(exporter_errors, self._errors)
            if self._reader.unreadable:
                errors = _add(errors, {"snapshot": self._reader.unreadable})
            self._view = View(key, engines, detail, tuple(build_families(engines, detail, errors, drift)))
            return self._view


def _add(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {stage: first.get(stage, 0) + second.get(stage, 0) for stage in {*first, *second}}
