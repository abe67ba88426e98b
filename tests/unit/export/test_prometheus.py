"""Prometheus: exact exposition, valid for promtool and for a real server, the same by all ways."""

import math
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from glassbox.config.follow import ConfigFile
from glassbox.config.load import GlassboxConfig, load_config
from glassbox.core.statistics import INDEX, STATISTICS
from glassbox.export.families import build_families
from glassbox.export.family_source import FamilySource
from glassbox.export.multiprocess import MultiprocessWriter, without_lone_counts
from glassbox.export.prometheus import PrometheusCollector
from glassbox.processes.api_server.shown_metrics import ShownMetrics, install
from glassbox.processes.exporter.http import HttpServer
from glassbox.store.exporter_status import ExporterStatus, write_status
from glassbox.store.merge import merge
from glassbox.store.snapshot import write_snapshot
from glassbox.web.app import make_app
from tests.export_samples import OWNER, logged, make_snapshot, write_config
from tests.prometheus_server import PROMETHEUS, PrometheusServer
from tests.waiting import require_within, seconds_of, wait_for

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def config(**prometheus: object) -> GlassboxConfig:
    return GlassboxConfig.model_validate({"export": {"prometheus": {"max_series": 100_000, **prometheus}}})


def registry_of(run_dir: Path, settings: Callable[[], GlassboxConfig]) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(PrometheusCollector(FamilySource(run_dir, settings)))
    return registry


