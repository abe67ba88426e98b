"""Rows of traces by client: a rate, a burst, and nobody pays for another."""

import pytest

from glassbox.processes.worker.traces import quota
from glassbox.processes.worker.traces.quota import BURST_S, RowQuota


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


class TestRowQuota:
    def test_burst_then_rate(self, clock: Clock) -> None:
        """Ten seconds' rows at once; then so many a second."""
        rows = RowQuota(clock)
        assert rows.take("a", int(BURST_S * 5), 5)
        assert rows.is_used_up("a", 5)
        assert not rows.take("a", 1, 5)
        clock.now_s += 1
        assert not rows.is_used_up("a", 5)
        assert rows.take("a", 5, 5)
        assert not rows.take("a", 1, 5)
        clock.now_s += 1000
        assert not rows.take("a", 51, 5)
        assert rows.take("a", 50, 5)

    def test_each_client_has_its_own(self, clock: Clock) -> None:
        """And those that nobody can tell have none."""
        rows = RowQuota(clock)
        assert rows.take("a", 10, 1)
        assert not rows.take("a", 1, 1)
        assert rows.take("b", 10, 1)
        assert rows.take(None, 10**9, 1)
        assert not rows.is_used_up(None, 1)

    def test_no_limit(self, clock: Clock) -> None:
        """An edit that lifts it does so at once."""
        rows = RowQuota(clock)
        assert rows.take("a", 10, 1)
        assert not rows.is_used_up("a", None)
        assert rows.take("a", 10**9, None)

    def test_it_is_bounded(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clients that have all of theirs again are forgotten, others are not."""
        monkeypatch.setattr(quota, "_REMEMBERED", 10)
        rows = RowQuota(clock)
        for number in range(100):
            clock.now_s += 1
            assert rows.take(f"client-{number}", 1, 1)
        assert len(rows._whole_at) <= 11
        assert rows.take("busy", 10, 1)
        for number in range(20):
            assert rows.take(f"other-{number}", 10, 1)
        assert not rows.take("busy", 1, 1)
