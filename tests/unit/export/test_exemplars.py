"""Exemplars: a row that really fell into the bucket, of the newest request, within OpenMetrics' limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from glassbox.config.load import GlassboxConfig
from glassbox.core.statistics import INDEX, NUM_STATISTICS, STATISTICS
from glassbox.export import exemplars as exemplars_module
from glassbox.export.exemplars import MAX_LABEL_CHARS, Exemplar, TraceExemplars, collect, labels_of
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import PrometheusCollector
from glassbox.store.llm_spans import write
from glassbox.store.merge import Detail
from glassbox.store.score_files import ScoreFiles, StoredScores
from glassbox.store.score_totals import ScoreTotals, write_totals
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import RequestTrace, write_trace
from tests.export_samples import make_snapshot
from tests.trace_samples import make_trace
from tests.unit.store.test_llm_spans import make_span


def found(
    traces: Sequence[RequestTrace], detail: Detail = "layer"
) -> dict[tuple[str, tuple[str, ...]], list[Exemplar | None]]:
    return collect([(trace, {"request_id": trace.request_id}) for trace in traces], detail, 1000.0)


class TestCollect:
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_every_one_is_a_row_of_its_place_and_bucket(self, detail: Detail) -> None:
        """Against the trace itself: a value of that phase, layer and head, within the bucket's bounds."""
        trace = make_trace()
        exemplars = found([trace], detail)
        assert exemplars
        for (metric, labels), buckets in exemplars.items():
            statistic = next(one for one in STATISTICS if one.metric == metric)
            assert ("tiny/model", "0") == labels[:2]
            values = trace.stats[trace.phases == ("prefill", "decode").index(labels[2]), ..., INDEX[statistic.name]]
            if detail != "model":
                values = values[:, trace.layers.index(int(labels[3]))]
            if detail == "head":
                values = values[:, trace.heads.index(int(labels[4]))]
            edges = [-np.inf, *statistic.buckets, np.inf]
            for i, exemplar in enumerate(buckets):
                inside = values[(values > edges[i]) & (values <= edges[i + 1])]
                assert (exemplar is None) == (inside.size == 0)
                if exemplar is not None:
                    assert exemplar.value in inside.tolist()

    def test_the_newest_request_wins(self) -> None:
        """The first one given; an older one only where that has no row. Active requests are as of now."""
        new, old = make_trace(seed=2, request_id="new", status="active", end_time_s=None), make_trace(request_id="old")
        exemplars = [one for buckets in found([new, old]).values() for one in buckets if one is not None]
        alone = [one for buckets in found([new]).values() for one in buckets if one is not None]
        assert len(alone) == sum(one.labels["request_id"] == "new" for one in exemplars)
        assert {1000.0, old.end_time_s} == {one.time_s for one in exemplars}

    def test_there_is_a_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of all of them together."""
        monkeypatch.setattr(exemplars_module, "MAX_EXEMPLARS", 10)
        shown = [one for buckets in found([make_trace()], "head").values() for one in buckets if one is not None]
        assert 10 == len(shown)

    def test_rows_without_a_value(self) -> None:
        """NaN and rows with scores that aren't finite are never shown."""
        trace = make_trace()
        stats = trace.stats.copy()
        stats[..., INDEX["entropy_ratio"]] = np.nan
        stats[2:, ..., NUM_STATISTICS] = 1
        exemplars = found([make_trace(stats=stats)])
        assert {key[1][2] for key in exemplars} == {"prefill"}
        assert not [key for key in exemplars if "entropy" in key[0]]


class TestLabels:
    def test_all(self) -> None:
        """An id of vLLM's own length and the ids of its span fit."""
        request_id = f"chatcmpl-{'f' * 32}"
        labels = labels_of(make_trace(request_id=request_id), ("a" * 32, "b" * 16))
        assert {"request_id": request_id, "trace_id": "a" * 32, "span_id": "b" * 16} == labels

    @pytest.mark.parametrize("length", [40, 60, 100, 118])
    def test_there_is_a_limit(self, length: int) -> None:
        """128 characters for names and values: the span goes first, then the trace."""
        labels = labels_of(make_trace(request_id="x" * length), ("a" * 32, "b" * 16))
        assert labels is not None
        assert MAX_LABEL_CHARS >= sum(map(len, (*labels, *labels.values())))
        assert "request_id" in labels

    @pytest.mark.parametrize("request_id", ["", "x" * 119, "é", "a\nb", 'a"b', "a\\b", "\ud800"])
    def test_ids_that_cannot_be_shown(self, request_id: str) -> None:
        """Too long, or nothing that every reader can read: no exemplar of that request."""
        assert labels_of(make_trace(request_id=request_id), None) is None


