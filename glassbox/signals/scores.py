"""The scores of one traced request: what probes and signals say of it, and that in a few numbers.

Owns scoring a trace with several probes and signals at once, each signal computed once, and the bounded summary that a
response, a record, a span and a page carry. What a probe is is `probe.py`'s, what a signal is `registry.py`'s.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from glassbox.core.signal_table import is_on_demand
from glassbox.signals.probe import Probe, ProbeScore
from glassbox.signals.registry import signal_values
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace

# No further signal is begun after so many seconds; each has bounds of its own.
BUDGET_S: Final = 20.0
# Of a summary: names of missing features that are told, values of a signal, characters of a text.
MAX_MISSING: Final = 8
MAX_VALUES: Final = 32
MAX_TEXT: Final = 300
_DIGITS: Final = 6


@dataclass(frozen=True)
class Scores:
    """What is said of one request.

    Attributes:
        probes: scores by the probes' names, of those that gave one.
        signals: values by the signals' names, of all that were asked for.
        unscored: probes without a score: why, in words.
        failed: which of these have no score because of an error.
        places: layers and heads of the trace, as in its arrays.
    """

    probes: Mapping[str, ProbeScore] = field(default_factory=dict)
    signals: Mapping[str, SignalValues] = field(default_factory=dict)
    unscored: Mapping[str, str] = field(default_factory=dict)
    failed: frozenset[str] = frozenset()
    places: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def flagged(self) -> tuple[str, ...]:
        """The probes whose score has reached their threshold."""
        return tuple(name for name, score in self.probes.items() if score.above)

    def summary(self) -> dict[str, Any]:
        """For JSON, of bounded size: null is "no value".

        Returns:
            `probes`: by name `score`, `label`, `threshold`, `above`, `missing` (how many features had no value) and
            the first of their `missing_features`; without a score `score` is null, and `reason` says why.
            `signals`: by name `values`, of each value its number if it is one of the request, else the mean, least and
            largest over layers and heads (of one with a number for each token over these, too) and where the largest
            is; and `refused`, why values are missing, if they are.
        """
        return {
            "probes": {
                **{name: _probe_summary(score) for name, score in self.probes.items()},
                **{name: {"score": None, "reason": _cut(reason)} for name, reason in self.unscored.items()},
            },
            "signals": {name: self._signal_summary(values) for name, values in self.signals.items()},
        }

    def _signal_summary(self, values: SignalValues) -> dict[str, Any]:
        found: dict[str, Any] = {name: _number(value) for name, value in values.of_request.items()}
        for name, places in (*values.by_place.items(), *values.by_token.items()):
            found.setdefault(name, self._spread(places))
        shown: dict[str, Any] = {"values": dict(list(found.items())[:MAX_VALUES])}
        return shown | ({"refused": _cut(values.refused)} if values.refused else {})

    def _spread(self, numbers: np.ndarray[Any, Any]) -> dict[str, Any] | None:
        known = np.isfinite(numbers)
        if not known.any():
            return None
        largest = np.unravel_index(np.where(known, numbers, -np.inf).argmax(), numbers.shape)
        layers, heads = self.places
        return {
            "mean": _number(float(numbers[known].mean(dtype=np.float64))),
            "min": _number(float(numbers[known].min())),
            "max": _number(float(numbers[known].max())),
            "max_at": [layers[largest[-2]], heads[largest[-1]]],
        }


def scores_of(
    trace: RequestTrace,
    probes: Sequence[Probe],
    signals: Sequence[str] = (),
    *,
    focus_heads: Collection[tuple[int, int]] | None = None,
    known: Mapping[str, SignalValues] = MappingProxyType({}),
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> Scores:
    """Score a traced request; of a running one what there is so far. Never raises: what fails is said.

    Args:
        trace: of the request.
        probes: with different names.
        signals: names of core/signal_table.py that are asked for beside what the probes read.
        focus_heads: (layer, head) of the signal `focus`; None is all.
        known: signals that are there already, by name.
        budget_s: after so many seconds no further signal is begun; those on demand come last.
    """
    missing = [name for name in wanted(probes, signals) if name not in known]
    found = {**known, **signals_within(trace, missing, focus_heads, budget_s=budget_s, clock=clock)}
    # Probes were trained on the focus of all heads.
    computed = {name: one for name, one in found.items() if name != "focus" or focus_heads is None}
    scored: dict[str, ProbeScore] = {}
    unscored: dict[str, str] = {}
    failed = set()
    for probe in probes:
        try:
            score = probe.score(trace, computed)
        except Exception as error:  # a file's numbers and a trace's: neither may take the others' scores away
            failed.add(probe.name)
            unscored[probe.name] = f"{type(error).__name__}: {error}"
            continue
        if score is None:
            unscored[probe.name] = _nothing(probe, found)
        else:
            scored[probe.name] = score
    asked = {name: found[name] for name in dict.fromkeys(signals)}
    return Scores(scored, asked, unscored, frozenset(failed), (trace.layers, trace.heads))


def wanted(probes: Sequence[Probe], signals: Sequence[str]) -> tuple[str, ...]:
    """Names of all signals that `scores_of` needs: those that are asked for, and what probes read."""
    return tuple(dict.fromkeys([*signals, *(name for probe in probes for name in probe.needs.signals)]))


def signals_within(
    trace: RequestTrace,
    names: Iterable[str],
    focus_heads: Collection[tuple[int, int]] | None = None,
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, SignalValues]:
    """Signals by name, as `signal_values`, of which none is begun after so many seconds."""
    end_s = clock() + budget_s
    found: dict[str, SignalValues] = {}
    for name in sorted(names, key=is_on_demand):
        if clock() > end_s:
            found[name] = SignalValues(
                refused="scoring this request took too long before this one's turn; ask for fewer signals, layers or "
                "heads"
            )
        else:
            found |= signal_values(trace, [name], focus_heads)
    return found


def _nothing(probe: Probe, signals: Mapping[str, SignalValues]) -> str:
    """Why a probe has no score although nothing failed."""
    refused = [f"{name}: {signals[name].refused}" for name in probe.needs.signals if signals[name].refused]
    return "the request has no value of any of its features" + (f" ({refused[0]})" if refused else "")


def _probe_summary(score: ProbeScore) -> dict[str, Any]:
    shown = {
        "score": _number(score.value),
        "label": score.label,
        "threshold": _number(score.threshold),
        "above": score.above,
        "missing": len(score.missing),
    }
    return shown | ({"missing_features": list(score.missing[:MAX_MISSING])} if score.missing else {})


def _number(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
