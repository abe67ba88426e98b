"""The rules in a real promtool: what fires, what must not, and that each alert has its runbook."""

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("grafana_foundation_sdk", reason="needs the extra dashboards")

from glassbox.cli.dashboards import check, generated
from glassbox.cli.dashboards.rule_model import RuleSettings
from glassbox.cli.dashboards.rules import alerts, build_groups, recordings, to_data
from glassbox.core.counters import DROP_REASONS
from glassbox.core.statistics import INDEX, STATISTICS
from tests.serving import require_tool

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / generated.RULES_PATH
GROUPS = build_groups()
ALERTS = alerts(GROUPS)
SECTIONS = ["What it means", "How to confirm", "Likely causes", "What to do"]
HEALTHY_MIN = 140  # more than an hour of history besides the hour that is left out
FAULT_MIN = 45  # longer than a window and the longest patience


@dataclass(frozen=True)
class Traffic:
    """What a layer (per phase) and its engine show; per minute where it is a counter."""

    rows: float = 200.0
    entropy: float = 0.4
    sink: float = 0.6
    lookback: float = 0.3
    saturated: float = 0.2
    over_limit: float = 0.0
    max_logit: float = 12.0
    drift: float = 0.1
    drift_by_length: float = 0.1
    nonfinite: float = 0.0
    steps: float = 100.0
    sampled: float = 1.0
    sample_rate: float = 0.01
    overhead_s: float = 0.1
    reload_ok: float = 1.0
    layers: float = 2.0
    unproved: float = 0.0
    canary: float = 20.0
    failed: float = 0.0
    kv_error: float = 0.026
    kv_saturated: float = 0.001
    age: float = 9.0
    exporter: float = 1.0
    encoders: float = 0.0
    others: float = 2.0


HEALTHY = Traffic()
INTERVAL = Traffic(age=5.0)  # of the exports, seconds


@dataclass(frozen=True)
class Span:
    """Some minutes of the same traffic; at the beginning of one with `restart` all counters are 0 again."""

    minutes: int
    traffic: Traffic = HEALTHY
    restart: bool = False


def _counter(spans: list[Span], name: str) -> str:
    value, values = 0.0, []
    for span in spans:
        if span.restart:
            value = 0.0
        for _ in range(span.minutes):
            values.append(f"{value:g}")
            value = round(value + _per_minute(span.traffic, name), 6)
    return " ".join(values)


def _per_minute(traffic: Traffic, name: str) -> float:
    t = traffic
    return {
        "rows": t.rows,
        "entropy": t.rows * t.entropy,
        "sink": t.rows * t.sink,
        "lookback": t.rows * t.lookback,
        "not_saturated": t.rows * (1 - t.saturated),
        "within_limit": t.rows * (1 - t.over_limit),
        "nonfinite": t.nonfinite,
        "steps": t.steps,
        "sampled": t.sampled,
        "overhead": t.overhead_s,
        "canary": t.canary,
        "failed": t.failed,
    }[name]


def _gauge(spans: list[Span], name: str) -> str:
    return " ".join(f"{getattr(span.traffic, name):g}" for span in spans for _ in range(span.minutes))


