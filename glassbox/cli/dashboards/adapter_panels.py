"""The panels of LoRA adapters: whose rows there are, and how each statistic differs between them."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.common import RATE_UNIT, bounds, name_of, unit
from glassbox.cli.dashboards.panels import Query, lines
from glassbox.core.statistics import STATISTICS, Statistic
from glassbox.export.families import by_adapter

_ROWS: Final = "glassbox_adapter_attention_rows_total"
_NONFINITE: Final = "glassbox_adapter_attention_nonfinite_rows_total"
_BY: Final = ("adapter",)
_LEGEND: Final = "{{adapter}}"
_ONLY: Final = "There is something to see with adapters.max above 0 in glassbox.yaml."


def adapters() -> list[dashboard.Panel]:
    """A section: rows of each adapter, then the median of each statistic."""
    share = f"{promql.total(_NONFINITE, by=_BY)} / {promql.total(_ROWS, by=_BY)}"
    return [
        lines(
            "Rows by adapter",
            f"Attention rows measured per second, by LoRA adapter; base is the model without one. {_ONLY}",
            [Query(promql.total(_ROWS, by=_BY), _LEGEND)],
            RATE_UNIT,
            bounds=(0.0, None),
            stacked=True,
        ),
        lines(
            "Non-finite rows by adapter",
            "Share of measured rows with a NaN or infinite score: an adapter alone above 0 has bad weights.",
            [Query(share, _LEGEND)],
            "percentunit",
            bounds=(0.0, None),
        ),
        *(_medians(row) for row in STATISTICS if row.exported),
    ]


def _medians(row: Statistic) -> dashboard.Panel:
    buckets = promql.reduce("sum", ("le", *_BY), promql.rate(f"{by_adapter(row).name}_bucket"))
    return lines(
        f"{name_of(row)}: median by adapter",
        f"Median over all layers and heads, by LoRA adapter. {row.meaning}",
        [Query(f"histogram_quantile(0.5, {buckets})", _LEGEND)],
        unit(row),
        bounds=bounds(row),
    )
