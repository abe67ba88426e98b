"""Quantiles of histograms, against numpy's of the values themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.core.histograms import quantiles
from glassbox.core.statistics import INDEX, NUM_BUCKETS, STATISTICS


class TestQuantiles:
    @settings(max_examples=100, deadline=None)
    @given(
        values=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=200),
        q=st.sampled_from([0.05, 0.5, 0.95]),
    )
    def test_it_lies_in_the_bucket_of_the_true_one(self, values: list[float], q: float) -> None:
        """numpy's quantile of the values themselves falls into the bucket in which it is interpolated."""
        statistic = STATISTICS[INDEX["top1_ratio"]]
        edges = [0.0, *statistic.buckets, 1.0]
        buckets = np.searchsorted(statistic.buckets, values, side="left")
        found = quantiles(statistic, np.bincount(buckets, minlength=NUM_BUCKETS), q)
        true = float(np.quantile(values, q, method="inverted_cdf"))
        bucket = int(np.searchsorted(statistic.buckets, true, side="left"))
        assert edges[bucket] <= found <= edges[bucket + 1]

    def test_linear_within_a_bucket(self) -> None:
        """10 values in (0.1, 0.2]: the median is in its middle."""
        counts = [0, 0, 0, 10] + [0] * 8
        assert quantiles(STATISTICS[INDEX["top1_ratio"]], counts, 0.5) == pytest.approx(0.15)

    @pytest.mark.parametrize(
        ("name", "bucket", "expected"),
        [("max_logit", 0, -10.0), ("max_logit", 11, 1000.0), ("self_logprob", 11, -0.05), ("effective_keys", 0, 1.05)],
    )
    def test_open_buckets(self, name: str, bucket: int, expected: float) -> None:
        """Where a bucket has no end, its finite one is the answer; where the statistic has a bound, that is its end."""
        counts = [0] * NUM_BUCKETS
        counts[bucket] = 2
        assert quantiles(STATISTICS[INDEX[name]], counts, 0.5) == pytest.approx(expected)

    def test_no_values_no_quantile(self) -> None:
        """NaN, not 0."""
        assert np.isnan(quantiles(STATISTICS[0], [0] * NUM_BUCKETS, 0.5))

    def test_many_places_at_once(self) -> None:
        """Each place has the quantile that it has alone."""
        counts = np.random.default_rng(3).integers(0, 5, (4, 3, NUM_BUCKETS))
        found = quantiles(STATISTICS[0], counts, 0.95)
        assert (4, 3) == found.shape
        assert [[quantiles(STATISTICS[0], head, 0.95) for head in layer] for layer in counts] == found.tolist()

    def test_the_ends(self) -> None:
        """The smallest value lies at the beginning of its bucket, the largest at the end."""
        counts = [0, 0, 0, 10] + [0] * 8
        assert [0.1, 0.2] == [quantiles(STATISTICS[INDEX["top1_ratio"]], counts, q) for q in (0.0, 1.0)]
