"""Recording and alerting rules for Prometheus.

Owns which series are recorded and how the rules are grouped. The alerts are in `alerts.py`, `output_alerts.py` and
`liveness_alerts.py`;
every number stands in `rule_model.RuleSettings`, and the dashboards colour their tiles with the same ones.

Two levels: the rules of the group `glassbox-windows` keep, per engine, layer and phase, a window's mean (or share, or
maximum), and only if the window has enough rows, so that nothing is ever concluded from a handful. Those of
`glassbox-history` average them over the last day and over all servers of the same job and model. The alerts compare the
two. At detail `model` the whole model counts as one layer; at detail `head` the heads of a layer are added up.
"""

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


class _Recorder:
    """Builds recording rules from the settings."""

    def __init__(self, settings: RuleSettings) -> None:
        self.s = settings

    def window(self, subject: str, operation: str, expr: str, comment: str, labels: tuple[str, ...]) -> Recording:
        level = "engine_layer_phase" if labels == LAYER_LABELS else "engine_phase"
        return Recording(f"{level}:{subject}:{operation}{self.s.window}", expr, comment, labels)

    def mean(self, name: str, labels: tuple[str, ...] = LAYER_LABELS) -> Recording:
        metric = promql.statistic(name).metric
        top, bottom = (self._sum(f"rate({metric}_{part}[{self.s.window}])", labels) for part in ("sum", "count"))
        comment = f"Mean of {name}, where there are enough rows."
        expr = f"{top}\n  /\n{bottom}\nand\n{self._enough(name, labels)}"
        return self.window(metric, "mean", expr, comment, labels)

    def share_above(self, name: str, bound: float, subject: str, comment: str) -> Recording:
        metric = promql.statistic(name).metric
        le = promql.bucket_name(name, bound)
        below = self._sum(f'rate({metric}_bucket{{le="{le}"}}[{self.s.window}])', LAYER_LABELS)
        every = self._sum(f"rate({self._rows(name)}[{self.s.window}])", LAYER_LABELS)
        expr = f"1 - {below}\n  /\n{every}\nand\n{self._enough(name, LAYER_LABELS)}"
        return self.window(subject, "ratio", expr, comment, LAYER_LABELS)

    def window_max(self) -> Recording:
        metric = "glassbox_attention_max_logit_window_max"
        expr = f"max by ({', '.join(LAYER_LABELS)}) (max_over_time({metric}[{self.s.window}]))"
        return self.window(metric, "max", expr, "Largest logit.", LAYER_LABELS)

    def history(self, window: Recording, function: str = "avg") -> Recording:
        """What a window's record was during the last day; nothing where the day had too few windows."""
        s = self.s
        labels = tuple(label for label in window.labels if label in (*MODEL_LABELS, "layer"))
        by = f"by ({', '.join(labels)})"
        span = f"{window.record}[{s.history}] offset {s.history_offset}"
        expr = (
            f"{function} {by} ({function}_over_time({span}))\nand\n"
            f"sum {by} (count_over_time({span})) >= {s.min_history}"
        )
        kind = {"avg": "Mean", "max": "Largest"}[function]
        record = f"{window.record.replace('engine', 'model', 1)}:{function}{s.history}"
        return Recording(record, expr, f"{kind} of {window.record} in the last {s.history}, of all servers.", labels)

    @staticmethod
    def _sum(expr: str, labels: tuple[str, ...]) -> str:
        return f"sum by ({', '.join(labels)}) ({expr})"

    @staticmethod
    def _rows(name: str) -> str:
        metric, matchers = promql.rows_of(name)
        return f"{metric}{{{', '.join(matchers)}}}" if matchers else metric

    def _enough(self, name: str, labels: tuple[str, ...]) -> str:
        return f"{self._sum(f'increase({self._rows(name)}[{self.s.window}])', labels)} >= {self.s.min_rows}"


def build_groups(settings: RuleSettings | None = None) -> tuple[Group, ...]:
    """All rules; a demonstration passes settings with short windows."""
    s = settings or RuleSettings()
    rules = _Recorder(s)
    windows = {
        "entropy": rules.mean("entropy_ratio"),
        "sink": rules.mean("sink_ratio"),
        "saturated": rules.share_above(
            "top1_ratio",
            s.saturation_bound,
            "glassbox_attention_saturated_rows",
            f"Share of rows with more than {s.saturation_bound:g} of their attention on one key.",
        ),
        "limit": rules.share_above(
            "max_logit",
            s.logit_limit,
            "glassbox_attention_over_limit_rows",
            f"Share of rows with a logit above {s.logit_limit:g}.",
        ),
        "max": rules.window_max(),
        "lookback": rules.mean("lookback_ratio", PHASE_LABELS),
    }
    compared = ("entropy", "sink", "saturated", "max", "lookback")
    history = {name: rules.history(windows[name], "max" if name == "max" else "avg") for name in compared}
    now = {name: rule.record for name, rule in windows.items()}
    then = {name: rule.record for name, rule in history.items()}
    return (
        Group("glassbox-windows", s.window_interval, tuple(windows.values())),
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
