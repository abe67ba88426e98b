"""Effect sizes over histogram buckets, against scipy, numpy on the values themselves, and sums done by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from glassbox.core.statistics import INDEX, NUM_BUCKETS, STATISTICS
from glassbox.signals.drift import (
    bucket_midpoints,
    expected_index,
    population_stability_index,
    standardised_mean_difference,
)

COUNTS = arrays(np.int64, (3, NUM_BUCKETS), elements=st.integers(0, 10_000))


class TestPopulationStabilityIndex:
    def test_by_hand(self) -> None:
        """Shares 1/4, 3/4 against 3/4, 1/4: 2 * (1/2) * ln 3, once the half row in each bucket is subtracted."""
        found = population_stability_index([0.5, 2.5], [2.5, 0.5])
        assert found == pytest.approx(math.log(3))

    @settings(max_examples=100, deadline=None)
    @given(expected=COUNTS, actual=COUNTS, pseudo=st.sampled_from([0.5, 1.0, 1e-3]))
    def test_it_is_the_symmetric_divergence(self, expected: np.ndarray, actual: np.ndarray, pseudo: float) -> None:
        """scipy's relative entropies of both directions, added; NaN where a side is empty."""
        found = population_stability_index(expected, actual, pseudo_count=pseudo)
        e, a = expected + pseudo, actual + pseudo
        true = stats.entropy(a, e, axis=-1) + stats.entropy(e, a, axis=-1)
        empty = (expected.sum(-1) == 0) | (actual.sum(-1) == 0)
        np.testing.assert_allclose(found, np.where(empty, np.nan, true), rtol=1e-9, atol=1e-12)

    def test_equal_shares_of_different_size(self) -> None:
        """A run ten times as long with the same shares differs by less than the rule of thumb's 0.1."""
        counts = np.arange(1, 13) * 10
        assert 0.0 == population_stability_index(counts, counts)
        assert 0.0 < population_stability_index(counts, counts * 10) < 0.001

    def test_an_empty_bucket_is_finite(self) -> None:
        """Nothing in common: large, and not infinite."""
        assert 5 < population_stability_index([100, 0], [0, 100]) < 20

    def test_axes_broadcast(self) -> None:
        """One baseline against [layers, heads] gives [layers, heads]."""
        assert (4, 5) == population_stability_index(np.ones(12), np.ones((4, 5, 12))).shape

    @pytest.mark.parametrize(
        ("expected", "actual", "pseudo", "message"),
        [
            ([1, 2], [1, 2, 3], 0.5, "both must have the same number of buckets, got shapes (2,) and (3,)"),
            (1.0, 2.0, 0.5, "both must have the same number of buckets, got shapes () and ()"),
            ([1, -1], [1, 2], 0.5, "counts must be finite and not negative; give the rows of each bucket"),
            ([1, math.nan], [1, 2], 0.5, "counts must be finite and not negative"),
            ([1, 2], [1, 2], 0.0, "pseudo_count must be above 0, got 0.0; use 0.5"),
        ],
    )
    def test_bad_input(self, expected: object, actual: object, pseudo: float, message: str) -> None:
        """The error names rule, value and remedy."""
        with pytest.raises(ValueError, match=r"must") as error:
            population_stability_index(expected, actual, pseudo_count=pseudo)  # type: ignore[arg-type]
        assert message in str(error.value)


class TestExpectedIndex:
    def test_it_is_what_chance_makes(self) -> None:
        """Mean over 2,000 pairs of samples of one distribution, within five standard errors."""
        rng = np.random.default_rng(7)
        share = rng.dirichlet(np.full(NUM_BUCKETS, 5.0))
        first, second = rng.multinomial(2000, share, 2000), rng.multinomial(5000, share, 2000)
        found = population_stability_index(first, second)
        error = found.std() / math.sqrt(len(found))
        assert found.mean() == pytest.approx(float(expected_index(2000, 5000, NUM_BUCKETS)), abs=5 * error)

    def test_nothing_measured(self) -> None:
        """No rows: any index may be chance, also where one bucket could be used."""
        assert [math.inf, math.inf] == expected_index([0, 0], [5, 0], [2, 0]).tolist()


class TestStandardisedMeanDifference:
    @settings(max_examples=100, deadline=None)
    @given(expected=COUNTS, actual=COUNTS)
    def test_against_the_values_themselves(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """numpy's mean and variance of every row written out."""
        midpoints = bucket_midpoints(STATISTICS[INDEX["entropy_ratio"]])
        for e, a, found in zip(
            expected // 100, actual // 100, standardised_mean_difference(expected // 100, actual // 100, midpoints),
            strict=True,
        ):  # fmt: skip
            values_e, values_a = np.repeat(midpoints, e), np.repeat(midpoints, a)
            if not len(values_e) or not len(values_a):
                assert math.isnan(found)
                continue
            spread = math.sqrt((values_e.var() + values_a.var()) / 2)
            if spread > 1e-6:
                assert found == pytest.approx((values_a.mean() - values_e.mean()) / spread, abs=1e-9)

    def test_by_hand(self) -> None:
        """0 and 2 against 2 and 4, halves of each: two apart, standard deviation one."""
        assert 2.0 == standardised_mean_difference([5, 5, 0], [0, 5, 5], [0.0, 2.0, 4.0])

    def test_nothing_varies(self) -> None:
        """All rows in one bucket: no difference if it is the same one, else an infinite one with its sign."""
        found = standardised_mean_difference([[3, 0], [3, 0], [0, 3]], [[9, 0], [0, 1], [1, 0]], [0.0, 1.0])
        assert [0.0, math.inf, -math.inf] == found.tolist()

    def test_wrong_midpoints(self) -> None:
        """One value a bucket."""
        with pytest.raises(ValueError, match=r"midpoints must have the shape \(2,\), one a bucket, got \(3,\)"):
            standardised_mean_difference([1, 2], [1, 2], [0, 1, 2])


class TestBucketMidpoints:
    @pytest.mark.parametrize(
        ("name", "first", "second", "last"),
        [
            ("entropy_ratio", 0.005, 0.03, 0.95),
            ("effective_keys", 1.05, 1.55, 4096.0),
            ("max_logit", -10.0, -5.0, 1000.0),
            ("self_logprob", -50.0, -35.0, -0.05),
        ],
    )
    def test_ends(self, name: str, first: float, second: float, last: float) -> None:
        """Outer buckets end at the statistic's range; where it has none, the finite bound stands for them."""
        midpoints = bucket_midpoints(STATISTICS[INDEX[name]])
        assert (NUM_BUCKETS,) == midpoints.shape
        assert [first, second, last] == pytest.approx([midpoints[0], midpoints[1], midpoints[-1]])