def samples(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def exposition(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    write_snapshot(directory, make_snapshot())
    write_snapshot(directory, make_snapshot(seed=5, engine="1"))
    return directory


class TestExposition:
    def test_one_histogram_line_by_line(self, tmp_path: Path) -> None:
        """Buckets are cumulative, +Inf equals the count, help and type come first."""
        snapshot = make_snapshot(model_name="m")
        column = INDEX["top1_ratio"]
        snapshot.counts[:] = 0
        snapshot.sums[:] = 0
        snapshot.counts[0, :, 1, column, :3] = [[1, 2, 3], [0, 1, 0]]
        snapshot.counts[1, 1, 1, column, 11] = 4
        snapshot.sums[:, :, 1, column] = [[0.25, 0.5], [0.0, 4.0]]
        write_snapshot(tmp_path, snapshot)
        text = exposition(registry_of(tmp_path, lambda: config(detail="model")))
        lines = [line for line in text.splitlines() if "top1_ratio" in line and 'phase="prefill"' not in line]
        labels = 'engine="0",model_name="m",phase="decode"'
        bounds = [
            '"0.01"',
            '"0.05"',
            '"0.1"',
            '"0.2"',
            '"0.3"',
            '"0.4"',
            '"0.5"',
            '"0.6"',
            '"0.8"',
            '"0.9"',
            '"0.99"',
            '"+Inf"',
        ]
        cumulative = [1, 4, 7, 7, 7, 7, 7, 7, 7, 7, 7, 11]
        assert lines == [
            f"# HELP glassbox_attention_top1_ratio {STATISTICS[column].meaning}",
            "# TYPE glassbox_attention_top1_ratio histogram",
            *(
                f"glassbox_attention_top1_ratio_bucket{{{labels.replace(',', f',le={le},', 1)}}} {float(n)}"
                for le, n in zip(bounds, cumulative, strict=True)
            ),
            f"glassbox_attention_top1_ratio_count{{{labels}}} 11.0",
            f"glassbox_attention_top1_ratio_sum{{{labels}}} 4.75",
        ]

    def test_types_of_all_metrics(self, run_dir: Path) -> None:
        """Histograms, counters and gauges are declared as such; no other metric is shown."""
        text = exposition(registry_of(run_dir, config))
        types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
        histograms = {statistic.metric for statistic in STATISTICS if statistic.exported}
        histograms.add("glassbox_attention_output_error_ratio")
        assert {name for name, kind in types.items() if kind == "histogram"} == histograms
        assert {name for name, kind in types.items() if kind == "counter"} == {
            "glassbox_attention_rows_total",
            "glassbox_attention_nonfinite_rows_total",
            "glassbox_steps_total",
            "glassbox_sampled_steps_total",
            "glassbox_dropped_rows_total",
            "glassbox_errors_total",
            "glassbox_overhead_seconds_total",
            "glassbox_traced_requests_total",
            "glassbox_trace_refused_total",
            "glassbox_traces_dropped_total",
            "glassbox_trace_skipped_steps_total",
            "glassbox_canary_rows_total",
        }
        assert {name for name, kind in types.items() if kind == "gauge"} == {
            "glassbox_worker_info",
            "glassbox_attention_max_logit_window_max",
            "glassbox_attention_output_error_worst_ratio",
            "glassbox_kv_cache_quantization_error_ratio",
            "glassbox_kv_cache_saturated_ratio",
            "glassbox_layers_certified",
            "glassbox_sample_rate",
            "glassbox_layers_observed",
            "glassbox_layers_bypassed",
            "glassbox_watched_requests_delay_seconds",
            "glassbox_traced_requests_active",
            "glassbox_start_seconds",
            "glassbox_build_info",
            "glassbox_config_last_reload_successful",
            "glassbox_config_last_reload_timestamp_seconds",
        }
        assert len(types) == len(histograms) + 27

    def test_signed_histograms_have_buckets_only(self, run_dir: Path) -> None:
        """max_logit has neither _sum nor _count, the others have both."""
        names = {name for name, _ in samples(exposition(registry_of(run_dir, config)))}
        assert {name for name in names if name.startswith("glassbox_attention_max_logit_")} == {
            "glassbox_attention_max_logit_bucket",
            "glassbox_attention_max_logit_window_max",
        }
        assert {"glassbox_attention_sink_ratio_sum", "glassbox_attention_sink_ratio_count"} <= names

    def test_label_values_are_escaped(self, tmp_path: Path) -> None:
        """A model's path may hold anything."""
        name = 'C:\\models\\"x"\n'
        write_snapshot(tmp_path, make_snapshot(model_name=name))
        found = samples(exposition(registry_of(tmp_path, config)))
        assert {dict(labels)["model_name"] for _, labels in found} == {name}


class TestCollector:
    def test_registering_reads_nothing(self, tmp_path: Path) -> None:
        """A registry asks each collector for its names: that must not touch the run directory."""
        registry = CollectorRegistry(auto_describe=True)
        source = FamilySource(tmp_path / "none", lambda: pytest.fail("the configuration was asked for"))
        collector = PrometheusCollector(source)
        registry.register(collector)
        assert collector.describe() == []

    def test_a_new_snapshot_is_in_the_next_scrape(self, run_dir: Path) -> None:
        """Values are those of the files at the moment of the scrape."""
        registry = registry_of(run_dir, config)
        labels = {"model_name": "tiny/model", "engine": "0"}
        assert registry.get_sample_value("glassbox_steps_total", labels) == 1000
        write_snapshot(run_dir, make_snapshot(steps=1234))
        assert registry.get_sample_value("glassbox_steps_total", labels) == 1234

    def test_a_vanished_directory_shows_nothing(self, run_dir: Path) -> None:
        """When the server's directory goes, its series go."""
        registry = registry_of(run_dir, config)
        assert samples(exposition(registry))
        shutil.rmtree(run_dir)
        assert exposition(registry) == ""

    def test_garbage_is_counted_and_the_rest_shown(self, run_dir: Path) -> None:
        """An unreadable file appears in glassbox_errors_total."""
        (run_dir / "worker-0-9-bad.npz").write_bytes(b"garbage")
        registry = registry_of(run_dir, config)
        labels = {"model_name": "tiny/model", "engine": "0", "stage": "snapshot"}
        assert registry.get_sample_value("glassbox_errors_total", labels) == 1
        assert registry.get_sample_value("glassbox_steps_total", {"model_name": "tiny/model", "engine": "1"}) == 1000

    def test_a_failing_scrape_shows_the_last_good_one(self, tmp_path: Path) -> None:
        """Whatever happens, vLLM's own metrics must not go down with glassbox's; the error is counted."""
        run_dir = tmp_path / "run"
        write_snapshot(run_dir, make_snapshot())
        registry = registry_of(run_dir, config)
        good = exposition(registry)
        saved = tmp_path / "saved"
        run_dir.rename(saved)
        run_dir.write_text("not a directory")
        assert exposition(registry) == good
        run_dir.unlink()
        saved.rename(run_dir)
        labels = {"model_name": "tiny/model", "engine": "0", "stage": "prometheus"}
        assert registry.get_sample_value("glassbox_errors_total", labels) == 1

    def test_errors_of_the_exporter_are_shown(self, run_dir: Path) -> None:
        """The exporter process writes its errors down; they are added to the first engine."""
        write_status(run_dir, ExporterStatus(1, 1.0, {"otel": 3}))
        registry = registry_of(run_dir, config)
        labels = {"model_name": "tiny/model", "stage": "otel"}
        assert registry.get_sample_value("glassbox_errors_total", {**labels, "engine": "0"}) == 3
        assert registry.get_sample_value("glassbox_errors_total", {**labels, "engine": "1"}) is None

    def test_too_fine_a_detail_warns_once(self, run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The fallback is logged at the first scrape, not at each."""
        caplog.set_level("WARNING", logger="glassbox")
        registry = registry_of(run_dir, lambda: config(detail="head", max_series=1000))
        for steps in (1, 2):
            write_snapshot(run_dir, make_snapshot(steps=steps))
            found = samples(exposition(registry))
        rows = [dict(labels) for name, labels in found if name == "glassbox_attention_rows_total"]
        assert [False] * 8 == ["head" in labels for labels in rows]
        assert sum("max_series is 1000" in message for message in logged(caplog.records)) == 1

    def test_a_large_model_is_collected_in_milliseconds(self, tmp_path: Path) -> None:
        """8 ranks of 80 layers: the first scrape within two seconds, one without news within 10 ms."""
        for rank in range(8):
            snapshot = make_snapshot(
                seed=rank, layers=tuple(range(80)), heads=8, head_offset=8 * rank, total_heads=64, rank=rank
            )
            write_snapshot(tmp_path, snapshot)

        def first() -> float:
            nonlocal collector
            collector = PrometheusCollector(FamilySource(tmp_path, config))
            began_s = time.perf_counter()
            count = sum(len(metric.samples) for metric in collector.collect())
            took_s = time.perf_counter() - began_s
            assert count > 17_000
            return took_s

        collector: PrometheusCollector
        require_within(2.0, first)
        require_within(0.01, lambda: seconds_of(collector.collect, time.perf_counter), attempts=50)


class TestInstall:
    def test_beside_others_and_away_again(self, run_dir: Path, tmp_path: Path) -> None:
        """The metrics are shown with those of the registry; after `remove`, the registry is as before."""
        registry = CollectorRegistry(auto_describe=True)
        Counter("vllm:requests", "Others.", registry=registry).inc()
        before = exposition(registry)
        path = write_config(tmp_path / "g.yaml", prometheus={"max_series": 100_000})
        undo = ShownMetrics(ConfigFile(path, load_config(path)), run_dir).show_in(registry)
        assert "vllm:requests_total" in exposition(registry)
        assert "glassbox_steps_total" in exposition(registry)
        undo()
        undo()
        assert exposition(registry) == before

    def test_beside_the_files_of_several_api_servers(self, run_dir: Path, tmp_path: Path) -> None:
        """What is of the moment comes with what lies in the files; taken back, the collector is as before."""
        original = MultiProcessCollector.collect
        (tmp_path / "multiproc").mkdir()
        undo = install(ShownMetrics(config, run_dir))
        try:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(tmp_path / "multiproc"))
            shown = {name for name, _ in samples(exposition(registry))}
        finally:
            undo()
        assert shown == {"glassbox_snapshot_age_seconds", "glassbox_export_interval_seconds"}
        assert MultiProcessCollector.collect is original

    def test_servers_that_share_a_run_directory(self, run_dir: Path) -> None:
        """Each shows its own engines, and one of them the exporter's errors: together everything once."""
        write_status(run_dir, ExporterStatus(1, 1.0, {"otel": 3}))
        whole = registry_of(run_dir, config)
        shares = []
        for engine in ("0", "1"):
            shown = ShownMetrics(config, run_dir)
            shown.limit_to(lambda engine=engine: frozenset({engine}))  # type: ignore[misc]
            registry = CollectorRegistry()
            shown.show_in(registry)
            shares.append(samples(exposition(registry)))
        of_the_server = {("glassbox_export_interval_seconds", frozenset())}
        assert shares[0].keys() & shares[1].keys() == of_the_server
        ages = {key for key in {**shares[0], **shares[1]} if key[0] == "glassbox_snapshot_age_seconds"}
        assert {dict(labels)["engine"] for _, labels in ages} == {"0", "1"}
        together = {key: value for key, value in {**shares[0], **shares[1]}.items() if key not in of_the_server | ages}
        assert together == samples(exposition(whole))

    def test_engines_may_come_and_go(self, run_dir: Path) -> None:
        """Elastic scaling: what a server serves is asked at each scrape, whether snapshots changed or not."""
        served: list[frozenset[str] | None] = [frozenset({"0"})]
        shown = ShownMetrics(config, run_dir)
        shown.limit_to(lambda: served[0])
        registry = CollectorRegistry()
        shown.show_in(registry)
        steps = {"model_name": "tiny/model", "engine": "1"}
        assert registry.get_sample_value("glassbox_steps_total", steps) is None
        served[0] = frozenset({"0", "1"})
        assert registry.get_sample_value("glassbox_steps_total", steps) == 1000

    def test_edits_take_effect_at_the_next_scrape(self, run_dir: Path, tmp_path: Path) -> None:
        """Detail and `enabled` are live; a bad edit keeps the last good configuration."""
        path = write_config(tmp_path / "g.yaml", prometheus={"detail": "model"})
        registry = CollectorRegistry()
        ShownMetrics(ConfigFile(path, load_config(path)), run_dir).show_in(registry)
        assert 'layer="0",model_name="tiny/model",phase=' not in exposition(registry)
        write_config(path, prometheus={"detail": "layer"})
        assert 'layer="0",model_name="tiny/model",phase=' in exposition(registry)
        path.write_text("export: {prometheus: {detail: everything}}")
        assert 'layer="0",model_name="tiny/model",phase=' in exposition(registry)
        write_config(path, prometheus={"enabled": False})
        assert exposition(registry) == ""

    def test_a_missing_file_keeps_the_configuration(self, tmp_path: Path) -> None:
        """While an editor replaces the file it may be gone for a moment."""
        path = write_config(tmp_path / "g.yaml", interval_s=7)
        current = ConfigFile(path)
        assert current().export.interval_s == 7
        path.unlink()
        assert current().export.interval_s == 7


class TestMultiprocess:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        path = tmp_path / "multiproc"
        path.mkdir()
        return path

    @staticmethod
    def read(directory: Path) -> str:
        class Collector(MultiProcessCollector):
            def collect(self) -> list[Metric]:
                return without_lone_counts(super().collect())

        registry = CollectorRegistry()
        Collector(registry, str(directory))
        return exposition(registry)

    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_the_same_exposition_as_the_collector(self, run_dir: Path, directory: Path, detail: str) -> None:
        """Every line is the same: samples, help and types."""
        source = FamilySource(run_dir, lambda: config(detail=detail))
        MultiprocessWriter(directory, OWNER).write(source.view().families, 5.0)
        expected = exposition(registry_of(run_dir, lambda: config(detail=detail)))
        assert sorted(self.read(directory).splitlines()) == sorted(expected.splitlines())

    def test_three_files_with_the_owners_name(self, run_dir: Path, directory: Path) -> None:
        """One file per kind, whichever process writes, and no temporary file; none is left at the end."""
        writer = MultiprocessWriter(directory, OWNER)
        writer.write(FamilySource(run_dir, config).view().families, 5.0)
        assert sorted(path.name for path in directory.iterdir()) == [
            f".glassbox-{OWNER}.lock",
            f"counter_glassbox-{OWNER}.db",
            f"gauge_mostrecent_glassbox-{OWNER}.db",
            f"histogram_glassbox-{OWNER}.db",
        ]
        writer.close()
        assert list(directory.iterdir()) == []

    def test_values_change_in_place(self, directory: Path) -> None:
        """New values of the same series do not replace the files."""
        writer = MultiprocessWriter(directory, OWNER)
        inodes = []
        for steps in (1, 2):
            writer.write(build_families(merge([make_snapshot(steps=steps)]), "layer"), float(steps))
            inodes.append({path.name: path.stat().st_ino for path in directory.iterdir()})
        assert inodes[0] == inodes[1]
        assert 'glassbox_steps_total{engine="0",model_name="tiny/model"} 2.0' in self.read(directory)

    def test_series_that_are_gone_disappear(self, directory: Path) -> None:
        """After a change of detail no series of the old one is left."""
        writer = MultiprocessWriter(directory, OWNER)
        engines = merge([make_snapshot()])
        of_head, of_layer = ('head="1",layer="0",model_name="tiny/model",phase=', 'engine="0",layer="0",model_name=')
        writer.write(build_families(engines, "head"), 1.0)
        assert of_head in self.read(directory)
        writer.write(build_families(engines, "layer"), 2.0)
        assert of_head not in self.read(directory)
        assert of_layer + '"tiny/model",phase=' in self.read(directory)
        writer.write(build_families(engines, "model"), 3.0)
        assert of_layer + '"tiny/model",phase=' not in self.read(directory)
        writer.write([], 4.0)
        assert self.read(directory) == ""

    def test_a_removed_file_is_written_again(self, directory: Path) -> None:
        """Whoever cleans the directory does not silence glassbox."""
        writer = MultiprocessWriter(directory, OWNER)
        families = build_families(merge([make_snapshot()]), "model")
        writer.write(families, 1.0)
        for path in directory.iterdir():
            path.unlink()
        writer.write(families, 2.0)
        assert "glassbox_steps_total" in self.read(directory)

    def test_a_missing_directory_is_an_os_error(self, tmp_path: Path) -> None:
        """At shutdown vLLM removes its directory; the caller is told."""
        with pytest.raises(FileNotFoundError):
            MultiprocessWriter(tmp_path / "none", OWNER).write(build_families(merge([make_snapshot()]), "model"), 1.0)

    def test_a_full_disk_is_an_os_error_and_keeps_the_old_values(self, tmp_path: Path) -> None:
        """Not a bus error, which would kill the process."""
        mount = tmp_path / "tiny"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a tmpfs needs privileges that this user does not have")
        try:
            writer = MultiprocessWriter(mount, OWNER)
            writer.write(build_families(merge([make_snapshot()]), "model"), 1.0)
            large = build_families(merge([make_snapshot(layers=tuple(range(80)), steps=9)]), "layer")
            with pytest.raises(OSError, match="No space left"):
                writer.write(large, 2.0)
            assert "glassbox_attention_entropy_ratio_bucket" in self.read(mount)
            assert not list(mount.glob(".*.tmp"))
            writer.close()
        finally:
            subprocess.run(["umount", str(mount)], check=True)


@pytest.fixture
def server(run_dir: Path) -> Iterator[HttpServer]:
    source = FamilySource(run_dir, config)
    app = make_app(source, metrics=[PrometheusCollector(source)])
    server = HttpServer(0, app, "127.0.0.1")
    yield server
    server.close()


class TestOwnPort:
    def test_it_serves_the_same_text(self, run_dir: Path, server: HttpServer) -> None:
        """GET /metrics is the exposition of the collector."""
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
            assert answer.read().decode() == exposition(registry_of(run_dir, config))
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")

    def test_openmetrics_is_served_to_who_asks_for_it(self, run_dir: Path, server: HttpServer) -> None:
        """By the Accept header, as Prometheus sends it."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            assert answer.read() == generate_openmetrics(registry_of(run_dir, config))

    def test_a_taken_port_is_an_os_error(self, run_dir: Path, server: HttpServer) -> None:
        """The caller counts it and tries again."""
        with pytest.raises(OSError, match="Address already in use"):
            HttpServer(server.port, make_app(FamilySource(run_dir, config)), "127.0.0.1")

    def test_closing_frees_the_port(self, run_dir: Path) -> None:
        """After `close` nobody listens, and the port can be opened again at once."""
        first = HttpServer(0, make_app(FamilySource(run_dir, config)), "127.0.0.1")
        first.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", first.port), timeout=60)
        second = HttpServer(first.port, make_app(FamilySource(run_dir, config)), "127.0.0.1")
        second.close()

    @pytest.mark.e2e
    def test_a_real_prometheus_reads_the_same_numbers(self, run_dir: Path, server: HttpServer, tmp_path: Path) -> None:
        """Every sample of the exposition is in the server's database with its value."""
        if PROMETHEUS is None:
            pytest.skip("prometheus is not on PATH (Debian package prometheus)")
        expected = samples(exposition(registry_of(run_dir, config)))
        extra = {"job", "instance"}
        # A scrape may take as long as the time to the next one, and one that is too late hides what came before.
        with PrometheusServer(tmp_path, [f"127.0.0.1:{server.port}"], interval_s=3) as prometheus:

            def read() -> Series:
                return {
                    (name, frozenset(pair for pair in labels if pair[0] not in extra)): value
                    for name in {name for name, _ in expected}
                    for labels, value in prometheus.query(name).items()
                }

            prometheus.wait_for("glassbox_steps_total")
            found = wait_for(read, lambda found: found == expected, 60.0, "the same numbers")
            rate = prometheus.query("histogram_quantile(0.5, sum by (le) (glassbox_attention_max_logit_bucket))")
        assert found == expected
        assert not math.isnan(next(iter(rate.values())))