def engine_series(spans: list[Span], *, instance: str = "a:8000", start_min: int = 0) -> list[dict[str, str]]:
    """All series of one engine with two layers: layer 0 stays healthy, layer 1 follows the spans."""
    skip = f"_x{start_min} " if start_min else ""
    engine = f'job="vllm", instance="{instance}", model_name="tiny/model", engine="0"'
    series: list[dict[str, str]] = []

    def add(name: str, labels: str, values: str) -> None:
        series.append({"series": f"{name}{{{labels}}}", "values": skip + values})

    quiet = [Span(s.minutes, replace(HEALTHY, rows=s.traffic.rows), s.restart) for s in spans]
    for layer, mine in (("0", quiet), ("1", spans)):
        for phase in ("prefill", "decode"):
            labels = f'{engine}, phase="{phase}", layer="{layer}"'
            a = "glassbox_attention"
            for statistic in ("entropy", "sink"):
                add(f"{a}_{statistic}_ratio_sum", labels, _counter(mine, statistic))
                add(f"{a}_{statistic}_ratio_count", labels, _counter(mine, "rows"))
            if phase == "decode":
                add(f"{a}_lookback_ratio_sum", labels, _counter(spans, "lookback"))
                add(f"{a}_lookback_ratio_count", labels, _counter(mine, "rows"))
            add(f"{a}_top1_ratio_bucket", f'{labels}, le="0.99"', _counter(mine, "not_saturated"))
            add(f"{a}_top1_ratio_count", labels, _counter(mine, "rows"))
            add(f"{a}_max_logit_bucket", f'{labels}, le="100.0"', _counter(mine, "within_limit"))
            add(f"{a}_max_logit_bucket", f'{labels}, le="+Inf"', _counter(mine, "rows"))
            add(f"{a}_max_logit_window_max", labels, _gauge(mine, "max_logit"))
            for statistic, name in (("sink_ratio", "drift"), ("distance_tokens", "drift_by_length")):
                add(f"{a}_drift_psi", f'{labels}, statistic="{statistic}"', _gauge(mine, name))
            add(f"{a}_rows_total", labels, _counter(mine, "rows"))
            add(f"{a}_nonfinite_rows_total", labels, _counter(mine, "nonfinite"))
        for tensor in ("key", "value"):
            labels = f'{engine}, layer="{layer}", tensor="{tensor}"'
            add("glassbox_kv_cache_quantization_error_ratio", labels, _gauge(mine, "kv_error"))
            add("glassbox_kv_cache_saturated_ratio", labels, _gauge(mine, "kv_saturated"))
    add("glassbox_steps_total", engine, _counter(spans, "steps"))
    add("glassbox_sampled_steps_total", engine, _counter(spans, "sampled"))
    add("glassbox_overhead_seconds_total", engine, _counter(spans, "overhead"))
    add("glassbox_sample_rate", engine, _gauge(spans, "sample_rate"))
    add("glassbox_layers_observed", engine, _gauge(spans, "layers"))
    add("glassbox_layers_bypassed", f'{engine}, reason="cache_type"', _gauge(spans, "others"))
    add("glassbox_layers_bypassed", f'{engine}, reason="encoder"', _gauge(spans, "encoders"))
    add("glassbox_layers_bypassed", f'{engine}, reason="not_reproduced"', _gauge(spans, "unproved"))
    add("glassbox_canary_rows_total", f'{engine}, result="reproduced"', _counter(spans, "canary"))
    add("glassbox_canary_rows_total", f'{engine}, result="failed"', _counter(spans, "failed"))
    add("glassbox_config_last_reload_successful", engine, _gauge(spans, "reload_ok"))
    add("glassbox_snapshot_age_seconds", f'{engine}, rank="0", host="gpu-0", layers="0-1"', _gauge(spans, "age"))
    server = f'job="vllm", instance="{instance}"'
    add("glassbox_export_interval_seconds", server, _gauge([Span(s.minutes, INTERVAL) for s in spans], "age"))
    add("glassbox_exporter_up", server, _gauge(spans, "exporter"))
    return series


def fault(**changes: float) -> list[Span]:
    """A healthy engine that changes."""
    return [Span(HEALTHY_MIN), Span(FAULT_MIN, replace(HEALTHY, **changes))]


def promtool_test(tmp_path: Path, series: list[dict[str, str]], firing: dict[int, list[str]]) -> None:
    """At each minute exactly those alerts fire; each may for both phases."""
    tests = [
        {
            "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": f'{{alertname="Glassbox{name}"}}', "value": 1} for name in names],
        }
        for minute, names in firing.items()
    ]
    run_promtool(tmp_path, {"interval": "1m", "input_series": series, "promql_expr_test": tests})


def run_promtool(tmp_path: Path, test: dict[str, Any], rules: Path = RULES) -> None:
    """One test of `promtool test rules`; fails with what promtool says."""
    promtool = require_tool("promtool", "prometheus")
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr


END_MIN = HEALTHY_MIN + FAULT_MIN - 1


