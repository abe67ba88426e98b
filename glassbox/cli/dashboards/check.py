"""Whether every expression asks only for metrics and labels that exist, and every metric is shown.

Owns the reading of expressions (with promql-parser) and of the generated dashboards. What exists is what
`export.families.METRICS` and the recording rules define.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import promql_parser

from glassbox.cli.dashboards.rule_model import Group
from glassbox.cli.dashboards.rules import alerts, recordings
from glassbox.export.families import METRICS
from glassbox.export.family import Family

# Metrics that no panel shows, and why.
NOT_SHOWN: Final[dict[str, str]] = {
    "glassbox_start_seconds": "it never changes once a server has started; `glassbox doctor` judges it",
}
_SCRAPED: Final = frozenset({"job", "instance"})
_GRAFANA: Final = {"$__rate_interval": "5m", "$baseline": "1d"}


@dataclass(frozen=True)
class Use:
    """A metric with labels as an expression asks for them; `where` names the panel or rule."""

    metric: str
    labels: frozenset[str]
    where: str


def plain(expression: str, values: Mapping[str, str] = _GRAFANA) -> str:
    """The expression as Prometheus understands it: Grafana's variables for durations replaced."""
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def known_series(groups: tuple[Group, ...]) -> dict[str, frozenset[str]]:
    """Name and labels of all series that Prometheus has: metrics, recorded series, ALERTS."""
    series: dict[str, frozenset[str]] = {}
    for family in METRICS:
        labels = _SCRAPED | set(family.label_names) | set(family.detail_labels)
        for name in _series_names(family):
            series[name] = frozenset(labels | ({"le"} if name.endswith("_bucket") else set()))
    series |= {rule.record: frozenset(rule.labels) for rule in recordings(groups)}
    of_alerts = frozenset().union(*(_grouped(rule.expr) for rule in alerts(groups)))
    series["ALERTS"] = of_alerts | {"alertname", "alertstate", "severity"}
    return series


def _series_names(family: Family) -> list[str]:
    if family.kind != "histogram":
        return [family.name]
    # A histogram with negative bounds has negative values, thus no sum, thus no count.
    parts = ("bucket",) if family.bounds[0] < 0 else ("bucket", "count", "sum")
    return [f"{family.name}_{part}" for part in parts]


def _visit(expression: str) -> Iterator[promql_parser.Expr]:
    """All nodes of an expression; ValueError if it isn't PromQL."""
    nodes: list[promql_parser.Expr] = []
    promql_parser.walk(promql_parser.parse(plain(expression)), nodes.append)
    yield from nodes


def selectors(expression: str) -> list[tuple[str, frozenset[str]]]:
    """Metric and matched labels of every selector."""
    found = []
    for node in _visit(expression):
        if isinstance(node, promql_parser.VectorSelector):
            matchers = node.matchers.matchers if node.matchers else []
            found.append((node.name or "", frozenset(matcher.name for matcher in matchers)))
    return found


def _grouped(expression: str) -> frozenset[str]:
    """Labels by which an expression groups or joins."""
    names: set[str] = set()
    for node in _visit(expression):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            names.update(node.modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and node.modifier:
            if node.modifier.matching:
                names.update(node.modifier.matching.labels)
            names.update(node.modifier.group_labels or ())
    return frozenset(names)


def _made(expression: str) -> frozenset[str]:
    """Labels that an expression makes itself, with label_replace."""
    names = set()
    for node in _visit(expression):
        if isinstance(node, promql_parser.Call) and node.func.name == "label_replace":
            target = node.args[1]
            assert isinstance(target, promql_parser.StringLiteral)
            names.add(target.val)
    return frozenset(names)


def problems_of(expression: str, where: str, known: Mapping[str, frozenset[str]]) -> list[str]:
    """What an expression asks for that doesn't exist; each problem is a line."""
    try:
        asked = selectors(expression)
    except ValueError as error:
        return [f"{where}: no PromQL: {error}"]
    problems = []
    available = set(_made(expression))
    for metric, labels in asked:
        if metric not in known:
            problems.append(f"{where}: unknown metric {metric or expression}")
            continue
        available |= known[metric]
        problems += [f"{where}: {metric} has no label {label}" for label in sorted(labels - known[metric])]
    if not problems:
        missing = sorted(_grouped(expression) - available)
        problems = [f"{where}: groups by {label}, which none of its metrics has" for label in missing]
    return problems


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels of a dashboard's JSON, those in folded rows included, rows themselves not."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", ())
        else:
            yield panel


def expressions(dashboard: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Where and what a dashboard's JSON asks: panels and annotations."""
    title = dashboard["title"]
    for panel in panels(dashboard):
        for target in panel.get("targets", ()):
            yield f"{title} / {panel['title']} {target['refId']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"{title} / annotation {annotation['name']}", annotation["expr"]


def check_all(dashboards: Iterable[Mapping[str, Any]], groups: tuple[Group, ...]) -> list[str]:
    """Every problem of the dashboards and the rules; empty if there is none."""
    known = known_series(groups)
    problems: list[str] = []
    shown: set[str] = set()
    for dashboard in dashboards:
        for where, expression in expressions(dashboard):
            found = problems_of(expression, where, known)
            problems += found
            if not found:
                shown.update(metric for metric, _ in selectors(expression))
    for group in groups:
        for rule in group.rules:
            problems += problems_of(rule.expr, f"rule {rule.title}", known)
    return problems + _not_shown(shown)


def _not_shown(shown: set[str]) -> list[str]:
    problems = []
    for family in METRICS:
        used = any(name in shown for name in _series_names(family))
        if not used and family.name not in NOT_SHOWN:
            problems.append(f"no panel shows {family.name}; add one, or list it in NOT_SHOWN with a reason")
        if used and family.name in NOT_SHOWN:
            problems.append(f"{family.name} is shown; remove it from NOT_SHOWN")
    return problems
