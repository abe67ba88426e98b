"""Matrices: what was measured between two snapshots, means, and the digits that are sent."""

import numpy as np
import pytest

from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS
from glassbox.core.histograms import quantiles
from glassbox.core.statistics import INDEX, STATISTICS, Phase
from glassbox.store.merge import MergedEngine, merge
from glassbox.web.matrices import between, head_answer, listed, means, phase_answer, rounded
from tests.export_samples import changed, make_snapshot


def engine_of(seed: int = 0, **changes: object) -> MergedEngine:
    return merge([make_snapshot(seed=seed, **changes)])[0]


def later(engine: MergedEngine, by: MergedEngine, time_s: float) -> MergedEngine:
    """`engine` after it has also measured what is in `by`."""
    summed = {name: getattr(engine, name) + getattr(by, name) for name in CUMULATIVE_ARRAYS}
    return changed(engine, time_s=time_s, steps=engine.steps + 7, **summed)


class TestBetween:
    def test_it_is_what_was_added(self) -> None:
        """Every array is the second snapshot's less the first one's, over the time between them."""
        old, added = engine_of(1), engine_of(2)
        new = later(old, added, old.time_s + 5)
        found = between(old, new)
        for name in CUMULATIVE_ARRAYS:
            np.testing.assert_array_equal(getattr(added, name), getattr(found, name))
        assert (old.time_s, new.time_s, 7) == (found.start_time_s, found.time_s, found.steps)

    def test_the_first_snapshot_is_an_interval_of_its_own(self) -> None:
        """There is nothing to subtract."""
        new = engine_of()
        assert between(None, new) is new

    @pytest.mark.parametrize("changes", [{"layers": (0, 2)}, {"heads": 3}, {"engine": "1"}, {"model_name": "other"}])
    def test_another_model_is_not_subtracted(self, changes: dict[str, object]) -> None:
        """Cells of different heads have nothing to do with each other."""
        new = engine_of(**changes)
        assert between(engine_of(), new) is new

    def test_fallen_counters_are_a_new_start(self) -> None:
        """An emptied run directory must not give negative rows."""
        new = engine_of(1)
        assert between(later(new, engine_of(2), 9.0), new) is new


class TestMeans:
    def test_sum_over_rows(self) -> None:
        """By the rows that have a finite score."""
        engine = engine_of()
        column = INDEX["sink_ratio"]
        expected = engine.sums[1, 0, 1, column] / engine.counts[1, 0, 1, column].sum()
        assert expected == means(engine, STATISTICS[column], Phase.DECODE)[1, 0]

    def test_no_row_has_no_mean(self) -> None:
        """NaN, which becomes null."""
        engine = engine_of()
        engine.counts[0, 1, 1] = 0
        assert np.isnan(means(engine, STATISTICS[0], Phase.DECODE)[0, 1])
        assert listed(means(engine, STATISTICS[0], Phase.DECODE))[0][1] is None


class TestDigits:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [(0.123456789, 0.12346), (-98765.4321, -98765.0), (1234567.0, 1234600.0), (0.0, 0.0), (3e-9, 3e-9), (5.0, 5.0)],
    )
    def test_five_significant_digits(self, value: float, expected: float) -> None:
        """The shortest decimal that says so: no 0.12346000000000001 in the answer."""
        assert expected == rounded(np.array([value]))[0]
        assert repr(expected) == repr(listed(np.array([value]))[0])

    def test_what_json_cannot_say_is_none(self) -> None:
        """NaN and infinities."""
        assert [None, None, None, 1.0] == listed(np.array([np.nan, np.inf, -np.inf, 1.0]))


class TestAnswers:
    def test_a_phase_has_the_merged_numbers(self) -> None:
        """Rows, non-finite rows and means, layer by layer and head by head."""
        engine = engine_of(heads=3)
        answer = phase_answer(engine, STATISTICS, Phase.PREFILL)
        assert engine.rows[:, :, 0].tolist() == answer["rows"]
        assert engine.nonfinite[:, :, 0].tolist() == answer["nonfinite"]
        expected = engine.sums[:, :, 0, INDEX["top1_ratio"]] / engine.counts[:, :, 0, INDEX["top1_ratio"]].sum(axis=-1)
        np.testing.assert_allclose(answer["statistics"]["top1_ratio"]["mean"], expected, rtol=1e-4)

    def test_quantiles_are_interpolated_in_the_buckets(self) -> None:
        """As everywhere else in glassbox; null where there is no row."""
        engine = engine_of()
        engine.counts[0, 0, 1] = 0
        found = phase_answer(engine, STATISTICS, Phase.DECODE)["statistics"]["sink_ratio"]
        statistic = STATISTICS[INDEX["sink_ratio"]]
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            expected = quantiles(statistic, engine.counts[1, 1, 1, INDEX["sink_ratio"]], share)
            assert pytest.approx(float(expected), rel=1e-4) == found[name][1][1]
            assert found[name][0][0] is None

    def test_lookback_is_of_decode_rows_only(self) -> None:
        """A statistic that prefill rows do not have is not there, rather than empty."""
        engine = engine_of()
        assert "lookback_ratio" not in phase_answer(engine, STATISTICS, Phase.PREFILL)["statistics"]
        assert "lookback_ratio" in phase_answer(engine, STATISTICS, Phase.DECODE)["statistics"]

    def test_the_largest_logit_of_the_window_is_there(self) -> None:
        """And null where the window had no row."""
        engine = engine_of()
        engine.window_max[0, 0, 1] = -np.inf
        found = phase_answer(engine, STATISTICS, Phase.DECODE)["statistics"]["max_logit"]["window_max"]
        assert found[0][0] is None
        assert engine.window_max[1, 1, 1] == found[1][1]

    def test_a_head_has_its_histograms(self) -> None:
        """Counts per bucket, not cumulative, with the bounds and the sum."""
        engine = engine_of()
        answer = head_answer(engine, STATISTICS[:1], Phase.DECODE, 1, 0)
        assert {
            "rows": engine.rows[1, 0, 1],
            "nonfinite": engine.nonfinite[1, 0, 1],
            "histograms": {
                "entropy_ratio": {
                    "bounds": list(STATISTICS[0].buckets),
                    "counts": engine.counts[1, 0, 1, 0].tolist(),
                    "sum": engine.sums[1, 0, 1, 0],
                }
            },
        } == answer