class TestFires:
    """Each fault, in one of two layers, fires its alert and nothing else."""

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"nonfinite": 0.2}, ["NonFiniteRows"]),
            ({"entropy": 0.15}, ["EntropyCollapse"]),
            ({"sink": 0.1}, ["SinkLost"]),
            ({"max_logit": 60.0}, ["LogitGrowth"]),
            ({"max_logit": 150.0, "over_limit": 0.05}, ["LogitGrowth", "LogitLimit"]),
            ({"saturated": 0.6}, ["Saturation"]),
            ({"lookback": 0.1}, ["LookbackLow"]),
            ({"drift": 0.6}, ["Drift"]),
            ({"reload_ok": 0.0}, ["ConfigReloadFailed"]),
            ({"rows": 0.0, "sampled": 0.0}, ["NotSampling"]),
            ({"layers": 0.0}, ["NothingObserved"]),
            ({"layers": 0.0, "rows": 0.0, "sampled": 0.0}, ["NothingObserved"]),
            ({"layers": 0.0, "sample_rate": 0.0}, []),
            ({"layers": 0.0, "rows": 0.0, "sampled": 0.0, "others": 0.0, "encoders": 12.0}, []),
            ({"age": 80.0}, ["SnapshotStale"]),
            ({"age": 74.0}, []),
            ({"exporter": 0.0}, ["ExporterDown"]),
            ({"overhead_s": 1.2}, ["OverheadAboveBudget"]),
            ({"failed": 4.0}, ["OutputWrong"]),
            ({"unproved": 1.0}, ["NotCertified"]),
            ({"kv_error": 0.2}, ["KvCacheQuantization"]),
            ({"kv_saturated": 0.02}, ["KvCacheQuantization"]),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, list) else "",
    )
    def test_fault(self, tmp_path: Path, changes: dict[str, float], expected: list[str]) -> None:
        """After an hour of it."""
        promtool_test(tmp_path, engine_series(fault(**changes)), {HEALTHY_MIN: [], END_MIN: expected})

    def test_silence_is_told_although_scrapes_are_missed(self, tmp_path: Path) -> None:
        """As on a machine that has too much to do: every other scrape fails, which ends the series each time."""
        server = 'job="vllm", instance="a:8000"'
        engine = f'{server}, model_name="tiny/model", engine="0", rank="0", host="gpu-0", layers="0-1"'
        values = {
            f"glassbox_snapshot_age_seconds{{{engine}}}": 80,
            f"glassbox_export_interval_seconds{{{server}}}": 5,
            f"glassbox_exporter_up{{{server}}}": 0,
        }
        series = [{"series": name, "values": " ".join([f"{value} stale"] * 10)} for name, value in values.items()]
        promtool_test(
            tmp_path, series, {1: [], 10: ["SnapshotStale", "ExporterDown"], 11: ["SnapshotStale", "ExporterDown"]}
        )

    def test_first_error_fires_though_it_brings_the_series(self, tmp_path: Path) -> None:
        """One error of a stage that had none: the series begins with 1 and never increases."""
        error = (
            'glassbox_errors_total{job="vllm", instance="a:8000", model_name="tiny/model", engine="0", stage="otel"}'
        )
        series = engine_series([Span(END_MIN)])
        series.append({"series": error, "values": f"_x{HEALTHY_MIN} 1x{FAULT_MIN}"})
        promtool_test(tmp_path, series, {HEALTHY_MIN + 8: ["Errors"], END_MIN - 10: []})

    def test_broken_rollout_fires_on_an_instance_without_history(self, tmp_path: Path) -> None:
        """The new pod is compared with those that served the model before."""
        old = engine_series([Span(HEALTHY_MIN)])
        broken = engine_series(
            [Span(FAULT_MIN, replace(HEALTHY, entropy=0.1))], instance="b:8000", start_min=HEALTHY_MIN
        )
        promtool_test(tmp_path, [*old, *broken], {END_MIN: ["EntropyCollapse"]})

    def test_an_absolute_limit_needs_no_history(self, tmp_path: Path) -> None:
        """The first server of a new model fires after minutes."""
        series = engine_series([Span(30, replace(HEALTHY, over_limit=0.5, max_logit=500.0))])
        promtool_test(tmp_path, series, {29: ["LogitLimit"]})

    def test_drift_needs_no_history_and_counts_layers_not_heads(self, tmp_path: Path) -> None:
        """The first server of a model, at detail head: two heads of layer 1 and one of layer 4 are two layers."""
        where = 'job="vllm", instance="a:8000", model_name="tiny/model", engine="0", phase="decode"'
        series = [
            {
                "series": "glassbox_attention_drift_psi"
                f'{{{where}, statistic="{name}", layer="{layer}", head="{head}"}}',
                "values": f"{value}x30",
            }
            for layer, head, name, value in (
                (1, 0, "sink_ratio", 0.7),
                (1, 5, "entropy_ratio", 9.0),
                (4, 2, "top1_ratio", 0.6),
                (5, 2, "max_logit", 0.2),
                (6, 2, "distance_tokens", 4.0),
            )
        ]
        expected = [{"labels": f"{{{where}}}", "value": 2}]
        rule = next(alert for alert in ALERTS if alert.name == "Drift")
        count = {"expr": rule.expr, "eval_time": "20m", "exp_samples": expected}
        fires = {
            "expr": 'group by (alertname, severity) (ALERTS{alertstate="firing"})',
            "eval_time": "12m",
            "exp_samples": [{"labels": '{alertname="GlassboxDrift", severity="warning"}', "value": 1}],
        }
        silent = {**fires, "eval_time": "8m", "exp_samples": []}
        tests = {"interval": "1m", "input_series": series, "promql_expr_test": [count, fires, silent]}
        run_promtool(tmp_path, tests)

    def test_alert_tells_what_where_and_what_to_read(self, tmp_path: Path) -> None:
        """Labels and annotations of a firing alert, templates filled in."""
        where = {"job": "vllm", "instance": "a:8000", "model_name": "tiny/model", "engine": "0"}
        expected = [
            {
                "exp_labels": {**where, "phase": phase, "severity": "critical"},
                "exp_annotations": {
                    "summary": f"Attention entropy collapsed in tiny/model, engine 0 at a:8000 ({phase})",
                    "description": "The mean entropy of a layer is below 0.5 times its mean of the last 1d. "
                    "Layers concerned: 1.",
                    "runbook_url": "docs/runbooks/GlassboxEntropyCollapse.md",
                },
            }
            for phase in ("decode", "prefill")
        ]
        check_at = {"eval_time": f"{END_MIN}m", "alertname": "GlassboxEntropyCollapse", "exp_alerts": expected}
        series = engine_series(fault(entropy=0.1))
        run_promtool(tmp_path, {"interval": "1m", "input_series": series, "alert_rule_test": [check_at]})


