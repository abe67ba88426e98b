"""A request has ended when all ranks that trace it have written that, or have been waited for; for every reader."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glassbox.store import snapshot as snapshot_module
from glassbox.store.awaited_ranks import WAIT_FOR_RANKS_S
from glassbox.store.process_name import own_name, own_place
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import TraceDirectory, traces_path
from glassbox.store.trace_record import RequestTrace, write_trace
from glassbox.store.trusted_file import list_files, open_file
from tests.export_samples import make_snapshot
from tests.trace_samples import make_trace

HEADS = (0, 1), (2, 3)
INTERVAL_S = 5.0
EXTERNAL = "cmpl-1-0"


class Ranks:
    """A run directory into which two ranks write; `now` is Unix time."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.now = run_dir, 1_700_000_100.0
        self.names = [f"{own_name()}-{rank}" for rank in range(2)]
        self.directory = TraceDirectory(run_dir, lambda: self.now)

    def live(self, *ranks: int, interval_s: float = INTERVAL_S, **changes: Any) -> None:
        for rank in ranks:
            fields = {"layers": (0, 3), "rank": rank, "head_offset": 2 * rank, "total_heads": 4}
            fields |= {"instance": self.names[rank], "interval_s": interval_s}
            write_snapshot(self.run_dir, make_snapshot(**fields | changes))

    def write(self, rank: int, **changes: Any) -> RequestTrace:
        fields = {"rank": rank, "instance": self.names[rank], "heads": HEADS[rank], "end_time_s": self.now}
        trace = make_trace(**fields | changes)
        write_trace(traces_path(self.run_dir), trace)
        return trace

    def seen(self) -> tuple[str, float | None]:
        """Status and end, in which all readers agree."""
        (summary,) = self.directory.summaries()
        (found,) = self.directory.find(EXTERNAL)
        whole = [self.directory.get(EXTERNAL), self.directory.load(summary), *self.directory.read()]
        told = {
            (one.status, one.end_time_s) for one in (summary, found, *whole, *self.directory.traces(EXTERNAL)) if one
        }
        assert 1 == len(told)
        assert (summary.runs, summary.awaited_ranks) == (False, int(summary.status == "active"))
        return told.pop()


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


