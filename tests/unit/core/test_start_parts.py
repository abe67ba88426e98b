"""What glassbox adds to the start of a worker, by part."""

from contextlib import suppress

import pytest

from glassbox.core.start_parts import START_PARTS, StartParts


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


class TestStartParts:
    def test_a_part_within_another_counts_once(self) -> None:
        """Kernels that are compiled while the worker is prepared are no preparing; a part may come again."""
        clock = Clock()
        parts = StartParts(clock)
        for _ in range(2):
            with parts.timed("prepare"):
                clock.now += 0.25
                with parts.timed("kernels"):
                    clock.now += 1.0
                clock.now += 0.125
        assert {**dict.fromkeys(START_PARTS, 0.0), "prepare": 0.75, "kernels": 2.0} == parts.seconds()
        assert "glassbox took 2.75 s of this worker's start (kernels 2.00, prepare 0.75)" == parts.line()

    def test_a_part_that_fails_is_counted_too(self) -> None:
        """What it took until then; what comes after it is apart."""
        clock = Clock()
        parts = StartParts(clock)
        with suppress(RuntimeError), parts.timed("prepare"), parts.timed("kernels"):
            clock.now += 1.5
            raise RuntimeError("no compiler")
        with parts.timed("arm"):
            clock.now += 0.5
        assert {**dict.fromkeys(START_PARTS, 0.0), "kernels": 1.5, "arm": 0.5} == parts.seconds()

    def test_a_part_that_is_not_in_the_table(self) -> None:
        """It would be no series."""
        with pytest.raises(KeyError, match=r"a part must be one of register, import, .*, got imports"):
            StartParts().timed("imports").__enter__()