ENGINE = {"job": "vllm", "instance": "a:8000", "model_name": "tiny/model", "engine": "0"}


def series_of(metric: str, values: str, **labels: str) -> dict[str, str]:
    """One series of the engine."""
    inside = ", ".join(f'{name}="{value}"' for name, value in {**ENGINE, **labels}.items())
    return {"series": f"{metric}{{{inside}}}", "values": values}


class TestNamesTheWorker:
    """Alerts that tell which rank of which host is concerned, and which layers: looked up when they fire."""

    def fires(
        self, tmp_path: Path, name: str, series: list[dict[str, str]], minute: int, *found: dict[str, Any]
    ) -> None:
        """Exactly these fire; each has its own labels, `summary` and the end of its `description`."""
        rule = next(alert for alert in ALERTS if alert.name == name)
        expected = [
            {
                "exp_labels": {**ENGINE, "severity": rule.severity, **one["labels"]},
                "exp_annotations": {
                    "summary": one["summary"],
                    "description": f"{rule.when} {one['description']}",
                    "runbook_url": rule.runbook,
                },
            }
            for one in found
        ]
        check_at = {"eval_time": f"{minute}m", "alertname": rule.title, "exp_alerts": expected}
        run_promtool(tmp_path, {"interval": "1m", "input_series": series, "alert_rule_test": [check_at]})

    def test_wrong_output(self, tmp_path: Path) -> None:
        """One alert per worker, however many layers; it stays until the worker is restarted, as the series does."""

        def wrong(layer: int, head: int, rank: int, ratio: str) -> dict[str, str]:
            labels = {"layer": str(layer), "head": str(head), "rank": str(rank), "host": f"gpu-{rank}"}
            return series_of("glassbox_attention_output_wrong", f"_x10 {ratio}x40", **labels)

        series = [wrong(3, 1, 0, "2.5"), wrong(7, 0, 1, "4"), wrong(9, 2, 1, "30"), wrong(11, 2, 1, "1.5")]
        series += [wrong(12, 5, 1, "99"), series_of("glassbox_canary_rows_total", "0x10 8x40", result="failed")]
        where = "Attention is computed wrongly in tiny/model, engine 0 at a:8000"
        first = {
            "labels": {"rank": "0", "host": "gpu-0"},
            "summary": f"{where}, rank 0 on gpu-0",
            "description": "Layers of rank 0 on gpu-0: 1, the worst: "
            "layer 3, head 1 (2.5 times what rounding explains).",
        }
        second = {
            "labels": {"rank": "1", "host": "gpu-1"},
            "summary": f"{where}, rank 1 on gpu-1",
            "description": "Layers of rank 1 on gpu-1: 4, the worst: "
            "layer 12, head 5 (99 times what rounding explains). layer 9, head 2 (30 times what rounding explains). "
            "layer 7, head 0 (4 times what rounding explains).",
        }
        self.fires(tmp_path, "OutputWrong", series, 13, first, second)
        self.fires(tmp_path, "OutputWrong", series, 45, first, second)

    def test_rows_that_failed_on_a_worker_that_is_gone(self, tmp_path: Path) -> None:
        """It was restarted before anybody saw which layer it was."""
        rows = series_of("glassbox_canary_rows_total", "0x10 10x40", result="failed")
        found = {
            "labels": {},
            "summary": "Attention is computed wrongly in tiny/model, engine 0 at a:8000",
            "description": "Rows: 10.",
        }
        self.fires(tmp_path, "OutputWrong", [rows], 14, found)
        self.fires(tmp_path, "OutputWrong", [rows], 30)

    def test_non_finite_rows(self, tmp_path: Path) -> None:
        """The lowest layer first: the others have it from there. Without the series the alert is as it was."""
        rows = series_of("glassbox_attention_nonfinite_rows_total", "0+1x40", phase="decode")
        origins = [
            series_of("glassbox_nonfinite_first_layer", f"{layer}x40", rank=str(rank), host="gpu-7")
            for rank, layer in enumerate((6, 5))
        ]
        found = {
            "labels": {"phase": "decode"},
            "summary": "NaN or infinite attention scores in tiny/model, engine 0 at a:8000 (decode)",
            "description": "Rows: 10.",
        }
        self.fires(tmp_path, "NonFiniteRows", [rows], 20, found)
        one = {**found, "description": "Rows: 10. First in layer 5, rank 1 on gpu-7."}
        self.fires(tmp_path, "NonFiniteRows", [rows, origins[1]], 20, one)
        two = {**one, "description": f"{one['description']} First in layer 6, rank 0 on gpu-7."}
        self.fires(tmp_path, "NonFiniteRows", [rows, *origins[:2]], 20, two)

    def test_what_the_cache_loses(self, tmp_path: Path) -> None:
        """Per tensor: how many layers, and the largest of each number."""
        series = [
            series_of(f"glassbox_kv_cache_{name}_ratio", f"{value}x40", tensor=tensor, layer=layer)
            for name, tensor, layer, value in (
                ("quantization_error", "key", "3", 0.4),
                ("quantization_error", "key", "4", 0.2),
                ("quantization_error", "value", "4", 0.03),
                ("saturated", "key", "3", 0.25),
                ("saturated", "key", "5", 0.02),
                ("saturated", "value", "4", 0.002),
            )
        ]
        found = {
            "labels": {"tensor": "key"},
            "summary": "The KV cache loses too much of the keys in tiny/model, engine 0 at a:8000",
            "description": "Layers concerned: 3. Largest error: 40%, layer 3. Largest saturated share: 25%, layer 3.",
        }
        self.fires(tmp_path, "KvCacheQuantization", series, 20, found)
        self.fires(tmp_path, "KvCacheQuantization", series, 10)

    def test_what_was_not_reproduced(self, tmp_path: Path) -> None:
        """By reason; layers that can't be observed for another one are no news."""
        series = [
            series_of("glassbox_layers_bypassed", f"{layers}x40", reason=reason)
            for reason, layers in (("not_reproduced", 0), ("not_certified", 28), ("backend", 4))
        ]
        series.append(series_of("glassbox_steps_total", "0+60x40"))
        found = {
            "labels": {"reason": "not_certified"},
            "summary": "glassbox could not reproduce layers of tiny/model, engine 0 at a:8000, and does not show them",
            "description": "Layers: 28 (not_certified).",
        }
        self.fires(tmp_path, "NotCertified", series, 30, found)

    def test_an_idle_engine_has_nothing_to_check(self, tmp_path: Path) -> None:
        """Its layers wait for the first rows."""
        series = [
            series_of("glassbox_layers_bypassed", "28x60", reason="not_certified"),
            series_of("glassbox_steps_total", "3x60"),
        ]
        self.fires(tmp_path, "NotCertified", series, 50)


