"""The native kernel adds to accumulators what torch adds."""

import numpy as np
import pytest
import torch

from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS
from glassbox.measure.accumulate import Accumulators
from glassbox.measure.native_sums import NativeSums
from tests.unit.measure.test_accumulate import random_stats


def both(
    layers: list[int], stats: torch.Tensor, adapters: torch.Tensor | None = None, **options: int
) -> tuple[Accumulators, Accumulators]:
    """Of six layers of five heads, by torch and by the kernel, twice, the second time in another slot of the window."""
    by_torch, native = (Accumulators(6, 5, **options) for _ in range(2))
    sums, phases = NativeSums(native), torch.arange(stats.shape[1]) // 3 % 2
    for number, now_s in enumerate((0.0, 20.0)):
        given = stats + number
        for accumulators in (by_torch, native):
            accumulators.rotate(now_s)
        by_torch.add(torch.tensor(layers), given, phases, adapters)
        sums.add(layers, given.numpy(), phases.numpy(), None if adapters is None else adapters.numpy())
    return by_torch, native


def assert_same(by_torch: Accumulators, native: Accumulators) -> None:
    """All but sums to the bit; these were added in another order."""
    assert native.rows.sum() > 0
    for name in (*CUMULATIVE_ARRAYS, "window_max"):
        compare = np.testing.assert_allclose if name == "sums" else np.testing.assert_array_equal
        more = {"rtol": 1e-13, "atol": 1e-12} if name == "sums" else {}
        compare(getattr(native, name).numpy(), getattr(by_torch, name).numpy(), err_msg=name, **more)


class TestNativeSums:
    @pytest.mark.parametrize("rows", [1, 7, 40])
    def test_all_arrays(self, rows: int) -> None:
        """Of some layers in another order; values on bounds, NaN and rows that aren't finite are among them."""
        assert_same(*both([4, 0, 2], random_stats(3, rows, 5, seed=rows)))

    def test_fewer_heads_than_the_widest_layer(self) -> None:
        """The other heads stay as they are."""
        by_torch, native = both([1], random_stats(1, 9, 2, seed=1))
        assert_same(by_torch, native)
        assert 0 == native.rows[:, 2:].sum()

    def test_values_beyond_all_bounds(self) -> None:
        """They have a bucket of their own; so have those below the first."""
        stats = random_stats(1, 2, 5, seed=2).nan_to_num(0)
        stats[:, 0, :, :-1], stats[:, 1, :, :-1] = 1e30, -1e30
        by_torch, native = both([3], stats)
        assert_same(by_torch, native)
        assert (native.counts[3, :, :, :, 0].sum(), native.counts[3, :, :, :, -1].sum()) == (2 * 5 * 9, 2 * 5 * 9)

    def test_adapters(self) -> None:
        """Each row in its own slot."""
        adapters = torch.arange(12) * 5 % 3
        by_torch, native = both([0, 5], random_stats(2, 12, 5, seed=3), adapters, num_adapters=3)
        assert_same(by_torch, native)

    def test_no_rows_change_nothing(self) -> None:
        """An empty batch is not an error."""
        accumulators = Accumulators(1, 2)
        none = np.zeros((1, 0, 2, random_stats(1, 1, 1, seed=0).shape[-1]), dtype=np.float32)
        NativeSums(accumulators).add([0], none, np.zeros(0, dtype=np.int64))
        assert 0 == accumulators.rows.sum()

    @pytest.mark.parametrize(("layer", "heads", "adapter"), [(6, 5, 0), (0, 6, 0), (0, 5, 1)])
    def test_rows_without_a_place_are_refused(self, layer: int, heads: int, adapter: int) -> None:
        """Nothing is written beyond the arrays."""
        accumulators = Accumulators(6, 5)
        stats = random_stats(1, 2, heads, seed=4).numpy()
        with pytest.raises(ValueError, match="must have a place for each row"):
            NativeSums(accumulators).add([layer], stats, np.zeros(2, np.int64), np.full(2, adapter))
        assert 0 == accumulators.rows.sum()
