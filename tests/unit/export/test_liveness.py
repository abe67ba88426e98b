"""What the serving process tells of age and exporter, whatever has become of those who write."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from glassbox.config.load import GlassboxConfig
from glassbox.export.family_source import FamilySource
from glassbox.export.liveness import SILENT_S, Liveness
from glassbox.export.prometheus import LivenessCollector, to_metric
from glassbox.store.exporter_lock import ExporterLock
from glassbox.store.exporter_status import ExporterStatus, write_status
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import make_snapshot

WROTE_S = make_snapshot().time_s
CONFIG = GlassboxConfig.model_validate({"export": {"interval_s": 7}})


class Server:
    """A run directory, and what a process that shows it tells at a time of the test's."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.now, self.needed = run_dir, WROTE_S, True
        self.source = FamilySource(run_dir, lambda: CONFIG)
        self.liveness = Liveness(
            run_dir, lambda: CONFIG, lambda: self.source.merged().engines, lambda _: self.needed, lambda: self.now
        )

    def tell(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Values by metric and label values."""
        metrics = [to_metric(family) for family in self.liveness.families()]
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for sample in (sample for metric in metrics for sample in metric.samples):
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
        return found


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "run")


class TestSnapshotAge:
    def test_it_grows_while_nothing_is_written(self, server: Server) -> None:
        """Of each worker that runs; a restarted one's predecessor is none."""
        write_snapshot(server.run_dir, make_snapshot(seed=1))
        write_snapshot(server.run_dir, make_snapshot(seed=1, instance="dead", time_s=WROTE_S - 900))
        write_snapshot(server.run_dir, make_snapshot(seed=2, engine="1", rank=1, time_s=WROTE_S - 20))
        first, second = ("tiny/model", "0", "0", "gpu-7", "0-1"), ("tiny/model", "1", "1", "gpu-7", "0-1")
        server.now = WROTE_S + 3
        assert server.tell()["glassbox_snapshot_age_seconds"] == {first: 3.0, second: 23.0}
        server.now = WROTE_S + 600
        assert server.tell()["glassbox_snapshot_age_seconds"] == {first: 600.0, second: 620.0}

    def test_a_directory_that_cannot_be_read_does_not_hide_it(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was read last grows older."""
        write_snapshot(server.run_dir, make_snapshot())
        server.tell()
        shutil.rmtree(server.run_dir)
        server.run_dir.write_text("no directory any more")
        server.now = WROTE_S + 50
        assert list(server.tell()["glassbox_snapshot_age_seconds"].values()) == [50.0]

    def test_a_clock_that_was_set_back_makes_no_negative_age(self, server: Server) -> None:
        """A snapshot of the future is new."""
        write_snapshot(server.run_dir, make_snapshot())
        server.now = WROTE_S - 50
        assert list(server.tell()["glassbox_snapshot_age_seconds"].values()) == [0.0]

    def test_the_interval_by_which_to_judge_it(self, server: Server) -> None:
        """Is there from the start, for one who wants an alert that fits."""
        assert server.tell()["glassbox_export_interval_seconds"] == {(): 7.0}


class TestExporter:
    @pytest.fixture
    def lock(self, server: Server) -> Iterator[ExporterLock]:
        server.run_dir.mkdir()
        lock = ExporterLock.acquire(server.run_dir)
        assert lock is not None
        yield lock
        lock.release()

    def beat(self, server: Server, at_s: float) -> None:
        os.utime(server.run_dir / "exporter.lock", (at_s, at_s))

    @pytest.mark.parametrize(("silence", "up"), [(0.0, 1.0), (SILENT_S - 1, 1.0), (SILENT_S, 0.0), (3600.0, 0.0)])
    def test_one_that_hangs_is_not_up(self, server: Server, lock: ExporterLock, silence: float, up: float) -> None:
        """It has its lock and its process, but gives no sign of life."""
        self.beat(server, WROTE_S)
        server.now = WROTE_S + silence
        told = server.tell()
        assert told["glassbox_exporter_up"] == {(): up}
        assert told["glassbox_exporter_silence_seconds"] == {(): silence}

    def test_one_that_is_gone_is_not_up(self, server: Server, lock: ExporterLock) -> None:
        """At once, whenever it gave its last sign."""
        self.beat(server, WROTE_S)
        os.close(os.dup(0))
        assert server.tell()["glassbox_exporter_up"] == {(): 1.0}
        lock.release()
        again = server.tell()
        lock._handle = os.open(server.run_dir / "exporter.lock", os.O_RDWR)  # for the fixture to close
        assert again["glassbox_exporter_up"] == {(): 0.0}

    def test_one_that_never_came_is_not_up(self, server: Server) -> None:
        """Without a run directory, too; there is no last sign of life."""
        told = server.tell()
        assert told["glassbox_exporter_up"] == {(): 0.0}
        assert "glassbox_exporter_silence_seconds" not in told

    def test_none_is_missed_where_none_is_needed(self, server: Server) -> None:
        """The default configuration with one API server."""
        server.needed = False
        assert set(server.tell()) == {"glassbox_export_interval_seconds"}

    def test_restarts_sinks_and_their_failures(self, server: Server) -> None:
        """As the exporter last told: they stay when it has died, so that they grow old."""
        write_snapshot(server.run_dir, make_snapshot())
        status = ExporterStatus(1, WROTE_S, {"otel": 3, "read": 9}, {"otel": 0.0, "jsonl": WROTE_S}, restarts=2)
        write_status(server.run_dir, status)
        told = server.tell()
        assert told["glassbox_exporter_restarts_total"] == {(): 2.0}
        assert told["glassbox_sink_last_success_timestamp_seconds"] == {("jsonl",): WROTE_S, ("otel",): 0.0}
        assert told["glassbox_sink_failures_total"] == {("jsonl",): 0.0, ("otel",): 3.0}


class TestCollector:
    def test_an_error_breaks_no_page(self, caplog: pytest.LogCaptureFixture) -> None:
        """vLLM's own metrics are on it; the log says it once."""

        def broken() -> Any:
            raise RuntimeError("a bug")

        registry = CollectorRegistry()
        registry.register(LivenessCollector(Liveness(Path("/no/such"), broken, broken), lambda: True))
        assert list(registry.collect()) == list(registry.collect()) == []
        assert sum("can't tell how old its metrics are" in line for line in caplog.messages) >= 1

    def test_it_is_hidden_with_the_others(self, server: Server) -> None:
        """`export.prometheus.enabled: false`."""
        registry = CollectorRegistry()
        registry.register(LivenessCollector(server.liveness, lambda: False))
        assert list(registry.collect()) == []
