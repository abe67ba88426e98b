"""Traces on the export thread: what is written when, and that neither disk nor memory fills up."""

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.trace_arrays import without_values
from glassbox.measure.deferred import DeferredActions
from glassbox.processes.worker.traces import writer as writer_module
from glassbox.processes.worker.traces.active import ActiveTrace, Chunk
from glassbox.processes.worker.traces.tracker import RequestTracker
from glassbox.processes.worker.traces.writer import RUNNING_SHARE, WATCHED_INTERVAL_S, WATCHED_SHARE, TraceWriter
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import TraceOptions
from tests.export_samples import logged
from tests.trace_samples import make_host, new_request, scheduled_step


def chunk(position: int) -> Chunk:
    """One row of a request with 2 layers and 2 heads."""
    arrays = without_values({"token": 1, "layer": 2, "head": 2, "top_k": 0, "span": 0})
    arrays["positions"][:], arrays["phases"][:], arrays["stats"][:] = position, 1, position
    return Chunk(arrays)


class Setup:
    """A worker's tracker and writer. No time passes but what a test says; a look at the CPU's clock takes `look_s`."""

    def __init__(self, folder: Path, tokenizer: str = "", **requests: Any) -> None:
        self.config = GlassboxConfig.model_validate({"requests": requests})
        self.tracker = RequestTracker(make_host(), DeferredActions(ErrorCounter(logging.getLogger("test"))))
        self.now_s = self.cpu_s = self.look_s = 0.0
        host = make_host(tokenizer=tokenizer)
        self.writer = TraceWriter(
            folder, host, self.tracker, clock=lambda: self.now_s, cpu_clock=self.look_at_the_cpus_clock
        )
        self.directory = TraceDirectory(folder)

    def look_at_the_cpus_clock(self) -> float:
        self.cpu_s += self.look_s
        return self.cpu_s

    def arrive(self, *ids: str) -> None:
        new = [new_request(i, 5, {"glassbox": "trace"}) for i in ids]
        self.tracker.begin_step(None, scheduled_step(new, dict.fromkeys(ids, 5)), self.config, frozenset({0, 1}))

    def finish(self, *ids: str) -> None:
        self.tracker.begin_step(None, scheduled_step(finished_req_ids=set(ids)), self.config, frozenset({0, 1}))

    def write(self) -> int:
        return self.writer.write(self.config.requests)

    def write_watched(self) -> int:
        return self.writer.write_watched(self.config.requests)

    def found(self) -> dict[str, tuple[str, int]]:
        return {s.internal_id: (s.status, s.num_rows) for s in self.directory.summaries()}


