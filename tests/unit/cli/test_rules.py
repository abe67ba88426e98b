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


HEALTHY = Traffic()


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
            add(f"{a}_max_logit_count", labels, _counter(mine, "rows"))
            add(f"{a}_max_logit_window_max", labels, _gauge(mine, "max_logit"))
            for statistic, name in (("sink_ratio", "drift"), ("distance_tokens", "drift_by_length")):
                add(f"{a}_drift_psi", f'{labels}, statistic="{statistic}"', _gauge(mine, name))
            add(f"{a}_rows_total", labels, _counter(mine, "rows"))
            add(f"{a}_nonfinite_rows_total", labels, _counter(mine, "nonfinite"))
    add("glassbox_steps_total", engine, _counter(spans, "steps"))
    add("glassbox_sampled_steps_total", engine, _counter(spans, "sampled"))
    add("glassbox_overhead_seconds_total", engine, _counter(spans, "overhead"))
    add("glassbox_sample_rate", engine, _gauge(spans, "sample_rate"))
    add("glassbox_layers_observed", engine, _gauge(spans, "layers"))
    add("glassbox_config_last_reload_successful", engine, _gauge(spans, "reload_ok"))
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
            ({"layers": 0.0}, ["NotSampling"]),
            ({"overhead_s": 1.2}, ["OverheadAboveBudget"]),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, list) else "",
    )
    def test_fault(self, tmp_path: Path, changes: dict[str, float], expected: list[str]) -> None:
        """After an hour of it."""
        promtool_test(tmp_path, engine_series(fault(**changes)), {HEALTHY_MIN: [], END_MIN: expected})

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
        """Severity, patience, a summary that names model, engine and instance, and a runbook that exists."""
        rule = next(r for g in to_data(GROUPS)["groups"] for r in g["rules"] if r.get("alert") == alert.title)  # type: ignore[attr-defined]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert re.fullmatch(r"[1-9]\d*m", rule["for"])
        for label in ("model_name", "engine", "instance"):
            assert f"$labels.{label}" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")
        assert (ROOT / rule["annotations"]["runbook_url"]).is_file()

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

    def test_links_lead_somewhere(self) -> None:
        """Relative links of the pages and of the reference."""
        for page in [*(ROOT / "docs/runbooks").glob("*.md"), ROOT / "docs/metrics.md"]:
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
                assert (page.parent / target).is_file(), f"{page.name}: {target}"

    def test_every_stage_that_counts_errors_is_explained(self) -> None:
        """The page of GlassboxErrors names each value of the label `stage` that the code uses."""
        source = "".join(path.read_text() for path in (ROOT / "glassbox").rglob("*.py"))
        stages = set(re.findall(r"""(?:guard|failed|count_error|errors\.count)\(\s*"(\w+)\"""", source))
        assert {"prometheus", "snapshot", "otel"} <= stages
        page = (ROOT / "docs/runbooks/GlassboxErrors.md").read_text()
        assert set() == {stage for stage in stages if f"`{stage}`" not in page}