class TestTwoRanks:
    @pytest.mark.parametrize("first", [0, 1])
    def test_active_until_both_have_written(self, ranks: Ranks, first: int) -> None:
        """Whichever comes first; then it has the heads of both, and the newest end."""
        ranks.live(0, 1)
        ranks.write(first)
        assert ("active", None) == ranks.seen()
        end_s, ranks.now = ranks.now, ranks.now + 4
        ranks.write(1 - first, end_time_s=end_s + 1)
        assert ("finished", end_s + 1) == ranks.seen()
        (trace,) = ranks.directory.read()
        assert (0, 1, 2, 3) == trace.heads

    @pytest.mark.parametrize("interval_s", [0.1, 5.0, 300.0, 3600.0])
    def test_one_that_never_writes(self, ranks: Ranks, interval_s: float) -> None:
        """It has refused the request: it is waited for longer than it takes until it would write, and no longer."""
        ranks.live(0, 1, interval_s=interval_s)
        ranks.write(0)
        end_s, wait_s = ranks.now, interval_s + WAIT_FOR_RANKS_S
        ranks.now = end_s + wait_s - 0.01
        assert ("active", None) == ranks.seen()
        ranks.now = end_s + wait_s + 0.01
        assert ("finished", end_s) == ranks.seen()

    def test_an_edit_of_the_interval(self, ranks: Ranks) -> None:
        """Counts as soon as the worker has told it."""
        ranks.live(0, 1)
        ranks.write(0)
        end_s, ranks.now = ranks.now, ranks.now + 60
        assert ("finished", end_s) == ranks.seen()
        ranks.live(1, interval_s=60.0)
        assert ("active", None) == ranks.seen()

    def test_one_that_has_none_of_the_layers(self, ranks: Ranks) -> None:
        """A stage of a pipeline that has none of those that were asked for."""
        ranks.live(0)
        ranks.live(1, layers=(1, 2))
        options = make_trace().options
        ranks.write(0, options=type(options)(layers=(0, 3)))
        assert "finished" == ranks.seen()[0]

    def test_one_that_has_died(self, ranks: Ranks) -> None:
        """Writes nothing any more; a dead server's requests have all ended."""
        ranks.names[1] = f"{os.getpid()}-1-{own_place()}-1"
        ranks.live(0, 1)
        ranks.write(0)
        assert ("finished", ranks.now) == ranks.seen()

    def test_of_workers_before_a_restart(self, ranks: Ranks) -> None:
        """Nobody knows how many there were."""
        ranks.live(0, 1)
        ranks.write(0, instance="before")
        assert ("finished", ranks.now) == ranks.seen()

    def test_the_last_look(self, ranks: Ranks) -> None:
        """Of whoever ends: what there is has ended, with its arrays, too."""
        ranks.live(0, 1)
        ranks.write(0)
        (summary,) = ranks.directory.summaries(last=True)
        assert ("finished", ranks.now, 0) == (summary.status, summary.end_time_s, summary.awaited_ranks)
        trace = ranks.directory.load(summary)
        assert trace is not None
        assert ("finished", ranks.now) == (trace.status, trace.end_time_s)

    def test_a_running_one(self, ranks: Ranks) -> None:
        """Tells of how many ranks it still has nothing, however long that takes."""
        ranks.live(0, 1)
        seen = []
        for rank in range(2):
            ranks.write(rank, status="active", end_time_s=None)
            ranks.now += 7200
            (summary,) = ranks.directory.summaries()
            seen.append((summary.status, summary.runs, summary.awaited_ranks))
        assert [("active", True, 1), ("active", True, 0)] == seen


class TestCost:
    @pytest.fixture
    def looks(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What is listed and opened of the workers' snapshots."""
        done: list[str] = []

        def noting(name: str, true: Callable[..., Any]) -> Callable[..., Any]:
            def note(*args: Any) -> Any:
                done.append(name)
                return true(*args)

            return note

        for name, true in {"list_files": list_files, "open_file": open_file}.items():
            monkeypatch.setattr(snapshot_module, name, noting(name, true))
        return done

    @pytest.mark.parametrize("traces", [1, 40])
    def test_of_one_rank(self, ranks: Ranks, looks: list[str], traces: int) -> None:
        """Its snapshot is never read, and it is looked for once, however many traces there are."""
        ranks.live(0)
        for seed in range(traces):
            ranks.write(0, seed=seed, request_id=f"cmpl-{seed}-0")
        looks.clear()
        assert ["finished"] * traces == [one.status for one in ranks.directory.summaries()]
        assert ["list_files"] == looks

    def test_of_two(self, ranks: Ranks, looks: list[str]) -> None:
        """Each snapshot is read once, and again when it was replaced."""
        ranks.live(0, 1)
        for seed in range(40):
            ranks.write(seed % 2, seed=seed, request_id=f"cmpl-{seed}-0")
        looks.clear()
        assert [1] * 40 == [one.awaited_ranks for one in ranks.directory.summaries()]
        assert ["list_files", "open_file", "open_file"] == looks
        ranks.live(1)
        looks.clear()
        assert 40 == len(ranks.directory.summaries())
        assert ["list_files", "open_file"] == looks

    def test_of_old_ones(self, ranks: Ranks, looks: list[str]) -> None:
        """Of requests that no rank can still be about to write nobody is looked for."""
        ranks.live(0, 1)
        ranks.write(0)
        ranks.now += 3600 + WAIT_FOR_RANKS_S
        looks.clear()
        assert "finished" == ranks.seen()[0]
        assert [] == looks
