"""The dashboard Fleet over real pages in a real Prometheus: one of five servers has lost its sink."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import pytest

pytest.importorskip("grafana_foundation_sdk", reason="needs the extra dashboards")

from glassbox.cli.dashboards import check, fleet, generated
from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.dashboards.rules import build_groups, recordings
from tests.bench.bench_fleet import page_path
from tests.fleet import Fleet, FleetPage, read_page
from tests.prometheus_server import PrometheusServer
from tests.serving import require_tool, wait_for

WINDOW_S: Final = 10
SHORT: Final = replace(RuleSettings(), window=f"{WINDOW_S}s", window_interval="1s", min_rows=10)
RECORDED: Final = {
    shipped.record: short.record
    for shipped, short in zip(recordings(build_groups()), recordings(build_groups(SHORT)), strict=True)
}
VALUES: Final = {"$__rate_interval": f"{WINDOW_S}s", **dict.fromkeys(("$job", "$instance", "$model_name"), ".+")}
ODD: Final = "odd:8000"
# Empty while all is well.
NEEDS_A_FAULT: Final = {"Alerts", "Engines with an alert", "Engines with an old configuration"}


def without_sink(page: str) -> str:
    """The page of a server whose rows give their first tokens a fifth of what they gave."""
    return re.sub(
        r"^(glassbox_attention_sink_ratio_sum\{.*\}) (.+)$",
        lambda found: f"{found[1]} {0.2 * float(found[2])}",
        page,
        flags=re.MULTILINE,
    )


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """Scrapes four servers and the odd one, with the shipped rules over shorter windows."""
    require_tool("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    rules = folder / "rules.yaml"
    rules.write_text(generated.rules_yaml(build_groups(SHORT), SHORT))
    page = read_page(page_path("layer"))
    with Fleet(FleetPage(page), 4).serving() as healthy, Fleet(FleetPage(without_sink(page)), 1).serving() as broken:
        (odd,) = broken.targets()
        odd["labels"]["instance"] = ODD
        job = {"job_name": "vllm", "static_configs": [*healthy.targets(), odd]}
        with PrometheusServer(folder, [], interval_s=2, rule_files=[rules], scrape_configs=[job]) as server:
            record = RECORDED["engine_layer_phase:glassbox_attention_sink_ratio:mean10m"]
            engines = f"count(count by (instance) ({record}))"
            wait_for(lambda: server.query(engines), lambda found: list(found.values()) == [5], 120, "five engines")
            yield server


def ask(prometheus: PrometheusServer, title: str) -> dict[str, float]:
    """What a panel's query finds, by instance."""
    board = generated.dashboards()[fleet.UID]
    (expression,) = (asked for where, asked in check.expressions(board) if where == f"{board['title']} / {title} A")
    found = prometheus.query(check.plain(expression, {**RECORDED, **VALUES, "$engine": ".+"}))
    values: dict[str, float] = {}
    for labels, value in found.items():
        values.setdefault(dict(labels).get("instance", ""), value)
    return values


class TestFleet:
    @pytest.mark.parametrize(
        "panel", list(check.panels(generated.dashboards()[fleet.UID])), ids=lambda panel: panel["title"]
    )
    def test_every_panel_has_data(self, prometheus: PrometheusServer, panel: dict[str, str]) -> None:
        """But for those that are empty while all is well."""
        assert bool(ask(prometheus, panel["title"])) == (panel["title"] not in NEEDS_A_FAULT)

    def test_the_odd_one_is_found(self, prometheus: PrometheusServer) -> None:
        """It has less sink than the five have on average, 0.2 of 0.84; nothing else of it is odd."""
        sink = ask(prometheus, "Least sink against the others")
        assert 5 == len(sink)
        assert min(sink, key=lambda instance: sink[instance]) == ODD
        assert sink[ODD] == pytest.approx(0.2 / 0.84, abs=0.02)
        entropy = ask(prometheus, "Least entropy against the others")
        assert {instance: pytest.approx(1.0, abs=0.02) for instance in sink} == entropy

    def test_tiles_count_engines(self, prometheus: PrometheusServer) -> None:
        """Five, all of which have rows."""
        assert {"": 5.0} == ask(prometheus, "Engines") == ask(prometheus, "Engines with enough rows")
