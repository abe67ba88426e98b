"""Accumulators count exactly what was added."""

import numpy as np
import pytest
import torch

from glassbox.core.statistics import INDEX, NUM_STATISTICS, STATISTICS
from glassbox.measure.accumulate import WINDOW_SLOT_S, WINDOW_SLOTS, Accumulators


def random_stats(layers: int, rows: int, heads: int, seed: int) -> torch.Tensor:
    """[L, R, H, S + 1] with values on, below and above bucket bounds, some NaN, some rows non-finite."""
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([s.buckets for s in STATISTICS])
    stats = torch.zeros(layers, rows, heads, NUM_STATISTICS + 1)
    pick = torch.randint(0, bounds.shape[1], (layers, rows, heads, NUM_STATISTICS), generator=generator)
    values = bounds.T[pick, torch.arange(NUM_STATISTICS)]
    nudge = torch.randint(-1, 2, values.shape, generator=generator) * values.abs().clamp_min(1) * 0.01
    stats[..., :NUM_STATISTICS] = values + nudge
    nonfinite = torch.rand(layers, rows, heads, generator=generator) < 0.2
    stats[nonfinite] = torch.nan
    stats[..., NUM_STATISTICS] = nonfinite.float()
    return stats


class TestAdd:
    """One call with several layers equals counting by hand."""

    @pytest.mark.parametrize(("layers", "rows", "heads"), [(1, 1, 1), (3, 7, 2), (2, 33, 5)])
    def test_counts_sums_rows_and_maxima(self, layers: int, rows: int, heads: int) -> None:
        """Counted with numpy, value by value."""
        stats = random_stats(layers, rows, heads, seed=layers + rows)
        phases = torch.arange(rows) % 2
        accumulators = Accumulators(layers + 1, heads)
        local = torch.arange(layers) + 1  # layer 0 is not among the measured
        for _ in range(2):
            accumulators.add(local, stats, phases)
        got = accumulators.copy()
        assert got.rows[0].sum() == 0
        values = stats.numpy()
        for phase in (0, 1):
            mine = values[:, phase::2]
            assert (got.rows[1:, :, phase] == 2 * mine.shape[1]).all()
            np.testing.assert_array_equal(got.nonfinite[1:, :, phase], 2 * mine[..., NUM_STATISTICS].sum(1))
            for s, statistic in enumerate(STATISTICS):
                column = mine[..., s]
                edges = np.array([-np.inf, *statistic.buckets, np.inf], dtype=np.float32)
                for b in range(len(edges) - 1):
                    expected = 2 * ((column > edges[b]) & (column <= edges[b + 1])).sum(1)
                    np.testing.assert_array_equal(got.counts[1:, :, phase, s, b], expected)
                np.testing.assert_allclose(
                    got.sums[1:, :, phase, s],
                    2 * np.nansum(column.astype(np.float64), axis=1),
                    rtol=1e-12,
                    atol=1e-12,
                )
            if mine.shape[1]:
                largest = np.where(np.isnan(mine[..., INDEX["max_logit"]]), -np.inf, mine[..., INDEX["max_logit"]])
                np.testing.assert_array_equal(got.window_max[1:, :, phase], largest.max(1))

    def test_no_rows_change_nothing(self) -> None:
        """An empty batch is not an error."""
        accumulators = Accumulators(1, 2)
        accumulators.add(torch.tensor([0]), torch.zeros(1, 0, 2, NUM_STATISTICS + 1), torch.zeros(0, dtype=torch.int64))
        assert accumulators.copy().rows.sum() == 0

    def test_fewer_heads_than_the_widest_layer(self) -> None:
        """A layer with fewer heads leaves the rest at zero."""
        accumulators = Accumulators(1, 4)
        accumulators.add(torch.tensor([0]), random_stats(1, 3, 2, seed=0), torch.zeros(3, dtype=torch.int64))
        assert accumulators.copy().rows[0, :, 0].tolist() == [3, 3, 0, 0]