class TestSilence:
    """Of the exporter's sinks, whose last success is a point in time: promtool's clock begins at 0."""

    SERVER = 'job="vllm", instance="a:8000"'

    def series(self, *, interval_s: int, up: int | str, otel: str) -> list[dict[str, str]]:
        """A server whose sink `jsonl` works, and `otel` as told."""
        return [
            {"series": f"glassbox_export_interval_seconds{{{self.SERVER}}}", "values": f"{interval_s}x60"},
            {"series": f"glassbox_exporter_up{{{self.SERVER}}}", "values": up if isinstance(up, str) else f"{up}x60"},
            {
                "series": f'glassbox_sink_last_success_timestamp_seconds{{{self.SERVER}, sink="jsonl"}}',
                "values": "0+60x60",
            },
            {"series": f'glassbox_sink_last_success_timestamp_seconds{{{self.SERVER}, sink="otel"}}', "values": otel},
        ]

    @pytest.mark.parametrize(
        ("interval_s", "up", "otel", "firing"),
        [
            (5, 1, "0+60x60", {}),
            (5, 1, "0+60x20 1200x40", {20: [], 26: [], 28: ["SinkFailing"]}),
            (5, 1, "0x60", {6: [], 8: ["SinkFailing"]}),
            (600, 1, "0x60", {30: [], 38: ["SinkFailing"]}),
            (5, 0, "0+60x20 1200x40", {40: ["ExporterDown"]}),
            (5, "1x20" + " 0 1" * 20, "0+60x20 1200x40", {20: [], 28: ["SinkFailing"], 40: ["SinkFailing"]}),
        ],
        ids=["works", "stops", "never", "long interval", "dead exporter", "one that comes and goes"],
    )
    def test_a_sink(
        self, tmp_path: Path, interval_s: int, up: int | str, otel: str, firing: dict[int, list[str]]
    ) -> None:
        """Beyond three intervals and a minute; of a dead exporter only that is told."""
        promtool_test(tmp_path, self.series(interval_s=interval_s, up=up, otel=otel), firing or {55: []})

    def test_the_text_names_the_sink(self, tmp_path: Path) -> None:
        """It has no engine: a server's exporter speaks for all of them."""
        rule = next(alert for alert in ALERTS if alert.name == "SinkFailing")
        expected = {
            "exp_labels": {"job": "vllm", "instance": "a:8000", "sink": "otel", "severity": "warning"},
            "exp_annotations": {
                "summary": "glassbox can't export to otel at a:8000",
                "description": rule.when,
                "runbook_url": rule.runbook,
            },
        }
        check_at = {"eval_time": "20m", "alertname": rule.title, "exp_alerts": [expected]}
        series = self.series(interval_s=5, up=1, otel="0x60")
        run_promtool(tmp_path, {"interval": "1m", "input_series": series, "alert_rule_test": [check_at]})


