"""The arithmetic of bench_tail: pooled quantiles, the mean of two plain servers, intervals over rounds."""

import numpy as np
import pytest

from tests.bench.tail_quantiles import QUANTILES, Quantile, Requests, tail

PLAIN = ("plain", "again")


def requests(seconds: float, count: int = 100, tokens: int = 20) -> Requests:
    """All alike."""
    return [np.full(tokens, seconds) for _ in range(count)]


def of_exponentials(rng: np.random.Generator, mean: float) -> Requests:
    """Tokens that wait independently."""
    return [rng.exponential(mean, size=50) for _ in range(100)]


def p99(found: list[Quantile]) -> Quantile:
    """The second of them."""
    return found[QUANTILES.index(0.99)]


class TestTail:
    def test_a_ratio_is_to_the_mean_of_the_plain_arms(self) -> None:
        """Which differ, too; without scatter an interval is a point."""
        found = tail([{"plain": requests(0.9), "again": requests(1.1), "default": requests(1.2)}], PLAIN, resamples=5)
        assert [(0.9, 0.9), (1.1, 1.1), (1.2, 1.2)] == [
            (pytest.approx(p99(found[arm]).seconds), pytest.approx(p99(found[arm]).ratio)) for arm in found
        ]
        assert p99(found["default"]).low == pytest.approx(1.2) == p99(found["default"]).high

    def test_rounds_are_pooled(self) -> None:
        """Of two rounds of which one is slow, p99 is of the slow one and the median between them."""
        one = {"plain": requests(1.0), "again": requests(1.0), "default": requests(1.0)}
        slow = {**one, "default": requests(3.0)}
        median, high, _ = tail([one, slow], PLAIN)["default"]
        assert (2.0, 3.0) == (median.seconds, high.seconds)
        # Both rounds may be drawn twice.
        assert (1.0, 3.0) == (median.low, median.high)

    def test_an_interval_holds_what_is_true(self) -> None:
        """Of the same distribution 10 % slower: 1.1 is within, 1 is not."""
        rng = np.random.default_rng(1)
        rounds = [
            {arm: of_exponentials(rng, mean) for arm, mean in (("plain", 1.0), ("again", 1.0), ("default", 1.2))}
            for _ in range(6)
        ]
        found = p99(tail(rounds, PLAIN, resamples=200)["default"])
        assert found.low is not None
        assert found.high is not None
        assert 1.0 < found.low < 1.2 < found.high

    def test_too_few_values_have_no_quantile(self) -> None:
        """p99.9 of 500 values is none of them."""
        arms = ("plain", "again", "default")
        found = tail([{arm: requests(1.0, count=25) for arm in arms}], PLAIN, resamples=5)["default"]
        assert [1.0, 1.0, None] == [quantile.seconds for quantile in found]
        assert [500, 500, 500] == [quantile.values for quantile in found]
