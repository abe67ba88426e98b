"""Captured pages of a real server: what they count is what is foreseen, and a fleet of them is made of real numbers."""

import re
from typing import Any

import pytest

pytest.importorskip("grafana_foundation_sdk", reason="needs the extra dashboards")

from prometheus_client.parser import text_string_to_metric_families

from glassbox.cli.dashboards import check
from glassbox.cli.dashboards.rules import alerts, build_groups, recordings
from glassbox.export.families import series_count
from tests.bench.bench_fleet import KEEPS, WRITES, page_path, snippet
from tests.fleet import FleetPage, read_page

SHAPE = (9,) * 30  # of the captured model
NOW_S = 2e9
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(page: str) -> Samples:
    """Value by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def kept(configs: list[dict[str, Any]], series: dict[str, str]) -> bool:
    """Whether Prometheus' relabelling keeps a series; those actions that the snippets have."""
    labels = dict(series)
    for config in configs:
        value = ";".join(labels.get(name, "") for name in config.get("source_labels", ()))
        action = config.get("action", "replace")
        if action == "labeldrop":
            labels = {name: text for name, text in labels.items() if not re.fullmatch(config["regex"], name)}
        elif re.fullmatch(config["regex"], value):
            if action == "drop":
                return False
            labels[config["target_label"]] = config["replacement"]
    assert labels == series
    return True


@pytest.fixture(scope="module")
def page() -> str:
    """Of the default detail."""
    return read_page(page_path("layer"))


class TestCapturedPages:
    @pytest.mark.parametrize("detail", ["model", "layer"])
    def test_a_real_page_has_as_many_series_as_foreseen(self, detail: Any) -> None:
        """What `glassbox check` says of the attention's metrics, of a server that has measured everything."""
        names = [name for name, _ in parsed(read_page(page_path(detail)))]
        attention = [name for name in names if name.startswith(("glassbox_attention_", "glassbox_kv_cache_"))]
        assert series_count(detail, SHAPE) == len(attention)

    def test_at_detail_head_only_windows_without_rows_are_missing(self) -> None:
        """A head's largest logit of the window is shown while there is one."""
        names = [name for name, _ in parsed(read_page(page_path("head")))]
        attention = [name for name in names if name.startswith(("glassbox_attention_", "glassbox_kv_cache_"))]
        without = [name for name in attention if name != "glassbox_attention_max_logit_window_max"]
        assert series_count("head", SHAPE) - 2 * sum(SHAPE) == len(without)


class TestFleetPage:
    def test_every_server_has_the_captured_series(self, page: str) -> None:
        """No more, no less, and numbers of its own."""
        fleet, captured = FleetPage(page), parsed(page)
        first, second = (parsed(fleet.at(server, 0, NOW_S).decode()) for server in (0, 1))
        assert captured.keys() == first.keys() == second.keys()
        assert len(captured) == fleet.samples
        differ = sum(first[key] != second[key] for key in captured)
        assert differ > 3000

    def test_counters_rise_and_buckets_stay_cumulative(self, page: str) -> None:
        """Over twenty scrapes; where the captured page has rows in a bucket, the rate is not 0."""
        fleet = FleetPage(page)
        before, after = (parsed(fleet.at(3, scrape, NOW_S).decode()) for scrape in (0, 20))
        entropy = "glassbox_attention_entropy_ratio"
        ladders: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
        rising = 0
        for (name, labels), value in after.items():
            if name == f"{entropy}_bucket":
                place = frozenset(label for label in labels if label[0] != "le")
                ladders.setdefault(place, []).append((float(dict(labels)["le"]), value))
            if name.startswith(entropy):
                assert before[name, labels] <= value
                rising += before[name, labels] < value
        assert rising > 400
        assert 60 == len(ladders)
        for place, ladder in ladders.items():
            values = [value for _, value in sorted(ladder)]
            assert values == sorted(values)
            assert values[-1] == after[f"{entropy}_count", place]

    def test_points_in_time_are_recent(self, page: str) -> None:
        """A sink that worked when the page was captured works in the fleet: no alert about it fires."""
        success = "glassbox_sink_last_success_timestamp_seconds"
        values = [
            value for (name, _), value in parsed(FleetPage(page).at(0, 5, NOW_S).decode()).items() if name == success
        ]
        assert values
        assert all(NOW_S - 60 < value <= NOW_S for value in values)


class TestSnippets:
    """What docs/performance.md tells operators of many servers to drop."""

    def test_rules_keep_what_they_ask_for(self, page: str) -> None:
        """Of every selector of every rule all series; of the rest most buckets go."""
        configs = snippet(KEEPS["rules"])
        series = [{"__name__": name, **dict(labels)} for name, labels in parsed(page)]
        left = [one for one in series if kept(configs, one)]
        groups = build_groups()
        asked = {
            name
            for rule in (*recordings(groups), *alerts(groups))
            for name, _ in check.selectors(rule.expr)
            if not name.endswith("_bucket")
        }
        assert [one for one in series if one["__name__"] in asked] == [one for one in left if one["__name__"] in asked]
        cut = re.findall(r'(\w+_bucket)\{le="([^"]+)"\}', " ".join(rule.expr for rule in recordings(groups)))
        assert 3 == len(cut)
        buckets = [
            (one["__name__"], one["le"])
            for one in left
            if one["__name__"].startswith("glassbox_attention_") and "le" in one
        ]
        assert set(cut) == set(buckets)
        assert 4 * len(left) < len(series)

    def test_what_is_written_has_the_recorded_series(self, page: str) -> None:
        """And all but raw attention."""
        configs = snippet(WRITES["recorded"])
        for rule in recordings(build_groups()):
            assert kept(configs, {"__name__": rule.record})
        series = [{"__name__": name} for name, _ in parsed(page)]
        assert {"attention"} == {one["__name__"].split("_")[1] for one in series if not kept(configs, one)}
