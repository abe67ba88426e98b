"""Rules on numbers of requests: which of them applies now, once for each request, and not too often.

Owns the decision. Where the numbers come from is `scores.py`'s, what is done about a rule that applies the exporter's
(`processes/exporter/acting.py`). It keeps a little of each request that is looked at, until it is told to forget it.
"""

import math
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from glassbox.config.model import RuleConfig
from glassbox.signals.scores import Scores

# What may come at once after a quiet time.
_BURST_S: Final = 10.0
# A trace that is being replaced may be missing from a list of its folder for a moment.
FORGET_S: Final = 120.0


@dataclass(frozen=True)
class Match:
    """A rule applies to a request.

    Attributes:
        rule: the rule.
        value: the number that it found.
        limited: it has applied to too many: nothing is to be done.
    """

    rule: RuleConfig
    value: float
    limited: bool


class RateLimit:
    """How often something may happen: so many times a minute, and what ten seconds would allow at once.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: float | None = None
        self._looked_s = clock()

    def take(self, per_minute: int) -> bool:
        """Whether it may happen now; if so, it counts as having happened."""
        now_s, most = self._clock(), max(1.0, per_minute * _BURST_S / 60)
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        left = most if self._left is None else self._left + passed_s * per_minute / 60
        self._left = min(left, most)
        if self._left < 1:
            return False
        self._left -= 1
        return True


class RuleBook:
    """Which rules have applied to which requests.

    Args:
        clock: seconds, monotonic, of the rate limits.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._limits: dict[str, RateLimit] = {}
        self._applied: dict[Hashable, set[RuleConfig]] = {}
        # When each of these requests was there last.
        self._seen_s: dict[Hashable, float] = {}

    def judge(
        self,
        rules: Sequence[RuleConfig],
        request: Hashable,
        values: Mapping[str, float],
        num_generated: int,
        *,
        ended: bool,
    ) -> list[Match]:
        """The rules that apply now and have not before.

        Args:
            rules: in force.
            request: what tells it from others.
            values: of each rule, by its name; one that isn't there has no value, as NaN.
            num_generated: tokens so far.
            ended: whether the request is over; rules that don't watch running ones wait for that.
        """
        applied = self._applied.get(request, set())
        found = []
        for rule in rules:
            value = values.get(rule.name, math.nan)
            if rule in applied or not (ended or rule.watches_running) or num_generated < rule.min_generated:
                continue
            if rule.applies(value):
                applied = self._applied.setdefault(request, applied)
                self._seen_s[request] = self._clock()
                applied.add(rule)
                limit = self._limits.setdefault(rule.name, RateLimit(self._clock))
                found.append(Match(rule, value, limited=not limit.take(rule.per_minute)))
        return found

    def keep(self, requests: Collection[Hashable], rules: Collection[str]) -> None:
        """Forget requests that are not among these for long, and rules that are not of these names."""
        now_s = self._clock()
        self._seen_s = {
            request: now_s if request in requests else seen_s
            for request, seen_s in self._seen_s.items()
            if request in requests or now_s - seen_s < FORGET_S
        }
        self._applied = {request: applied for request, applied in self._applied.items() if request in self._seen_s}
        self._limits = {name: limit for name, limit in self._limits.items() if name in rules}


def value_of(rule: RuleConfig, scores: Scores) -> float:
    """The number that a rule looks at; NaN if there is none. Of numbers by layer and head it is their mean."""
    if rule.probe is not None:
        score = scores.probes.get(rule.probe)
        return math.nan if score is None else score.value
    assert rule.signal is not None
    signal, _, name = rule.signal.partition(".")
    values = scores.signals.get(signal)
    if values is None:
        return math.nan
    if name in values.of_request:
        return values.of_request[name]
    places = values.by_place.get(name, values.by_token.get(name))
    if places is None:
        return math.nan
    known = places[np.isfinite(places)]
    return float(known.mean(dtype=np.float64)) if known.size else math.nan