class TestStaysSilent:
    """What looks like a fault and is none."""

    def test_healthy_traffic(self, tmp_path: Path) -> None:
        """Three hours of it."""
        promtool_test(tmp_path, engine_series([Span(END_MIN + 1)]), {END_MIN: []})

    def test_restart(self, tmp_path: Path) -> None:
        """All counters begin again at 0, that of old non-finite rows as well."""
        spans = [Span(30, replace(HEALTHY, nonfinite=1.0)), Span(HEALTHY_MIN), Span(30, restart=True)]
        minutes = (31, 33, 35, 45, 55)
        promtool_test(tmp_path, engine_series(spans), {HEALTHY_MIN + minute: [] for minute in minutes})

    def test_few_rows_prove_nothing(self, tmp_path: Path) -> None:
        """The same collapse in 5 rows a minute."""
        spans = fault(rows=5.0, entropy=0.05, sink=0.05, lookback=0.01, saturated=1.0, over_limit=0.5)
        promtool_test(tmp_path, engine_series(spans), {END_MIN: []})

    def test_no_history_no_comparison(self, tmp_path: Path) -> None:
        """A model that has been served for less than two hours, whose numbers then change."""
        odd = replace(HEALTHY, entropy=0.06, sink=0.01, lookback=0.02, saturated=0.9, max_logit=80.0)
        spans = [Span(60), Span(FAULT_MIN, odd)]
        promtool_test(tmp_path, engine_series(spans), {60 + FAULT_MIN - 1: []})

    def test_drift_that_is_no_news(self, tmp_path: Path) -> None:
        """A change that is less than major for the worst of many heads, and one that longer prompts alone make."""
        spans = fault(drift=0.45, drift_by_length=5.0)
        promtool_test(tmp_path, engine_series(spans), {END_MIN: []})

    def test_a_blip_is_over_before_anybody_is_called(self, tmp_path: Path) -> None:
        """Eight minutes of collapse, lost sink, saturation and overhead, then healthy again."""
        odd = replace(HEALTHY, entropy=0.01, sink=0.01, saturated=0.9, lookback=0.01, overhead_s=2.0, drift=5.0)
        spans = [Span(HEALTHY_MIN), Span(8, odd), Span(30)]
        minutes = range(HEALTHY_MIN, HEALTHY_MIN + 34, 3)
        promtool_test(tmp_path, engine_series(spans), {minute: [] for minute in minutes})

    def test_a_layer_that_always_looked_at_one_key_cannot_collapse(self, tmp_path: Path) -> None:
        """Entropy 0.03 that becomes 0.01, a sink of 0.05 that becomes 0.01."""
        low = replace(HEALTHY, entropy=0.03, sink=0.05)
        spans = [Span(HEALTHY_MIN, low), Span(FAULT_MIN, replace(low, entropy=0.01, sink=0.01))]
        promtool_test(tmp_path, engine_series(spans), {END_MIN: []})

    def test_small_logits_may_grow(self, tmp_path: Path) -> None:
        """From 5 to 20 is far from where it hurts."""
        spans = [Span(HEALTHY_MIN, replace(HEALTHY, max_logit=5.0)), Span(FAULT_MIN, replace(HEALTHY, max_logit=20.0))]
        promtool_test(tmp_path, engine_series(spans), {END_MIN: []})

    @pytest.mark.parametrize(
        "changes",
        [{"rows": 0.0, "sampled": 0.0, "sample_rate": 0.0}, {"rows": 0.0, "sampled": 0.0, "steps": 0.0}],
        ids=["sample rate 0", "idle"],
    )
    def test_nothing_to_measure(self, tmp_path: Path, changes: dict[str, float]) -> None:
        """Sampling is switched off, or nobody sends requests."""
        promtool_test(tmp_path, engine_series(fault(**changes)), {END_MIN: []})

    def test_a_server_that_went_away(self, tmp_path: Path) -> None:
        """Its series end; other alerts than these tell that."""
        promtool_test(tmp_path, engine_series([Span(HEALTHY_MIN)]), {END_MIN: []})