class TestExposition:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        write_snapshot(tmp_path, make_snapshot(layers=(0, 3), heads=3))
        write_trace(traces_path(tmp_path), make_trace(request_id="mine [1]"))
        return tmp_path

    def registry(self, run_dir: Path, with_exemplars: bool = True) -> CollectorRegistry:
        registry = CollectorRegistry()
        source = FamilySource(run_dir, GlassboxConfig)
        registry.register(PrometheusCollector(source, TraceExemplars(run_dir) if with_exemplars else None))
        return registry

    def exemplars(self, run_dir: Path) -> list[Any]:
        text = generate_openmetrics(self.registry(run_dir)).decode()
        families = text_string_to_metric_families(text)
        return [(s.name, s.labels, s.exemplar) for family in families for s in family.samples if s.exemplar]

    def test_openmetrics(self, run_dir: Path) -> None:
        """prometheus_client's strict parser reads them, on buckets alone, with the client's trace and span."""
        shown = self.exemplars(run_dir)
        assert shown
        for name, _, exemplar in shown:
            assert name.endswith("_bucket")
            assert {
                "request_id": "mine [1]",
                "trace_id": "0af7651916cd43dd8448eb211c80319c",
                "span_id": "b7ad6b7169203331",
            } == exemplar.labels
            assert 1_700_000_002.5 == float(exemplar.timestamp)

    def test_vllms_own_span(self, run_dir: Path) -> None:
        """If vLLM has made a span for the request, that is the one to go to."""
        write(run_dir, make_span(7, "mine [1]"))
        (_, _, exemplar), *_ = self.exemplars(run_dir)
        assert (f"{7:032x}", f"{7:016x}") == (exemplar.labels["trace_id"], exemplar.labels["span_id"])

    def test_ids_that_must_not_be_told(self, run_dir: Path) -> None:
        """Then there is a trace's id alone, and nothing of a request without one; an edit takes them away at once."""
        named = True
        exemplars = TraceExemplars(run_dir, lambda: 100.0, names_requests=lambda: named)

        def labels() -> set[frozenset[str]]:
            shown = [one for buckets in exemplars.current("layer").values() for one in buckets if one is not None]
            return {frozenset(one.labels) for one in shown}

        assert {frozenset({"request_id", "trace_id", "span_id"})} == labels()
        named = False
        assert set() == labels()
        write_trace(traces_path(run_dir), make_trace(seed=2, request_id="theirs", traceparent=None))
        exemplars = TraceExemplars(run_dir, lambda: 100.0, names_requests=lambda: named)
        assert {frozenset({"trace_id", "span_id"})} == labels()

    def test_the_text_format_has_none(self, run_dir: Path) -> None:
        """What Prometheus's text format shows is the same with and without."""
        with_exemplars = generate_latest(self.registry(run_dir))
        assert generate_latest(self.registry(run_dir, with_exemplars=False)) == with_exemplars

    def test_they_follow_the_traces(self, run_dir: Path) -> None:
        """A new trace replaces the exemplars without a new snapshot, some seconds later at most."""
        now = 100.0
        exemplars = TraceExemplars(run_dir, lambda: now)
        before = exemplars.current("layer")
        assert before is exemplars.current("layer")
        write_trace(traces_path(run_dir), make_trace(seed=9, request_id="newer"))
        assert before is exemplars.current("layer")
        now += 5
        after = exemplars.current("layer")
        ids = {one.labels["request_id"] for buckets in after.values() for one in buckets if one is not None}
        assert "newer" in ids


class TestScores:
    def test_the_newest_request_of_a_bucket(self, tmp_path: Path) -> None:
        """Of each probe, once the exporter has scored it; the page that a strict parser reads has them."""
        write_snapshot(tmp_path, make_snapshot())
        registry = CollectorRegistry()
        exemplars = TraceExemplars(tmp_path, clock=iter(range(0, 1000, 10)).__next__)
        registry.register(PrometheusCollector(FamilySource(tmp_path, GlassboxConfig), exemplars))
        totals, files = ScoreTotals(1.0, ("drift",)), ScoreFiles(tmp_path)
        for seed, score in ((1, 0.31), (2, 0.34), (3, 0.97)):
            trace = make_trace(seed=seed, request_id=f"cmpl-{seed}-0")
            write_trace(traces_path(tmp_path), trace)
            totals.engine(("tiny/model", "0")).probe("drift").add(score)
        write_totals(tmp_path, totals)
        assert {} == self.shown(registry)
        for seed, score in ((1, 0.31), (2, 0.34), (3, 0.97)):
            summary = {"probes": {"drift": {"score": score}}, "signals": {}}
            files.write(("0", f"cmpl-{seed}-0-{seed:08x}", None), StoredScores(summary))
        assert {"0.4": ("cmpl-2-0", 0.34), "+Inf": ("cmpl-3-0", 0.97)} == self.shown(registry)

    def shown(self, registry: CollectorRegistry) -> dict[str, tuple[str, float]]:
        text = generate_openmetrics(registry).decode()
        return {
            sample.labels["le"]: (sample.exemplar.labels["request_id"], sample.exemplar.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if family.name == "glassbox_probe_score" and sample.exemplar
        }
