"""The parts whose growth is measured run as they are: what they call changes with what they measure."""

from contextlib import ExitStack

import pytest

from tests.bench.bench_growth import CASES, Case

SMALLEST = {case.part: case for case in CASES}


@pytest.mark.parametrize("case", SMALLEST.values(), ids=lambda case: case.part)
def test_every_part_runs(case: Case) -> None:
    """Twice, as the bench does more often."""
    with ExitStack() as stack:
        action = case.make(case.sizes[0], stack)
        action()
        action()
