"""How the requests of a server were scored, in numbers that only grow: a file of the run directory.

Owns the counts and their file. The exporter counts (`processes/exporter/scorer.py`); whoever shows metrics reads.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from glassbox.core.files import FileVersion, file_version
from glassbox.core.signal_table import SIGNAL_NAMES
from glassbox.store.trusted_file import read_json, write_file

TOTALS_NAME: Final = "score-totals.json"
# Upper bounds of the histogram's buckets, +Inf not among them.
SCORE_BOUNDS: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# What came of a request: values of the label `outcome`.
PROBE_OUTCOMES: Final = ("above", "below", "no_value", "failed")
SIGNAL_OUTCOMES: Final = ("computed", "refused")
# Probes that an edit took away keep their numbers, the newest so many.
MAX_NAMES: Final = 64
MAX_ENGINES: Final = 256
_MAX_BYTES: Final = 1 << 24

EngineKey = tuple[str, str]


@dataclass
class ProbeTotals:
    """Of one probe.

    Attributes:
        buckets: scores by bucket, the last one +Inf. total: their sum.
        outcomes: requests by outcome.
        missing: features that had no value, over all requests.
    """

    buckets: list[int] = field(default_factory=lambda: [0] * (len(SCORE_BOUNDS) + 1))
    total: float = 0.0
    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PROBE_OUTCOMES, 0))
    missing: int = 0

    def add(self, score: float) -> None:
        """Count a score, 0 to 1."""
        self.buckets[bisect_left(SCORE_BOUNDS, score)] += 1
        self.total += score


@dataclass
class EngineTotals:
    """Of one engine: probes by name, outcomes by signal, and the seconds that it took."""

    probes: dict[str, ProbeTotals] = field(default_factory=dict)
    signals: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0

    def probe(self, name: str) -> ProbeTotals:
        """Its totals, made if there are none."""
        if name not in self.probes:
            while len(self.probes) >= MAX_NAMES:
                del self.probes[next(iter(self.probes))]
            self.probes[name] = ProbeTotals()
        return self.probes[name]

    def signal(self, name: str) -> dict[str, int]:
        """Its outcomes, made if there are none."""
        return self.signals.setdefault(name, dict.fromkeys(SIGNAL_OUTCOMES, 0))


@dataclass(eq=False)
class ScoreTotals:
    """Of a server.

    Attributes:
        start_time_s: Unix time since when it is counted.
        names: of the probes in force, which have series from the start.
        engines: by model name and engine.
    """

    start_time_s: float
    names: tuple[str, ...] = ()
    engines: dict[EngineKey, EngineTotals] = field(default_factory=dict)

    def engine(self, key: EngineKey) -> EngineTotals:
        """Its totals, made if there are none."""
        if key not in self.engines:
            while len(self.engines) >= MAX_ENGINES:
                del self.engines[next(iter(self.engines))]
            self.engines[key] = EngineTotals()
        return self.engines[key]


def write_totals(run_dir: Path, totals: ScoreTotals) -> None:
    """Write the file.

    Raises:
        OSError: it can't be written.
    """
    engines = [
        {
            "model_name": model_name,
            "engine": engine,
            "probes": {name: vars(probe) for name, probe in one.probes.items()},
            "signals": one.signals,
            "seconds": one.seconds,
        }
        for (model_name, engine), one in totals.engines.items()
    ]
    content = {"start_time_s": totals.start_time_s, "names": totals.names, "engines": engines}
    write_file(Path(run_dir) / TOTALS_NAME, json.dumps(content, allow_nan=False).encode())


def read_totals(run_dir: Path) -> ScoreTotals | None:
    """The file's content, or None if there is none that can be read."""
    try:
        content = read_json(Path(run_dir) / TOTALS_NAME, _MAX_BYTES)
        totals = ScoreTotals(float(content["start_time_s"]), tuple(map(str, content["names"])))
        for one in content["engines"][:MAX_ENGINES]:
            totals.engines[str(one["model_name"]), str(one["engine"])] = _engine(one)
        return totals
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError):
        return None


class TotalsFile:
    """The file of a run directory, read again only when it was replaced."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._version: FileVersion | None = None
        self._totals: ScoreTotals | None = None

    def current(self) -> ScoreTotals | None:
        """What it says; the same object as long as nothing changed."""
        version = file_version(self._run_dir / TOTALS_NAME)
        if version != self._version:
            self._version, self._totals = version, read_totals(self._run_dir)
        return self._totals


def _engine(content: dict[str, Any]) -> EngineTotals:
    probes = {str(name): _probe(one) for name, one in content["probes"].items()}
    signals = {
        name: _outcomes(SIGNAL_OUTCOMES, one) for name, one in content["signals"].items() if name in SIGNAL_NAMES
    }
    return EngineTotals(probes, signals, float(content["seconds"]))


def _probe(content: dict[str, Any]) -> ProbeTotals:
    buckets = [int(count) for count in content["buckets"]]
    if len(buckets) != len(SCORE_BOUNDS) + 1:
        raise ValueError("buckets of another version")
    return ProbeTotals(
        buckets, float(content["total"]), _outcomes(PROBE_OUTCOMES, content["outcomes"]), int(content["missing"])
    )


def _outcomes(known: Iterable[str], content: dict[str, Any]) -> dict[str, int]:
    return {outcome: int(content.get(outcome, 0)) for outcome in known}
