"""Rules: which apply to a request, once, at its time, and not too often."""

import math
from typing import Any

import numpy as np
import pytest

from glassbox.config.load import RuleConfig
from glassbox.signals.probe import ProbeScore
from glassbox.signals.rule_book import FORGET_S, RateLimit, RuleBook, value_of
from glassbox.signals.scores import Scores
from glassbox.signals.values import SignalValues


def make_rule(**fields: Any) -> RuleConfig:
    probe = {} if "signal" in fields else {"probe": "p"}
    above = {} if "below" in fields else {"above": 0.5}
    return RuleConfig.model_validate({"name": "r", **probe, **above, **fields})


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> RuleBook:
    return RuleBook(clock)


def judged(book: RuleBook, rule: RuleConfig, value: float, request: str = "a", **how: Any) -> list[bool]:
    """Of each rule that applies, whether it is limited."""
    found = book.judge([rule], request, {"r": value}, **{"num_generated": 9, "ended": True, **how})
    return [match.limited for match in found]


class TestWhen:
    def test_either_side(self, book: RuleBook) -> None:
        """Beyond the threshold, on the side that the rule names; at it, and without a number, never."""
        assert [[False], [], [], []] == [
            judged(book, make_rule(), value, request=str(value)) for value in (0.6, 0.5, 0.4, math.nan)
        ]
        assert [[], [], [False]] == [
            judged(book, make_rule(below=-2), value, request=str(value)) for value in (math.nan, -2.0, -2.5)
        ]

    def test_once_for_each_request(self, book: RuleBook) -> None:
        """However often it is looked at, and whatever the number does; an edited rule is another one."""
        rule = make_rule(when="running")
        assert [[False], [], [], []] == [judged(book, rule, value, ended=False) for value in (0.6, 0.9, 0.1, 0.7)]
        assert [False] == judged(book, rule, 0.6, request="b", ended=False)
        assert [False] == judged(book, make_rule(when="running", dry_run=False), 0.9, ended=False)

    def test_running_or_ended(self, book: RuleBook) -> None:
        """A rule that watches running requests looks at their end, too; one that aborts watches them."""
        for rule, running in (
            (make_rule(), []), (make_rule(when="ended"), []), (make_rule(when="running"), [False]),
            (make_rule(do=["abort"]), [False]),
        ):  # fmt: skip
            request = repr(rule)
            assert running == judged(book, rule, 0.9, request=request, ended=False)
            assert [False] * (1 - len(running)) == judged(book, rule, 0.9, request=request, ended=True)

    def test_not_before_some_tokens(self, book: RuleBook) -> None:
        """Numbers of few rows are none."""
        rule = make_rule(min_generated=8)
        assert [[], [False]] == [judged(book, rule, 0.9, num_generated=count) for count in (7, 8)]


class TestHowOften:
    def test_a_minute(self, clock: Clock) -> None:
        """Sixty a minute: ten at once, then one a second."""
        limit = RateLimit(clock)
        assert [True] * 10 + [False] * 2 == [limit.take(60) for _ in range(12)]
        clock.now += 2.5
        assert [True, True, False] == [limit.take(60) for _ in range(3)]
        clock.now += 3600
        assert 10 == sum(limit.take(60) for _ in range(100))

    def test_a_rare_one(self, clock: Clock) -> None:
        """One a minute is one, and the next after a minute."""
        limit = RateLimit(clock)
        assert [True, False] == [limit.take(1) for _ in range(2)]
        clock.now += 59
        assert not limit.take(1)
        clock.now += 1.001
        assert limit.take(1)

    def test_limited_ones_apply_too(self, book: RuleBook) -> None:
        """They are told, so that they can be counted, and of each request once."""
        rule = make_rule(per_minute=1)
        assert [[False], [True], []] == [judged(book, rule, 0.9, request=request) for request in ("a", "b", "b")]

    def test_what_is_kept(self, book: RuleBook, clock: Clock) -> None:
        """Requests that are gone for long are forgotten, and rules that were taken away at once."""
        rule = make_rule(per_minute=1)
        judged(book, rule, 0.9)
        book.keep({"a"}, {"r"})
        clock.now += FORGET_S - 1
        book.keep(set(), {"r"})
        assert [] == judged(book, rule, 0.9)
        assert [False] == judged(book, rule, 0.9, request="b")
        book.keep(set(), set())
        clock.now += 2
        book.keep(set(), set())
        assert [[False], []] == [judged(book, rule, 0.9, request=request) for request in ("a", "b")]


class TestValues:
    def test_of_probes_and_signals(self) -> None:
        """A score; a number of the request; of one by layer and head the mean of what is known."""
        nan = float("nan")
        values = SignalValues(
            by_place={"G": np.array([[0.5, nan], [0.25, 0.75]], np.float32), "C": np.full((2, 2), nan, np.float32)},
            of_request={"Gamma": 3.5},
        )
        scores = Scores({"p": ProbeScore(0.75, "bad", 0.5)}, {"asymmetry": values})

        def value(**fields: Any) -> float:
            return value_of(make_rule(**fields), scores)

        assert (0.75, 3.5, 0.5) == (value(), value(signal="asymmetry.Gamma"), value(signal="asymmetry.G"))
        missing = (value(probe="q"), value(signal="asymmetry.C"), value(signal="selfattn.attn_diag_logmean"))
        assert all(math.isnan(one) for one in missing)
