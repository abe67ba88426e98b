"""The watch of non-finite rows: it names the layer that they come from, as long as they come."""

from typing import Final

import numpy as np
import pytest

from glassbox.processes.worker.nonfinite import NonfiniteWatch

LAYERS: Final = (2, 3, 5, 7)


class Counts:
    """Cumulative counts [L, H, 2] of a worker, and its watch."""

    def __init__(self) -> None:
        self.counts = np.zeros((len(LAYERS), 3, 2), dtype=np.int64)
        self.rows = np.zeros_like(self.counts)
        self._watch = NonfiniteWatch(LAYERS)

    def add(self, *local_layers: int, phase: int = 1, measured: slice = slice(None)) -> None:
        """A row of one head in each of these layers, of those that are measured."""
        self.rows[measured] += 1
        for local in local_layers:
            self.counts[local, 1, phase] += 1

    def first(self, now_s: float) -> int | None:
        return self._watch.first(self.counts.copy(), self.rows.copy(), now_s)


class TestFirstLayer:
    def test_healthy(self) -> None:
        """No such rows, no layer."""
        assert Counts().first(0.0) is None

    @pytest.mark.parametrize("phase", [0, 1])
    def test_the_lowest_of_those_that_are_spoiled(self, phase: int) -> None:
        """By its global index: what comes behind a layer is spoiled by it."""
        counts = Counts()
        counts.add(1, 2, 3, phase=phase)
        assert 3 == counts.first(0.0)

    def test_what_was_counted_before(self) -> None:
        """A layer that had such rows earlier is not the one where the new ones begin."""
        counts = Counts()
        counts.add(0, 1, 2, 3)
        assert 2 == counts.first(0.0)
        counts.add(2, 3)
        assert 5 == counts.first(1.0)

    def test_a_minute(self) -> None:
        """It is named for 60 seconds after the last of them, and not for ever."""
        counts = Counts()
        counts.add(2)
        assert 5 == counts.first(100.0)
        assert 5 == counts.first(160.0)
        assert counts.first(160.5) is None
        counts.add(2)
        assert 5 == counts.first(300.0)

    def test_layers_that_take_turns(self) -> None:
        """The first one stays named while others are measured, until its own next rows are finite."""
        counts = Counts()
        counts.add(1, measured=slice(1, 2))
        assert 3 == counts.first(0.0)
        counts.add(3, measured=slice(3, 4))
        assert 3 == counts.first(5.0)
        counts.add(measured=slice(1, 2))
        assert 7 == counts.first(10.0)
        counts.add(2, measured=slice(2, 3))
        assert 5 == counts.first(15.0)