class TestWrite:
    def test_running_ones_as_they_change_and_ended_ones_once(self, tmp_path: Path) -> None:
        """A running request's file grows with it; after its end it is written once and let go."""
        setup = Setup(tmp_path)
        setup.arrive("a", "b")
        assert setup.write() == 2
        assert setup.found() == {"a": ("active", 0), "b": ("active", 0)}
        assert setup.write() == 0
        setup.tracker.active()[0].append(chunk(5))
        assert setup.write() == 1
        assert setup.found() == {"a": ("active", 1), "b": ("active", 0)}
        setup.finish("a")
        assert setup.write() == 1
        assert setup.found() == {"a": ("finished", 1), "b": ("active", 0)}
        assert setup.tracker.ended() == []
        assert setup.write() == 0
        assert list(setup.writer._written) == ["b"]

    def test_what_ended_ones_take_is_told(self, tmp_path: Path) -> None:
        """And not what running ones take, which has a share of its own."""
        setup = Setup(tmp_path)
        setup.arrive("a", "b")
        setup.look_s = 0.5
        setup.write()
        assert 0 == setup.writer.ended_s
        setup.finish("a")
        setup.write()
        assert 0.5 == setup.writer.ended_s

    def test_ended_ones_alone_where_somebody_waits_for_one(self, tmp_path: Path) -> None:
        """Running ones are written with their next turn."""
        setup = Setup(tmp_path)
        setup.arrive("a", "b")
        setup.finish("a")
        assert setup.writer.write(setup.config.requests, running=False) == 1
        assert setup.found() == {"a": ("finished", 0)}
        assert setup.write() == 1
        assert setup.found() == {"a": ("finished", 0), "b": ("active", 0)}

    def test_running_ones_wait_if_they_are_expensive(self, tmp_path: Path) -> None:
        """Each takes 10 ms, so two are written every 4 s; one that ends doesn't wait."""
        setup = Setup(tmp_path)
        setup.look_s = 0.01
        setup.arrive("a", "b")
        assert setup.write() == 2
        for trace in setup.tracker.active():
            trace.append(chunk(5))
        setup.now_s = 0.02 / RUNNING_SHARE - 0.1
        assert setup.write() == 0
        assert setup.found() == {"a": ("active", 0), "b": ("active", 0)}
        setup.finish("a")
        assert setup.write() == 1
        assert setup.found() == {"a": ("finished", 1), "b": ("active", 0)}
        setup.now_s += 0.2
        assert setup.write() == 1
        assert setup.found() == {"a": ("finished", 1), "b": ("active", 1)}

    def test_the_tokenizer_is_told_with_the_first_text(self, tmp_path: Path) -> None:
        """Where it lies is written only if texts of traces may be shown."""
        setup = Setup(tmp_path, tokenizer="some/model")
        setup.arrive("a")
        setup.write()
        assert not (tmp_path / "tokenizer.json").exists()
        setup.config = GlassboxConfig.model_validate({"requests": {"include_text": True}})
        setup.write()
        assert {"tokenizer": "some/model", "revision": None} == json.loads((tmp_path / "tokenizer.json").read_text())

    def test_nothing_traced(self, tmp_path: Path) -> None:
        """No directory is made."""
        assert Setup(tmp_path).write() == 0
        assert list(tmp_path.iterdir()) == []

    def test_limits(self, tmp_path: Path) -> None:
        """The oldest ended ones go; running ones stay."""
        setup = Setup(tmp_path, keep=3)
        setup.arrive("running")
        setup.write()
        for i in range(6):
            setup.arrive(f"r{i}")
            setup.finish(f"r{i}")
            setup.write()
        assert sorted(setup.found()) == ["r4", "r5", "running"] or sorted(setup.found()) == [
            "r3",
            "r4",
            "r5",
            "running",
        ]

    def test_a_disk_that_refuses(self, tmp_path: Path) -> None:
        """It is an error to count; what has ended is let go all the same, and running ones are tried again."""
        (tmp_path / "traces").write_text("not a directory")
        setup = Setup(tmp_path)
        setup.arrive("a", "b")
        setup.finish("a")
        with pytest.raises(OSError, match=r"exists|directory"):
            setup.write()
        assert setup.tracker.ended() == []
        (tmp_path / "traces").unlink()
        assert setup.write() == 1
        assert setup.found() == {"b": ("active", 0)}


class TestFromTwoThreads:
    def test_records_while_rows_come(self) -> None:
        """A record taken at any time is whole: its rows are the first so many."""
        trace = ActiveTrace(
            make_host(), "a", why="opt_in", options=TraceOptions(), traceparent=None, prompt_len=5,
            local_layers=(0, 1), head_columns=(0, 1),
        )  # fmt: skip
        failures: list[str] = []
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                record = trace.record()
                positions = record.positions.tolist()
                if positions != list(range(5, 5 + len(positions))):
                    failures.append(f"rows {positions}")
                if not np.array_equal(record.stats[:, 0, 0, 0], record.positions):
                    failures.append("statistics of another row")

        reader = threading.Thread(target=read)
        reader.start()
        for position in range(5, 2005):
            trace.append(chunk(position))
        stop.set()
        reader.join(30)
        assert failures == []
        assert len(trace.record().positions) == 2000