class TestManyServers:
    """What is read for each layer of each server."""

    def test_history_is_of_the_model(self, tmp_path: Path) -> None:
        """The mean over servers and time, without a server that has too few rows to say anything."""
        spans = {"a:8000": replace(HEALTHY, entropy=0.2), "b:8000": replace(HEALTHY, entropy=0.6)}
        spans["idle:8000"] = replace(HEALTHY, entropy=0.9, rows=50.0)
        series = [
            one
            for instance, traffic in spans.items()
            for one in engine_series([Span(HEALTHY_MIN, traffic)], instance=instance)
        ]
        record = "model_layer_phase:glassbox_attention_entropy_ratio:mean10m"
        where = 'job="vllm", model_name="tiny/model", phase="decode"'
        # Layer 0 is healthy on all of them.
        means = {"0": HEALTHY.entropy, "1": 0.4}
        tests = [
            {
                "expr": f'round({record}{suffix}{{phase="decode"}}, 1e-6)',
                "eval_time": f"{HEALTHY_MIN - 1}m",
                "exp_samples": [
                    {"labels": f'{{{where}, layer="{layer}"}}', "value": mean} for layer, mean in means.items()
                ],
            }
            for suffix in ("", ":avg1d")
        ]
        run_promtool(tmp_path, {"interval": "1m", "input_series": series, "promql_expr_test": tests})

    def test_new_server_that_measures_nothing(self, tmp_path: Path) -> None:
        """It has no rows of half an hour ago to be compared with, and neither has one beside it that measures."""
        started = engine_series([Span(FAULT_MIN)], start_min=HEALTHY_MIN)
        broken = [Span(FAULT_MIN, replace(HEALTHY, rows=0.0, sampled=0.0))]
        silent = engine_series(broken, instance="b:8000", start_min=HEALTHY_MIN)
        firing = {
            "expr": 'ALERTS{alertstate="firing", alertname="GlassboxNotSampling"}',
            "eval_time": f"{HEALTHY_MIN + 29}m",
            "exp_samples": [
                {
                    "labels": 'ALERTS{alertname="GlassboxNotSampling", alertstate="firing", severity="warning", '
                    'job="vllm", instance="b:8000", model_name="tiny/model", engine="0"}',
                    "value": 1,
                }
            ],
        }
        run_promtool(tmp_path, {"interval": "1m", "input_series": [*started, *silent], "promql_expr_test": [firing]})

    def test_no_rule_looks_far_back_for_each_layer_of_each_server(self) -> None:
        """A day or half an hour of 500 servers x 30 layers would be millions of samples at each evaluation."""
        known = check.known_series(GROUPS)
        settings = RuleSettings()
        read: dict[str, set[str]] = {}
        for rule in (rule for group in GROUPS for rule in group.rules):
            for metric, window in re.findall(r"([\w:]+)(?:\{[^}]*\})?\[(\w+)\]", rule.expr):
                if {"instance", "layer"} <= known[metric]:
                    read.setdefault(metric, set()).add(window)
        assert 5 < len(read)
        assert {settings.window} == set().union(*read.values())

    def test_no_recording_rule_reads_a_window_twice(self) -> None:
        """Nor anything else than what it divides, which has to be of one moment and so of one expression."""
        for rule in recordings(GROUPS):
            ranges = re.findall(r"[\w:]+(?:\{[^}]*\})?\[\w+\]", rule.expr)
            if "engine" in rule.labels:
                assert len(ranges) == len(set(ranges)) == 1 + rule.expr.count("/\n")


