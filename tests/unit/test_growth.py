"""Nothing grows faster than what there is to do: counted in calls and bytes, which no clock or neighbour changes."""

import sys
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glassbox.core.accumulator_arrays import ARRAY
from glassbox.core.statistics import NUM_STATISTICS
from glassbox.export.families import build_families
from glassbox.export.page import render, text
from glassbox.measure import accumulate
from glassbox.measure.accumulate import Accumulators
from glassbox.store.merge import merge
from glassbox.store.metrics_page import NAME, write_page
from tests.growth import Action, snapshot_of, tracker


def calls(action: Action) -> int:
    """How often Python and C functions are called, and generators go on."""
    count = 0

    def on_event(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    action()  # what happens only once
    sys.setprofile(on_event)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def peak_bytes(action: Action) -> int:
    """The most memory that an action holds at once, its result included."""
    action()
    tracemalloc.start()
    try:
        _result = action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_step_of_traced_requests() -> None:
    """Four times as many requests are four times the work: none looks at all the others."""
    with ExitStack() as stack:
        few, many = (calls(tracker(stack, requests=number)) for number in (32, 128))
    assert 3.5 < many / few < 4.5


def test_merging_takes_little_more_than_what_it_makes() -> None:
    """No copies of a snapshot's counts."""
    snapshot = snapshot_of(32, 64)
    result = sum(getattr(snapshot, name).nbytes for name in ARRAY)
    assert peak_bytes(lambda: merge([snapshot])) < 1.3 * result


@pytest.fixture(scope="module")
def engines() -> Any:
    return merge([snapshot_of(32, 32)])


class TestPage:
    def test_families_are_columns(self, engines: Any) -> None:
        """No object for each series: bytes of one are those of its numbers and its share of the labels."""
        number = sum(len(family.series) for family in build_families(engines, "head"))
        assert number > 20_000
        assert peak_bytes(lambda: build_families(engines, "head")) < 300 * number

    @pytest.mark.parametrize("way", ["file", "answer"])
    def test_nobody_holds_all_of_it(self, engines: Any, tmp_path: Path, way: str) -> None:
        """Whether it is written to its file or sent."""
        found = build_families(engines, "head")
        ways: dict[str, Callable[[], object]] = {
            "file": lambda: write_page(tmp_path, render(found), 1.0),
            "answer": lambda: sum(map(len, text([(found, {})], "openmetrics"))),
        }
        write_page(tmp_path, render(found), 1.0)
        size = (tmp_path / NAME).stat().st_size
        assert size > 25_000_000
        assert peak_bytes(ways[way]) < size / 2


def test_statistics_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few layers at a time, whose indices and counts stay small, and the numbers are what they are at once."""
    stats = torch.rand(6, 5, 3, NUM_STATISTICS + 1, generator=torch.Generator().manual_seed(1))
    stats[..., NUM_STATISTICS] = 0
    stats[2:4, 1, :, :NUM_STATISTICS] = torch.nan
    stats[0, 2, 1, :NUM_STATISTICS] = torch.inf
    found, parts = [], []
    original = Accumulators._add_some

    def counted(self: Accumulators, layers: torch.Tensor, *rest: Any) -> None:
        parts.append(len(layers))
        original(self, layers, *rest)

    monkeypatch.setattr(Accumulators, "_add_some", counted)
    for most in (1 << 16, 2 * 5 * 3 * NUM_STATISTICS):
        monkeypatch.setattr(accumulate, "_CACHED_VALUES", most)
        accumulators = Accumulators(8, 4)
        accumulators.add(torch.tensor([7, 0, 3, 2, 5, 1]), stats, torch.tensor([0, 1, 1, 0, 1]))
        found.append(accumulators.copy())
    assert parts == [6, 2, 2, 2]
    for name in ARRAY:
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