class TestRecord:
    def trace(self) -> ActiveTrace:
        return ActiveTrace(
            make_host(), "a", why="sampled", options=TraceOptions(), traceparent=None, prompt_len=5,
            local_layers=(0, 1), head_columns=(0, 1),
        )  # fmt: skip

    def test_a_position_computed_again(self) -> None:
        """It stands there once, as it was the last time, in its place."""
        trace = self.trace()
        for position in (4, 5, 6, 4, 6, 7):
            trace.append(chunk(position))
        again = chunk(5)
        again.arrays["stats"][:] = 55
        trace.append(again)
        record = trace.record()
        assert record.positions.tolist() == [4, 5, 6, 7]
        assert record.stats[:, 0, 0, 0].tolist() == [4, 55, 6, 7]

    def test_rejected_drafts_at_the_end(self) -> None:
        """Rows beyond the answer, of draft tokens that were rejected, are not the request's."""
        trace = self.trace()
        for position in (5, 6, 7, 8):
            trace.append(chunk(position))
        assert trace.record().positions.tolist() == [5, 6, 7, 8]
        trace.end("finished", num_generated=3)
        assert trace.record().positions.tolist() == [5, 6]


class TestWatched:
    """Running requests that rules watch: written several times a second, within their share of a core."""

    def test_what_has_changed(self, tmp_path: Path) -> None:
        """Whatever `write` must wait for; and the end of a request is `write`'s."""
        setup = Setup(tmp_path)
        setup.arrive("a", "b")
        setup.write()
        setup.look_s = 10.0  # running ones are not due for long
        setup.tracker.active()[0].append(chunk(5))
        setup.write()
        setup.look_s = 0.0
        setup.tracker.active()[0].append(chunk(6))
        assert (0, 1, 0) == (setup.write(), setup.write_watched(), setup.write_watched())
        assert {"a": ("active", 2), "b": ("active", 0)} == setup.found()
        setup.finish("a")
        assert (0, 1) == (setup.write_watched(), setup.write())

    def test_a_share_of_a_core(self, tmp_path: Path) -> None:
        """Each is written as often as the others, however many they are, and all together cost no more."""
        setup = Setup(tmp_path)
        ids = ("a", "b", "c", "d", "e")
        setup.arrive(*ids)
        setup.write()
        setup.look_s = 0.05
        rounds, written = 400, 0
        for position in range(rounds):
            for trace in setup.tracker.active():
                trace.append(chunk(5 + position))
            setup.now_s += WATCHED_INTERVAL_S
            written += setup.write_watched()
        assert written == pytest.approx(rounds * WATCHED_INTERVAL_S * WATCHED_SHARE / setup.look_s, abs=2)
        rows = [num_rows for _, num_rows in setup.found().values()]
        # One write a second, so that each of them comes every five.
        assert rounds - min(rows) <= 5 * 5

    def test_lateness_is_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """In a metric, and once in the log with what helps; it is over when the trace is written."""
        logging.getLogger(writer_module.__name__).__dict__.pop("_glassbox_logged_once", None)
        setup = Setup(tmp_path)
        setup.arrive("a", "b")
        setup.write()
        setup.look_s = 0.2
        for step in range(8):
            for trace in setup.tracker.active():
                trace.append(chunk(5 + step))
            setup.write_watched()
            setup.now_s += WATCHED_INTERVAL_S
        assert setup.writer.watched_delay_s == pytest.approx(7 * WATCHED_INTERVAL_S)
        told = [line for line in logged(caplog.records) if "late for the rules" in line]
        assert 1 == len(told)
        assert "requests.max_active" in told[0]
        setup.look_s = 0.0
        setup.now_s += 60
        setup.write_watched()
        assert 0 == setup.writer.watched_delay_s