class TestRules:
    def test_promtool_accepts_the_rules(self) -> None:
        """`promtool check rules`, with its linter."""
        promtool = require_tool("promtool", "prometheus")
        command = [promtool, "check", "rules", "--lint=all", "--lint-fatal", str(RULES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stdout + done.stderr

    def test_rule_file_and_prometheus_rule_say_the_same(self) -> None:
        """The file of Prometheus and the manifest of the operator hold what the code builds."""
        expected = to_data(GROUPS)
        assert expected == yaml.safe_load(RULES.read_text())
        assert expected == yaml.safe_load((ROOT / generated.PROMETHEUS_RULE_PATH).read_text())["spec"]

    @pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
    def test_alert_has_everything_that_the_called_one_needs(self, alert: Any) -> None:
        """Severity, patience, a summary that names the instance and what it serves, and a runbook that exists."""
        rule = next(r for g in to_data(GROUPS)["groups"] for r in g["rules"] if r.get("alert") == alert.title)  # type: ignore[attr-defined]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert re.fullmatch(r"[1-9]\d*m", rule["for"])
        of_a_server = {"ExporterDown", "SinkFailing"}
        for label in ("instance",) if alert.name in of_a_server else ("model_name", "engine", "instance"):
            assert f"$labels.{label}" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"].removesuffix("{{ end }}").endswith(".")
        assert (ROOT / rule["annotations"]["runbook_url"]).is_file()

    def test_what_a_text_looks_up_exists(self) -> None:
        """Queries within annotations are PromQL over known metrics and labels."""
        known = check.known_series(GROUPS)
        texts = [text for alert in ALERTS for text in (alert.summary, alert.found)]
        queries = [query for text in texts for query in re.findall(r'query \(printf "([^"]+)"', text)]
        assert 4 == len(queries) == sum(text.count("query") for text in texts)
        assert [] == [
            problem for query in queries for problem in check.problems_of(query.replace("%q", '"x"'), query, known)
        ]

    def test_settings_have_a_patience_for_each_alert(self) -> None:
        """No more, no less."""
        assert {alert.name for alert in ALERTS} == RuleSettings().hold.keys()

    def test_bounds_are_bounds_of_buckets(self) -> None:
        """A share above a value is only known where a bucket ends."""
        settings = RuleSettings()
        assert settings.saturation_bound in STATISTICS[INDEX["top1_ratio"]].buckets
        assert settings.logit_limit in STATISTICS[INDEX["max_logit"]].buckets

    def test_settings_reach_the_rules(self) -> None:
        """A demonstration can shorten all times; nothing of the defaults is left."""
        settings = RuleSettings(
            window="1m",
            history="9m",
            history_offset="2m",
            sampling_window="3m",
            hold=dict.fromkeys(RuleSettings().hold, "7s"),
        )
        groups = build_groups(settings)
        text = yaml.safe_dump(to_data(groups, settings))
        assert [] == re.findall(r"\[(?:10m|1d|30m)\]|offset 1h|mean10m|:avg1d", text)
        assert {"7s"} == set(re.findall(r"for: (\S+)", text))
        assert len(recordings(GROUPS)) == len(recordings(groups))


class TestRunbooks:
    @pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
    def test_page_has_its_sections(self, alert: Any) -> None:
        """Title, then meaning, confirmation, causes and remedy, in this order, none empty."""
        text = (ROOT / alert.runbook).read_text()
        assert text.startswith(f"# {alert.title}\n")
        assert SECTIONS == re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert all(100 < len(part) for part in re.split(r"^## .+$", text, flags=re.MULTILINE)[1:])

    @pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
    def test_queries_ask_for_what_exists(self, alert: Any) -> None:
        """Each page has at least one, and all are PromQL over known metrics and labels."""
        known = check.known_series(GROUPS)
        queries = re.findall(r"```promql\n(.+?)```", (ROOT / alert.runbook).read_text(), re.DOTALL)
        assert queries
        assert [] == [problem for query in queries for problem in check.problems_of(query, alert.title, known)]

    def test_no_page_without_its_alert(self) -> None:
        """And the index names all."""
        pages = {path.stem for path in (ROOT / "docs/runbooks").glob("*.md")} - {"README"}
        assert {alert.title for alert in ALERTS} == pages
        index = (ROOT / "docs/runbooks/README.md").read_text()
        assert pages == set(re.findall(r"\[(\w+)\]\(\w+\.md\)", index))

    def test_every_reason_for_leaving_out_rows_is_explained(self) -> None:
        """The page of metrics has each value of the label `reason` that the observer uses."""
        source = (ROOT / "glassbox/processes/worker/observer.py").read_text()
        assert set(re.findall(r"""(?:dropped_rows\[|_drop\(step, )"(\w+)\"""", source)) == DROP_REASONS.keys()

    def test_every_stage_that_counts_errors_is_explained(self) -> None:
        """The page of GlassboxErrors names each value of the label `stage` that the code uses."""
        source = "".join(path.read_text() for path in (ROOT / "glassbox").rglob("*.py"))
        stages = set(re.findall(r"""(?:guard|failed|count_error|errors\.count)\(\s*"(\w+)\"""", source))
        assert {"prometheus", "snapshot", "otel"} <= stages
        page = (ROOT / "docs/runbooks/GlassboxErrors.md").read_text()
        assert set() == {stage for stage in stages if f"`{stage}`" not in page}

    def test_every_sink_is_explained(self) -> None:
        """The page of GlassboxSinkFailing names each value of the label `sink`."""
        folder = ROOT / "glassbox/processes/exporter"
        source = "".join((folder / name).read_text() for name in ("sinks.py", "trace_sinks.py"))
        sinks = set(re.findall(r"""\b[sS]ink\(\s*"(\w+)\"""", source))
        assert {"http", "page", "jsonl", "records", "otel_traces"} <= sinks
        page = (ROOT / "docs/runbooks/GlassboxSinkFailing.md").read_text()
        assert set() == {sink for sink in sinks if f"`{sink}`" not in page}
