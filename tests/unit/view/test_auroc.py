"""Areas, intervals and corrected p of many features, against scikit-learn, scipy and what is known of made data."""

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

from glassbox.view.samples.auroc import (
    auroc,
    bootstrap_interval,
    bootstrap_weights,
    corrected_p,
    interval_within_strata,
    length_strata,
    midranks,
    permuted_labels,
    within_strata,
)


def made(n: int = 120, features: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values with ties and gaps, of which the first column tells something, and labels."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(np.int8)
    values = np.round(rng.normal(size=(n, features)), 1).astype(np.float32)
    values[:, 0] += labels
    values[rng.random(values.shape) < 0.1] = np.nan
    return values, labels


class TestArea:
    def test_is_that_of_sklearn(self) -> None:
        """With ties, and without the samples that lack a value."""
        values, labels = made()
        for column, found in zip(values.T, auroc(values, labels), strict=True):
            known = np.isfinite(column)
            assert roc_auc_score(labels[known], column[known]) == pytest.approx(found)

    def test_ranks_are_those_of_scipy(self) -> None:
        """Equal values at their mean rank; 0 where there is none."""
        values, _ = made()
        for column, found in zip(values.T, midranks(values).T, strict=True):
            known = np.isfinite(column)
            assert rankdata(column[known]).tolist() == found[known].tolist()
            assert not found[~known].any()

    def test_one_kind_only(self) -> None:
        """There is no pair to compare."""
        assert np.isnan(auroc(np.array([[1.0], [2.0]], np.float32), np.array([1, 1], np.int8))).all()

    def test_within_strata_only_equals_are_compared(self) -> None:
        """A feature that is nothing but the length tells nothing at equal length; what is its own stays."""
        rng = np.random.default_rng(1)
        labels = (rng.random(4000) < 0.5).astype(np.int8)
        lengths = 10 * rng.integers(1, 6, 4000) + 50 * labels * (rng.random(4000) < 0.5)
        values = np.stack([lengths, rng.normal(labels, 1)], axis=1).astype(np.float32)
        plain, within = auroc(values, labels), within_strata(values, labels, lengths.astype(np.intp))
        assert plain[0] > 0.7
        assert within[0] == pytest.approx(0.5, abs=1e-9)
        assert within[1] == pytest.approx(plain[1], abs=0.03)

    def test_strata_of_lengths(self) -> None:
        """Of about equal size; equal lengths are never apart."""
        strata = length_strata(np.repeat(np.arange(100), 3))
        assert [60] * 5 == np.bincount(strata).tolist()
        assert {0} == set(length_strata(np.full(9, 7)).tolist())


class TestInterval:
    def test_covers_the_truth_as_often_as_it_says(self) -> None:
        """Of two normal distributions one standard deviation apart the area is Phi(1 / sqrt 2)."""
        truth = norm.cdf(1 / np.sqrt(2))
        rng = np.random.default_rng(0)
        labels = np.repeat([0, 1], 60).astype(np.int8)
        values = rng.normal(labels[:, None], 1, (120, 400)).astype(np.float32)
        low, high = bootstrap_interval(values, labels, bootstrap_weights(labels, None, 400, rng)).T
        covered = ((low <= truth) & (truth <= high)).mean()
        # 0.95, with the binomial's three standard deviations, and what percentile intervals lack at such a size.
        assert 0.90 < covered < 0.985

    def test_weights_are_resampled_samples(self) -> None:
        """One resampling, against sklearn on the samples that it has drawn."""
        values, labels = made()
        weights = bootstrap_weights(labels, None, 1, np.random.default_rng(3))
        assert weights.sum() == len(labels)
        assert weights[0, labels == 1].sum() == (labels == 1).sum()
        found = bootstrap_interval(values, labels, weights)
        for column, (low, high) in zip(values.T, found, strict=True):
            drawn = np.repeat(np.arange(len(labels)), weights[0].astype(int))
            drawn = drawn[np.isfinite(column[drawn])]
            assert roc_auc_score(labels[drawn], column[drawn]) == pytest.approx(low)
            assert low == high

    def test_a_single_sample_has_none(self) -> None:
        """Drawn again it is always itself: an interval of no width would seem to be sure."""
        values, labels = made()
        labels[:] = 0
        labels[np.flatnonzero(np.isfinite(values[:, 0]))[:1]] = 1
        weights = bootstrap_weights(labels, None, 50, np.random.default_rng(0))
        assert np.isnan(bootstrap_interval(values[:, :1], labels, weights)).all()

    def test_within_strata(self) -> None:
        """One resampling that draws every sample once has the area of these samples; one stratum is no stratum."""
        values, labels = made()
        once, strata = np.ones((1, len(labels)), np.float32), np.arange(len(labels)) % 3
        found = interval_within_strata(values[:, 0], labels, strata, once)
        assert found.tolist() == pytest.approx([within_strata(values[:, :1], labels, strata)[0]] * 2)
        weights = bootstrap_weights(labels, None, 50, np.random.default_rng(3))
        of_one = interval_within_strata(values[:, 0], labels, np.zeros(len(labels), np.intp), weights)
        assert bootstrap_interval(values, labels, weights)[0].tolist() == of_one.tolist()

    def test_groups_are_drawn_whole(self) -> None:
        """Ten copies of each sample don't make the interval shorter."""
        values, labels = made(n=40, features=1)
        groups = [str(i) for i in range(40)]
        once = bootstrap_interval(values, labels, bootstrap_weights(labels, groups, 2000, np.random.default_rng(0)))
        copied = np.tile(values, (10, 1)), np.tile(labels, 10), groups * 10
        weights = bootstrap_weights(copied[1], copied[2], 2000, np.random.default_rng(0))
        assert np.diff(bootstrap_interval(copied[0], copied[1], weights)) == pytest.approx(np.diff(once), abs=0.01)


class TestCorrection:
    def test_by_chance_one_in_twenty_analyses_finds_something(self) -> None:
        """Of 200 analyses of 30 features that tell nothing some 10 have a p below 0.05; uncorrected nearly all have."""
        rng = np.random.default_rng(0)
        found = []
        for _ in range(200):
            labels = rng.permutation(np.repeat([0, 1], 20)).astype(np.int8)
            values = rng.normal(size=(40, 30)).astype(np.float32)
            found.append(corrected_p(values, labels, permuted_labels(labels, None, 99, rng)).min() <= 0.05)
        assert 0.005 < np.mean(found) < 0.11  # 0.05 with three standard deviations

    def test_finds_what_is_there(self) -> None:
        """One telling feature among many; a smaller p than one over the permutations is never claimed."""
        values, labels = made(n=200, features=300)
        values[:, 7] = labels * 2 + np.random.default_rng(1).normal(size=200)
        p = corrected_p(values, labels, permuted_labels(labels, None, 199, np.random.default_rng(0)))
        assert p[7] == 1 / 200
        assert (p[[1, 2, 3]] > 0.05).all()

    def test_labels_are_exchanged_within_groups(self) -> None:
        """Pairs stay pairs; groups of one label keep theirs together."""
        labels = np.array([0, 1] * 30, dtype=np.int8)
        pairs = [str(i // 2) for i in range(60)]
        permuted = permuted_labels(labels, pairs, 50, np.random.default_rng(0))
        assert (permuted.reshape(50, 30, 2).sum(axis=2) == 1).all()
        assert 0.3 < permuted[:, 0].mean() < 0.7
        whole = [str(i % 2 + 2 * (i // 20)) for i in range(60)]
        permuted = permuted_labels(labels, whole, 50, np.random.default_rng(0))
        for name in set(whole):
            of_group = permuted[:, [group == name for group in whole]]
            assert (of_group == of_group[:, :1]).all()
