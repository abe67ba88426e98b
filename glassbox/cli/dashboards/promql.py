"""PromQL of the panels: text, built from the table of statistics.

Owns how a metric is selected, rated and reduced. Each expression carries the matchers of the dashboard's variables and
Grafana's `$__rate_interval`, so no panel can forget them.
"""

from typing import Final

from glassbox.core.statistics import INDEX, STATISTICS, Statistic
from glassbox.export.prometheus import bucket_names

# Regular expressions throughout: a variable may hold several values, or ".+" for all.
SERVER_MATCHERS: Final = 'job=~"$job", instance=~"$instance"'
MATCHERS: Final = f'{SERVER_MATCHERS}, model_name=~"$model_name", engine=~"$engine"'
QUANTILES: Final = (0.5, 0.95, 0.99)
# Bands of ten layers: the same expression fits a model of any depth. The greedy group is all digits but the last.
BAND_LABEL: Final = "layers"
_BAND: Final = f'"{BAND_LABEL}", "${{1}}0-${{1}}9", "layer", "([0-9]*)[0-9]"'


def statistic(name: str) -> Statistic:
    """The row of the table; KeyError if there is none."""
    return STATISTICS[INDEX[name]]


def select(metric: str, *matchers: str) -> str:
    """An instant selector with the dashboard's matchers and `matchers`, e.g. `phase="decode"`."""
    return f"{metric}{{{', '.join((MATCHERS, *matchers))}}}"


def of_server(metric: str) -> str:
    """An instant selector of a metric that is a server's, not an engine's."""
    return f"{metric}{{{SERVER_MATCHERS}}}"


def rate(metric: str, *matchers: str, offset: str = "") -> str:
    """Increase per second of a counter (or of a part of a histogram)."""
    return f"rate({select(metric, *matchers)}[$__rate_interval]{f' offset {offset}' if offset else ''})"


def reduce(operator: str, by: tuple[str, ...], expression: str) -> str:
    """`operator by (...) (expression)`; without labels one number."""
    return f"{operator} by ({', '.join(by)}) ({expression})" if by else f"{operator}({expression})"


def total(metric: str, *matchers: str, by: tuple[str, ...] = (), offset: str = "") -> str:
    """Sum of the rates of a counter, per `by`."""
    return reduce("sum", by, rate(metric, *matchers, offset=offset))


def banded(expression: str) -> str:
    """The series of `expression` with the label `layers`: "0-9", "10-19", ...; without `layer` (detail model) none."""
    return f"label_replace({expression}, {_BAND})"


def buckets(name: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """Rate per bucket of a statistic's histogram, for heatmaps and quantiles."""
    inner = rate(f"{statistic(name).metric}_bucket", *matchers)
    return reduce("sum", ("le", *by), banded(inner) if BAND_LABEL in by else inner)


def quantile(q: float, name: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """A quantile of a statistic over its rows, per `by` (`layers` is a band of layers)."""
    return f"histogram_quantile({q:g}, {buckets(name, *matchers, by=by)})"


def mean(name: str, *matchers: str, by: tuple[str, ...] = (), offset: str = "") -> str:
    """The mean of a statistic over its rows.

    Raises:
        ValueError: if its histogram has no `_sum`, because its values may be negative.
    """
    row = statistic(name)
    if row.signed:
        raise ValueError(f"{name} has no mean: a histogram with negative values has no _sum; use quantile")
    numerator = total(f"{row.metric}_sum", *matchers, by=by, offset=offset)
    return f"{numerator} / {total(f'{row.metric}_count', *matchers, by=by, offset=offset)}"


def rows_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The series that counts the rows of a statistic, and its own matchers.

    A histogram with negative values has no `_count`, because OpenMetrics has none without `_sum`: its last bucket.
    """
    row = statistic(name)
    return (f"{row.metric}_bucket", ('le="+Inf"',)) if row.signed else (f"{row.metric}_count", ())


def bucket_name(name: str, bound: float) -> str:
    """The value of `le` of a bound of a statistic's histogram.

    Raises:
        ValueError: if it is not one of its bounds: a share can only be cut where a bucket ends.
    """
    if bound not in statistic(name).buckets:
        raise ValueError(f"{bound:g} is not a bucket bound of {name}; take one of {statistic(name).buckets}")
    return bucket_names((bound,))[0]


def share_up_to(name: str, bound: float, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """Share of the rows whose value is at most `bound`, one of the histogram's bounds."""
    metric = statistic(name).metric
    below = total(f"{metric}_bucket", *matchers, f'le="{bucket_name(name, bound)}"', by=by)
    rows, last = rows_of(name)
    return f"{below} / {total(rows, *matchers, *last, by=by)}"


def share_above(name: str, bound: float, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """Share of the rows whose value is above `bound`, one of the histogram's bounds."""
    return f"1 - {share_up_to(name, bound, *matchers, by=by)}"
