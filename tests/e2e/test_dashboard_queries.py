"""Every expression of every panel and rule, asked of a real Prometheus that scrapes a real served model."""

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

pytest.importorskip("grafana_foundation_sdk", reason="needs the extra dashboards")

from glassbox.cli.dashboards import adapter_panels, check, generated, heads, probe_panels
from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.dashboards.rules import alerts, build_groups, recordings, to_data
from glassbox.signals.baseline import from_engines, save_baseline
from glassbox.store.merge import merge
from glassbox.store.snapshot import read_snapshots
from tests.prometheus_server import PrometheusServer
from tests.serving import require_tool, wait_for

if TYPE_CHECKING:
    from tests.serving import GlassboxServer

pytestmark = pytest.mark.e2e

WINDOW_S: Final = 20
# Some ten thousand series take an API server that shares two cores more than two seconds.
SCRAPE_S: Final = 4
# Grafana's variables, all of them set to "All"; a comparison with some seconds ago instead of a day.
VALUES: Final = {
    "$__rate_interval": f"{WINDOW_S}s",
    "$baseline": "6s",
    "$job": ".+",
    "$instance": ".+",
    "$model_name": ".+",
    "$engine": ".+",
    "$phase": "decode",
}
# Panels that may be empty on a healthy server, and why.
MAY_BE_EMPTY: Final = {
    "Alerts firing": "no alert fires",
    "Alerts": "no alert fires",
    "Engines with an alert": "no alert fires",
    "Engines with an old configuration": "the configuration is valid",
    "Errors": "the series of a stage begins with its first error",
    "Errors by stage": "the series of a stage begins with its first error",
    "Dropped rows by reason": "the series of a reason begins with its first dropped row",
    "Layers with non-finite rows": "only layers that have some are listed",
    "Layers by certification": "only reasons that layers have are shown",
    "Wrong layers": "no layer is wrong",
    "Where non-finite rows begin": "no score is NaN",
    "Largest cache error": "the cache is not quantised",
    "Largest saturated share": "the cache is not quantised",
    "KV cache error by layers": "the cache is not quantised",
    "KV cache saturation by layers": "the cache is not quantised",
    "Configuration reloads": "the annotation marks a change of the last seconds",
    "Actions by rule and outcome": "there is no rule",
    **{str(panel.title): "LoRA adapters are not told apart" for panel in adapter_panels.adapters()},
    **{str(panel.title): "there is no probe, and nobody asks for a signal" for panel in probe_panels.scores()},
}
# Alerts that can't be made to fire by other numbers: a fault is needed.
NEEDS_A_FAULT: Final = {
    "NonFiniteRows": "no score is NaN",
    "ConfigReloadFailed": "the configuration is valid",
    "NotSampling": "rows are measured",
    "NothingObserved": "layers are observed",
    "Errors": "there are none",
    "OutputWrong": "no layer is wrong",
    "NotCertified": "every layer was reproduced",
    "KvCacheQuantization": "the cache is not quantised",
    "ExporterDown": "it works",
}
SHORT: Final = RuleSettings(
    window=f"{WINDOW_S}s",
    window_interval="1s",
    history="1m",
    history_offset="2s",
    history_interval="1s",
    min_history=3,
    min_rows=10,
    sampling_window=f"{WINDOW_S}s",
    hold=dict.fromkeys(RuleSettings().hold, "1s"),
)
# Any traffic meets these conditions: an alert that still has no data asks for something that isn't there.
EAGER: Final = replace(
    SHORT,
    entropy_factor=1e9,
    entropy_floor=-1.0,
    sink_factor=1e9,
    sink_floor=-1.0,
    logit_factor=-1e9,
    logit_floor=-1e9,
    logit_limit_share=-1.0,
    saturation_rise=-2.0,
    lookback_factor=1e9,
    drift_psi=-1.0,
    overhead_budget=-1.0,
    stale_s=-1e9,
)

# Panels ask for what the shipped rules record; the shortened ones have other windows in their names.
RECORDED: Final = {
    shipped.record: short.record
    for shipped, short in zip(recordings(build_groups()), recordings(build_groups(SHORT)), strict=True)
}


@contextmanager
def traffic(server: "GlassboxServer") -> Iterator[None]:
    """The same request again and again, until the block ends.

    It pauses as long as an answer took: Prometheus needs its share of the two cores that CI has.
    """
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            began = time.monotonic()
            server.complete("Once upon a time there was a small red fox that lived in a deep dark forest and", 16)
            ended.wait(time.monotonic() - began)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(120)


def values_of(prometheus: PrometheusServer, expression: str) -> list[float]:
    """Values of the answer that are numbers; an error of Prometheus raises."""
    answer = prometheus.query(check.plain(expression, {**VALUES, **RECORDED}))
    return [value for value in answer.values() if not math.isnan(value)]


def without_data(prometheus: PrometheusServer, asked: Mapping[str, str]) -> set[str]:
    """Names of the expressions whose answer is empty (or nothing but NaN)."""
    return {where for where, expression in asked.items() if not values_of(prometheus, expression)}


def wait_until_complete(prometheus: PrometheusServer, asked: Mapping[str, str], may_be_empty: set[str]) -> set[str]:
    """Ask until everything that should have data has some, or two minutes are over; returns what is empty then."""
    try:
        return wait_for(lambda: without_data(prometheus, asked), lambda empty: empty <= may_be_empty, timeout_s=120)
    except pytest.fail.Exception:
        return without_data(prometheus, asked)