class TestAdapters:
    """Rows of adapters are told apart beside the totals, which stay what they are."""

    def test_totals_and_slots(self) -> None:
        """Totals as without slots; each slot as an accumulator that got its rows alone, over layers and heads."""
        stats, adapters = random_stats(2, 40, 3, seed=5), torch.arange(40) * 3 % 4
        adapters[adapters == 2] = 0
        phases, local = torch.arange(40) // 3 % 2, torch.tensor([0, 2])
        without, apart = Accumulators(3, 5), Accumulators(3, 5, num_adapters=4)
        without.add(local, stats, phases)
        apart.add(local, stats, phases, adapters)
        total, got = without.copy(), apart.copy()
        assert total.by_adapter is None
        assert got.by_adapter is not None
        for name in ("counts", "rows", "nonfinite", "window_max"):
            np.testing.assert_array_equal(getattr(got, name), getattr(total, name))
        np.testing.assert_allclose(got.sums, total.sums, rtol=1e-12, atol=1e-12)
        for slot in range(4):
            alone = Accumulators(3, 5)
            its = adapters == slot
            alone.add(local, stats[:, its], phases[its])
            expected = alone.copy()
            for name in ("counts", "rows", "nonfinite"):
                np.testing.assert_array_equal(getattr(got.by_adapter, name)[slot], getattr(expected, name).sum((0, 1)))
            np.testing.assert_allclose(got.by_adapter.sums[slot], expected.sums.sum((0, 1)), rtol=1e-12, atol=1e-12)
        assert got.by_adapter.rows.sum(1).tolist()[2] == 0
        assert (got.by_adapter.rows.sum(1)[[0, 1, 3]] > 0).all()

    def test_a_layer_of_another_rank_is_not_shown_twice(self) -> None:
        """A layer that all ranks have whole is in the totals, and by adapter one rank's alone."""
        stats, slots = random_stats(2, 6, 2, seed=1), torch.arange(6) % 3
        accumulators = Accumulators(2, 2, num_adapters=3, adapter_layers=[1])
        accumulators.add(torch.tensor([0, 1]), stats, torch.zeros(6, dtype=torch.int64), slots)
        for _ in range(2):  # nothing is left of the call before
            got = accumulators.copy()
            assert got.by_adapter is not None
            assert got.rows[:, :, 0].tolist() == [[6, 6], [6, 6]]
            assert got.by_adapter.rows[:, 0].tolist() == [4, 4, 4]

    def test_without_adapters_nothing_is_kept_besides(self) -> None:
        """No bytes more, and what is copied are the accumulators themselves."""
        one = Accumulators(2, 3)
        assert one.rows.shape == (2, 3, 2)
        assert one.exported()[0] is one.counts


class TestWindow:
    """Window maxima fade, everything else stays."""

    def test_a_maximum_is_forgotten_after_the_window(self) -> None:
        """It is there for at least three slots and gone after four."""
        accumulators = Accumulators(1, 1)
        accumulators.rotate(0.0)
        stats = torch.zeros(1, 1, 1, NUM_STATISTICS + 1)
        stats[..., INDEX["max_logit"]] = 42.0
        accumulators.add(torch.tensor([0]), stats, torch.tensor([1]))
        accumulators.rotate((WINDOW_SLOTS - 1) * WINDOW_SLOT_S)
        assert accumulators.copy().window_max[0, 0, 1] == 42.0
        accumulators.rotate(WINDOW_SLOTS * WINDOW_SLOT_S)
        after = accumulators.copy()
        assert after.window_max[0, 0, 1] == -np.inf
        assert after.rows[0, 0, 1] == 1

    def test_a_long_pause_clears_all_slots(self) -> None:
        """Also when the clock jumped over the whole window."""
        accumulators = Accumulators(1, 1)
        accumulators.rotate(0.0)
        accumulators.window_max.fill_(5.0)
        accumulators.rotate(1000 * WINDOW_SLOT_S)
        assert (accumulators.copy().window_max == -np.inf).all()
