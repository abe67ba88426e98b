"""Whether what is shown is alive: the age of each worker's snapshot, the exporter, and each sink's last success.

Owns these metrics. They are made when somebody asks and by the process that answers, never read from what it shows:
what stands in a file stays there when whoever writes it has stopped, or has no room to say so. They belong to a server
on its node, not to an engine, so most have no label of one.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from glassbox.config.load import GlassboxConfig
from glassbox.export.family import Family, Kind, Series, define, from_to
from glassbox.store.acts import OUTCOMES, count_key
from glassbox.store.exporter_lock import ExporterLock
from glassbox.store.exporter_status import read_status
from glassbox.store.merge import MergedEngine

# An exporter gives a sign of life every few seconds, whatever its interval.
SILENT_S: Final = 60.0


def _of_server(name: str, otel_name: str, kind: Kind, unit: str, help: str, labels: tuple[str, ...] = ()) -> Family:
    return Family(f"glassbox_{name}", f"glassbox.{otel_name}", kind, help, unit, labels)


_AGE: Final = define(
    "snapshot_age_seconds",
    "snapshot.age",
    "gauge",
    "s",
    "Seconds since the worker last wrote what it has measured; all its other metrics are as old.",
    ("rank", "host", "layers"),
)
_INTERVAL: Final = _of_server(
    "export_interval_seconds",
    "export.interval",
    "gauge",
    "s",
    "Seconds between snapshots and between exports, as export.interval_s asks.",
)
_UP: Final = _of_server(
    "exporter_up",
    "exporter.up",
    "gauge",
    "1",
    "1 if the exporter's process runs and gives signs of life, else 0; only where the configuration needs one.",
)
_SILENCE: Final = _of_server(
    "exporter_silence_seconds",
    "exporter.silence",
    "gauge",
    "s",
    "Seconds since the exporter's last sign of life, of which it gives one every few seconds.",
)
_RESTARTS: Final = _of_server(
    "exporter_restarts_total",
    "exporter.restarts",
    "counter",
    "{restart}",
    "Exporters of this server that were started because the one before had died.",
)
_LAST_SUCCESS: Final = _of_server(
    "sink_last_success_timestamp_seconds",
    "sink.last_success_timestamp",
    "gauge",
    "s",
    "Unix time at which a sink of the exporter last did all that was asked; 0 if it hasn't yet.",
    ("sink",),
)
_FAILURES: Final = _of_server(
    "sink_failures_total",
    "sink.failures",
    "counter",
    "{error}",
    "Failures of a sink of the exporter, one that hangs included.",
    ("sink",),
)
_ACTIONS: Final = _of_server(
    "actions_total",
    "actions",
    "counter",
    "{action}",
    "What rules of `actions` did about traced requests, or would have done, by outcome.",
    ("rule", "action", "outcome"),
)
LIVENESS_METRICS: Final = (_AGE, _INTERVAL, _UP, _SILENCE, _RESTARTS, _LAST_SUCCESS, _FAILURES, _ACTIONS)


@dataclass(frozen=True)
class Life:
    """Of what the metrics are made.

    Attributes:
        engines: as last read, of whatever age.
        interval_s: of the configuration.
        needs_exporter: whether the configuration asks for what only an exporter does.
        rules: in force: names and what they do.
    """

    engines: Sequence[MergedEngine]
    interval_s: float
    needs_exporter: bool
    rules: Sequence[tuple[str, tuple[str, ...]]] = ()


def liveness_families(life: Life, run_dir: Path, now_s: float) -> list[Family]:
    """The metrics of this moment that have a series.

    Args:
        run_dir: of the server.
        now_s: Unix time.
    """
    began_s = min((engine.start_time_s for engine in life.engines), default=now_s)
    ages = [
        Series(
            (engine.model_name, engine.engine, str(one.rank), one.host, from_to(one.layers)),
            max(0.0, now_s - one.time_s),
            began_s,
        )
        for engine in life.engines
        for one in engine.workers
    ]
    series = {_AGE.name: ages, _INTERVAL.name: [Series((), life.interval_s, began_s)]}
    if life.needs_exporter:
        beat_s, status = ExporterLock.last_beat_s(run_dir), read_status(run_dir)
        silence_s = None if beat_s is None else max(0.0, now_s - beat_s)
        is_up = silence_s is not None and silence_s < SILENT_S and ExporterLock.is_held(run_dir)
        series[_UP.name] = [Series((), int(is_up), began_s)]
        series[_SILENCE.name] = [] if silence_s is None else [Series((), silence_s, began_s)]
        if status is not None:
            series[_RESTARTS.name] = [Series((), status.restarts, began_s)]
            for sink, last_success_s in sorted(status.sinks.items()):
                series.setdefault(_LAST_SUCCESS.name, []).append(Series((sink,), last_success_s, began_s))
                failures = status.errors.get(sink, 0)
                series.setdefault(_FAILURES.name, []).append(Series((sink,), failures, began_s))
        # Of the rules in force from the start, so that a rate sees the first one.
        known = [(rule, action, outcome) for rule, do in life.rules for action in do for outcome in OUTCOMES]
        counts = {} if status is None else dict(status.actions)
        found = {count_key(*labels): counts.pop(count_key(*labels), 0) for labels in known} | counts
        labelled = [(tuple(key.split("|")), count) for key, count in sorted(found.items())]
        series[_ACTIONS.name] = [Series(labels, count, began_s) for labels, count in labelled if len(labels) == 3]
    return [replace(one, series=tuple(of_one)) for one in LIVENESS_METRICS if (of_one := series.get(one.name))]


class Liveness:
    """The metrics of a server's run directory, for a process that shows them.

    Args:
        run_dir: of the server; it need not exist yet.
        config: returns the configuration of the moment.
        engines: returns what the workers have measured.
        needs_exporter: whether a configuration asks for what only an exporter does; so does the exporter's own process.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Callable[[], GlassboxConfig],
        engines: Callable[[], Sequence[MergedEngine]],
        needs_exporter: Callable[[GlassboxConfig], bool] = lambda _: True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._run_dir, self._config, self._engines = Path(run_dir), config, engines
        self._needs_exporter, self._clock = needs_exporter, clock
        self._last: Sequence[MergedEngine] = ()

    def families(self) -> list[Family]:
        """Those of this moment; where the run directory can't be read, the ages of what was read last."""
        config = self._config()
        with contextlib.suppress(OSError):  # counted by whoever shows the rest of the page; the ages grow
            self._last = self._engines()
        rules = [(rule.name, rule.do) for rule in config.actions.rules] if config.enabled else []
        life = Life(self._last, config.export.interval_s, self._needs_exporter(config), rules)
        return liveness_families(life, self._run_dir, self._clock())