def set_detail(server: "GlassboxServer", detail: str) -> None:
    """Show that detail, and drift from what the server has measured up to now."""
    if not (server.metric("glassbox_attention_rows_total") or 0):
        server.complete("Once upon a time there was a small red fox", 8)
        server.settled_rows()
    path = server.folder / "baseline.npz"
    save_baseline(path, from_engines(merge(read_snapshots(server.run_dir)), "the server of the tests"))
    server.edit_config(
        baseline={"path": str(path), "min_rows": 1, "window_s": WINDOW_S},
        export={"interval_s": 1, "prometheus": {"detail": detail, "max_series": 200_000}},
    )
    server.metrics()  # an old server's recent rows are those after the first look at them


def dashboard_expressions() -> dict[str, str]:
    """By "dashboard / panel target"."""
    return {
        where: expression for board in generated.dashboards().values() for where, expression in check.expressions(board)
    }


def title(where: str) -> str:
    """Of the panel or annotation."""
    return where.split(" / ", 2)[2].removeprefix("annotation ").removesuffix(" A").removesuffix(" B").removesuffix(" C")


class TestQueries:
    def test_every_expression_has_data(self, server: "GlassboxServer", tmp_path: Path) -> None:
        """At detail head all panels and recording rules have data, and each alert fires once its numbers allow it."""
        require_tool("prometheus", "prometheus")
        rules = tmp_path / "rules.yaml"
        groups = build_groups(SHORT)
        rules.write_text(generated.rules_yaml(groups, SHORT))
        set_detail(server, "head")
        asked = dashboard_expressions()
        asked |= {f"rule {rule.title}": rule.title for rule in recordings(groups)}
        eager = {rule.name: rule for rule in alerts(build_groups(EAGER))}
        asked |= {f"alert {name}": rule.expr for name, rule in eager.items()}
        allowed = {where for where in asked if " / " in where and title(where) in MAY_BE_EMPTY}
        allowed |= {f"alert {name}" for name in NEEDS_A_FAULT}
        targets = [f"127.0.0.1:{server.port}"]
        with (
            PrometheusServer(tmp_path, targets, interval_s=SCRAPE_S, rule_files=[rules]) as prometheus,
            traffic(server),
        ):
            prometheus.wait_for('glassbox_attention_entropy_ratio_count{head!=""}', timeout_s=120)
            empty = wait_until_complete(prometheus, asked, allowed)
            assert set() == {f"{where}: {asked[where]}" for where in empty - allowed}
            firing = {dict(labels)["alertname"] for labels in prometheus.query('ALERTS{alertstate="firing"}')}
        # Every step is measured here, on a CPU, and the baseline had other requests; nothing else is wrong.
        assert {"GlassboxOverheadAboveBudget", "GlassboxDrift"} >= firing

    @pytest.mark.parametrize("detail", ["layer", "model"])
    def test_at_coarser_details_only_heads_is_empty(
        self, server: "GlassboxServer", tmp_path: Path, detail: str
    ) -> None:
        """Without rules Overview and Requests have data; every panel of Heads is empty, its text is shown instead."""
        require_tool("prometheus", "prometheus")
        set_detail(server, detail)
        asked = dashboard_expressions()
        of_heads = {where for where in asked if where.startswith(heads.page().title) and "annotation" not in where}
        allowed = of_heads | {where for where in asked if title(where) in MAY_BE_EMPTY}
        allowed |= {where for where, expression in asked.items() if any(name in expression for name in RECORDED)}
        with PrometheusServer(tmp_path, [f"127.0.0.1:{server.port}"], interval_s=2) as prometheus, traffic(server):
            prometheus.wait_for("glassbox_attention_entropy_ratio_count", timeout_s=120)
            empty = wait_until_complete(prometheus, asked, allowed)
        assert set() == {f"{where}: {asked[where]}" for where in empty - allowed}
        assert of_heads <= empty

    def test_real_metrics_have_the_labels_that_the_check_believes_in(self, server: "GlassboxServer") -> None:
        """`--check` knows names and labels from the tables; a served model at detail head has exactly these."""
        set_detail(server, "head")
        server.complete("The quick brown fox", 4)
        server.wait_metric("glassbox_attention_rows_total", bool, head="0")
        server.wait_metric("glassbox_attention_drift_psi", lambda index: index is not None, head="0")
        known = check.known_series(build_groups())
        seen = {
            sample.name: frozenset(sample.labels)
            for family in server.metrics()
            for sample in family.samples
            if sample.name.startswith("glassbox_")
        }
        assert 30 < len(seen)
        assert {name: known[name] - {"job", "instance"} for name in seen} == seen
        # Without what there is of rules, adapters, an exporter or probes alone.
        others = ("actions_", "adapter_", "exporter_", "sink_", "probe_", "signal_", "scoring_")
        needs_an_event = {
            "glassbox_errors_total",
            "glassbox_dropped_rows_total",
            "glassbox_attention_output_wrong",
            "glassbox_nonfinite_first_layer",
            "glassbox_kv_cache_quantization_error_ratio",
            "glassbox_kv_cache_saturated_ratio",
        } | {name for name in known if name.startswith(tuple(f"glassbox_{other}" for other in others))}
        expected = {name for name in known if name.startswith("glassbox_")} - needs_an_event
        assert expected <= seen.keys()


class TestRuleFile:
    def test_shortened_rules_are_the_same_rules(self) -> None:
        """What is tried here in seconds differs from what is shipped in numbers only."""
        shipped, short = (to_data(build_groups(settings), settings)["groups"] for settings in (RuleSettings(), SHORT))
        assert [group["name"] for group in shipped] == [group["name"] for group in short]
        assert [len(group["rules"]) for group in shipped] == [len(group["rules"]) for group in short]  # type: ignore[arg-type]
