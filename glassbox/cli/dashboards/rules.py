"""Recording and alerting rules for Prometheus.

Owns which series are recorded and how the rules are grouped. The alerts are in `alerts.py`, `output_alerts.py` and
`liveness_alerts.py`;
every number stands in `rule_model.RuleSettings`, and the dashboards colour their tiles with the same ones.

Three levels: the rules of the group `glassbox-windows` keep, per engine, layer and phase, a window's mean (or share, or
maximum), and only if the window has enough rows, so that nothing is ever concluded from a handful; then what that is on
average over all servers of the same job and model. Those of `glassbox-history` average the latter over the last day.
The alerts compare an engine with the history of its model. At detail `model` the whole model counts as one layer; at
detail `head` the heads of a layer are added up.

There may be hundreds of servers: what has a series for each layer of each of them is read over a window once and over a
day never (docs/performance.md, "A fleet").
"""

import re
from typing import Final

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.alerts import attention_alerts, logit_alerts, own_alerts
from glassbox.cli.dashboards.liveness_alerts import liveness_alerts
from glassbox.cli.dashboards.output_alerts import certification_alerts, output_alerts
from glassbox.cli.dashboards.rule_model import (
    LAYER_LABELS,
    MODEL_LABELS,
    PHASE_LABELS,
    Alert,
    Group,
    Recording,
    RuleSettings,
)

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(duration: str) -> int:
    """Of a duration with one unit, such as "10m".

    Raises:
        ValueError: if it is something else.
    """
    found = re.fullmatch(r"(\d+)([smhd])", duration)
    if found is None:
        raise ValueError(f"a duration must be a number and one of s, m, h, d, such as 10m, got {duration!r}")
    return int(found[1]) * _SECONDS[found[2]]


class _Recorder:
    """Builds recording rules from the settings."""

    def __init__(self, settings: RuleSettings) -> None:
        self.s = settings

    def window(self, subject: str, operation: str, expr: str, comment: str, labels: tuple[str, ...]) -> Recording:
        level = "engine_layer_phase" if labels == LAYER_LABELS else "engine_phase"
        return Recording(f"{level}:{subject}:{operation}{self.s.window}", expr, comment, labels)

    def mean(self, name: str, labels: tuple[str, ...] = LAYER_LABELS) -> Recording:
        metric = promql.statistic(name).metric
        total = self._sum(f"rate({metric}_sum[{self.s.window}])", labels)
        comment = f"Mean of {name}, where there are enough rows."
        return self.window(metric, "mean", f"{total}\n  /\n{self._rows(name, labels)}", comment, labels)

    def share_above(self, name: str, bound: float, subject: str, comment: str) -> Recording:
        metric = promql.statistic(name).metric
        le = promql.bucket_name(name, bound)
        below = self._sum(f'rate({metric}_bucket{{le="{le}"}}[{self.s.window}])', LAYER_LABELS)
        expr = f"1 - {below}\n  /\n{self._rows(name, LAYER_LABELS)}"
        return self.window(subject, "ratio", expr, comment, LAYER_LABELS)

    def window_max(self) -> Recording:
        metric = "glassbox_attention_max_logit_window_max"
        expr = f"max by ({', '.join(LAYER_LABELS)}) (max_over_time({metric}[{self.s.window}]))"
        return self.window(metric, "max", expr, "Largest logit.", LAYER_LABELS)

    def windows(self) -> dict[str, Recording]:
        """What is kept of each engine, by a short name."""
        s = self.s
        return {
            "entropy": self.mean("entropy_ratio"),
            "sink": self.mean("sink_ratio"),
            "saturated": self.share_above(
                "top1_ratio",
                s.saturation_bound,
                "glassbox_attention_saturated_rows",
                f"Share of rows with more than {s.saturation_bound:g} of their attention on one key.",
            ),
            "limit": self.share_above(
                "max_logit",
                s.logit_limit,
                "glassbox_attention_over_limit_rows",
                f"Share of rows with a logit above {s.logit_limit:g}.",
            ),
            "max": self.window_max(),
            "lookback": self.mean("lookback_ratio", PHASE_LABELS),
        }

    def of_model(self, window: Recording, function: str = "avg") -> Recording:
        """A window's record over all servers of a model."""
        labels = tuple(label for label in window.labels if label in (*MODEL_LABELS, "layer"))
        kind = {"avg": "Mean", "max": "Largest"}[function]
        record = window.record.replace("engine", "model", 1)
        expr = f"{function} by ({', '.join(labels)}) ({window.record})"
        return Recording(record, expr, f"{kind} of {window.record}, of all servers.", labels)

    def history(self, of_model: Recording, function: str = "avg") -> Recording:
        """What a model's record was during the last day; nothing where the day had too few windows."""
        s = self.s
        span = f"{of_model.record}[{s.history}] offset {s.history_offset}"
        expr = f"{function}_over_time({span})\nand\ncount_over_time({span}) >= {s.min_history}"
        kind = {"avg": "Mean", "max": "Largest"}[function]
        record = f"{of_model.record}:{function}{s.history}"
        return Recording(record, expr, f"{kind} of {of_model.record} in the last {s.history}.", of_model.labels)

    @staticmethod
    def _sum(expr: str, labels: tuple[str, ...]) -> str:
        return f"sum by ({', '.join(labels)}) ({expr})"

    def _rows(self, name: str, labels: tuple[str, ...]) -> str:
        """Rows per second where the window has enough. Not a record of its own, which would be read once for all: what
        is divided must be of one moment, and a scrape may arrive between two rules, every minute of the same server."""
        metric, matchers = promql.rows_of(name)
        rows = f"{metric}{{{', '.join(matchers)}}}" if matchers else metric
        per_second = self._sum(f"rate({rows}[{self.s.window}])", labels)
        return f"({per_second} >= {self.s.min_rows} / {seconds_of(self.s.window)})"


def window_recordings(settings: RuleSettings) -> dict[str, Recording]:
    """What is recorded of each engine, and of each of its layers: entropy, sink, saturated, limit, max, lookback."""
    return _Recorder(settings).windows()


def build_groups(settings: RuleSettings | None = None) -> tuple[Group, ...]:
    """All rules; a demonstration passes settings with short windows."""
    s = settings or RuleSettings()
    rules = _Recorder(s)
    windows = rules.windows()
    functions = {"entropy": "avg", "sink": "avg", "saturated": "avg", "max": "max", "lookback": "avg"}
    models = {name: rules.of_model(windows[name], function) for name, function in functions.items()}
    history = {name: rules.history(models[name], function) for name, function in functions.items()}
    now = {name: rule.record for name, rule in windows.items()}
    then = {name: rule.record for name, rule in history.items()}
    return (
        # In this order: Prometheus evaluates a group's rules one after another, and a rule sees what those before made.
        Group("glassbox-windows", s.window_interval, (*windows.values(), *models.values())),
        Group("glassbox-history", s.history_interval, tuple(history.values())),
        Group("glassbox-output", None, tuple(output_alerts(s))),
        Group("glassbox-attention", None, (*attention_alerts(s, now, then), *logit_alerts(s, now, then))),
        Group("glassbox-self", None, (*own_alerts(s), *certification_alerts(s), *liveness_alerts(s))),
    )


def recordings(groups: tuple[Group, ...]) -> list[Recording]:
    """The recording rules, in order."""
    return [rule for group in groups for rule in group.rules if isinstance(rule, Recording)]


def alerts(groups: tuple[Group, ...]) -> list[Alert]:
    """The alerting rules, in order."""
    return [rule for group in groups for rule in group.rules if isinstance(rule, Alert)]


def to_data(groups: tuple[Group, ...], settings: RuleSettings | None = None) -> dict[str, list[dict[str, object]]]:
    """The rules as a rule file of Prometheus (and the `spec` of a PrometheusRule) has them."""
    s = settings or RuleSettings()
    return {"groups": [_group_data(group, s) for group in groups]}


def _group_data(group: Group, s: RuleSettings) -> dict[str, object]:
    head: dict[str, object] = {"name": group.name}
    if group.interval:
        head["interval"] = group.interval
    return {**head, "rules": [_rule_data(rule, s) for rule in group.rules]}


def _rule_data(rule: Recording | Alert, s: RuleSettings) -> dict[str, object]:
    if isinstance(rule, Recording):
        return {"record": rule.record, "expr": rule.expr}
    description = f"{rule.when} {rule.found}".strip()
    return {
        "alert": rule.title,
        "expr": rule.expr,
        "for": s.hold[rule.name],
        "labels": {"severity": rule.severity},
        "annotations": {"summary": rule.summary, "description": description, "runbook_url": rule.runbook},
    }
