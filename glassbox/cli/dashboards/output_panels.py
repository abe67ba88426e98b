"""The panels of the output checks: is what is served right, how sure is that, and what does the KV cache lose."""

from typing import Final

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.common import RATE_UNIT, SETTINGS, layers_tile
from glassbox.cli.dashboards.panels import GREEN, RED, YELLOW, Levels, Query, heat, lines, listing, tile

_RATIO: Final = "glassbox_attention_output_error_ratio"
_WORST: Final = "glassbox_attention_output_error_worst_ratio"
_CANARY: Final = "glassbox_canary_rows_total"
_KV_ERROR: Final = "glassbox_kv_cache_quantization_error_ratio"
_KV_SATURATED: Final = "glassbox_kv_cache_saturated_ratio"
_EXPLAINED: Final = "1 is the largest error that rounding explains."
_NO_CHECKS: Final = "no checks yet"


def output_checks() -> list[dashboard.Panel]:
    """A section: the verdict, what was checked, where errors are large, and who is wrong."""
    return [*_verdict(), *_rows(), *_where(), *_accused()]


def _buckets(*matchers: str, by: tuple[str, ...] = ()) -> str:
    return promql.reduce("sum", ("le", *by), promql.rate(f"{_RATIO}_bucket", *matchers))


def _verdict() -> list[dashboard.Panel]:
    return [
        layers_tile("certified", "Share of the model's layers whose served output glassbox reproduced on all ranks."),
        tile(
            "Wrong layers",
            "Layers whose served output was not reproduced, over all ranks. Above 0 is a fault: see the tables below.",
            Query(f"count({promql.select('glassbox_attention_output_wrong')})"),
            "none",
            levels=Levels(GREEN, ((1, RED),)),
            no_value="none",
        ),
        tile(
            "Rows that failed",
            "Checked rows per second whose output was not reproduced, the most in the time range.",
            Query(promql.total(_CANARY, 'result="failed"')),
            RATE_UNIT,
            levels=Levels(GREEN, ((1e-9, RED),)),
            reduce="max",
            no_value="no glassbox",
        ),
        tile(
            "Largest error",
            f"Largest error of the layers' last checks, the most in the time range; {_EXPLAINED}",
            Query(f"max({promql.select(_WORST)})"),
            "short",
            levels=Levels(GREEN, ((0.7, YELLOW), (1.0, RED))),
            reduce="max",
            no_value=_NO_CHECKS,
            decimals=2,
        ),
        _cache_tile(
            "Largest cache error",
            "Root mean square error of the KV cache in the worst layer.",
            _KV_ERROR,
            SETTINGS.kv_error,
            decimals=1,
        ),
        _cache_tile(
            "Largest saturated share",
            "Share of cached elements that are cut off, of the worst layer.",
            _KV_SATURATED,
            SETTINGS.kv_saturated,
            decimals=2,
        ),
    ]


def _cache_tile(title: str, description: str, metric: str, limit: float, decimals: int) -> dashboard.Panel:
    return tile(
        title,
        f"{description} The alert's bound is {limit:.0%}.",
        Query(f"max({promql.select(metric)})"),
        "percentunit",
        levels=Levels(GREEN, ((limit / 2, YELLOW), (limit, RED))),
        no_value=_NO_CHECKS,
        decimals=decimals,
    )


def _rows() -> list[dashboard.Panel]:
    """What was checked, and with which result."""
    certified, bypassed = (promql.select(f"glassbox_layers_{kind}") for kind in ("certified", "bypassed"))
    pending = f"sum({promql.select('glassbox_layers_observed')}) - sum({certified})"
    return [
        lines(
            "Layers by certification",
            "Layers whose output was reproduced, observed ones whose was not (yet), and those not observed, by reason.",
            [
                Query(f"sum({certified})", "certified"),
                Query(f"{pending} > 0", "observed, not certified"),
                Query(f"{promql.reduce('sum', ('reason',), bypassed)} > 0", "bypassed: {{reason}}"),
            ],
            "none",
            bounds=(0.0, None),
            steps=True,
        ),
        lines(
            "Checked rows by result",
            "Rows per second whose served output was compared with the reference; a few every 30 seconds are normal.",
            [Query(promql.total(_CANARY, by=("result",)), "{{result}}")],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
        heat(
            "Output error: distribution",
            f"Checked rows per second by the error of their worst head; {_EXPLAINED}",
            Query(_buckets(), "{{le}}"),
            "short",
        ),
    ]


def _where() -> list[dashboard.Panel]:
    """How large errors are, by place in the model."""
    quantiles = [
        Query(f"histogram_quantile({q:g}, {_buckets(by=('phase',))})", f"{{{{phase}}}} p{q * 100:g}")
        for q in promql.QUANTILES
    ]
    worst = promql.reduce("max", (promql.BAND_LABEL,), promql.banded(promql.select(_WORST)))
    return [
        lines(
            "Output error: quantiles",
            f"Error of the worst head of a checked row, by phase; {_EXPLAINED}",
            quantiles,
            "short",
            bounds=(0.0, None),
            limit=1.0,
        ),
        lines(
            "Output error by layers",
            f"Largest error of the last checks, per band of ten layers; {_EXPLAINED}",
            [Query(worst, "layers {{layers}}")],
            "short",
            bounds=(0.0, None),
            limit=1.0,
        ),
        _cache(
            "KV cache error by layers",
            "What the cache holds against what was computed (root mean square), the largest per band of ten layers. "
            "Rounding makes 2.6 % with FP8 e4m3, 5 % with e5m2.",
            _KV_ERROR,
            SETTINGS.kv_error,
        ),
        _cache(
            "KV cache saturation by layers",
            "Share of cached elements that are the largest number of their type, the largest per band of ten layers: a "
            "scale that is too small cuts off.",
            _KV_SATURATED,
            SETTINGS.kv_saturated,
        ),
        listing(
            "Heads with the largest error",
            f"The 20 layers with the largest error in their last check, and in which head; {_EXPLAINED}",
            Query(
                f"topk(20, {promql.reduce('max', ('model_name', 'engine', 'layer', 'head'), promql.select(_WORST))})"
            ),
            "short",
            ("model_name", "engine", "layer", "head"),
            value="error ratio",
            no_value=_NO_CHECKS,
            size=(16, 8),
        ),
    ]


def _cache(title: str, description: str, metric: str, limit: float) -> dashboard.Panel:
    largest = promql.reduce("max", (promql.BAND_LABEL, "tensor"), promql.banded(promql.select(metric)))
    query = Query(largest, "{{tensor}}s, layers {{layers}}")
    return lines(title, description, [query], "percentunit", bounds=(0.0, None), limit=limit)


def _accused() -> list[dashboard.Panel]:
    """Which worker is wrong."""
    worker = ("instance", "model_name", "engine", "host", "rank")
    wrong = (*worker, "layer", "head")
    return [
        listing(
            "Wrong layers",
            "Layers whose served output was not reproduced, with worst head, rank and host. One rank alone: a bad GPU.",
            Query(promql.reduce("max", wrong, promql.select("glassbox_attention_output_wrong"))),
            "short",
            wrong,
            value="error ratio",
        ),
        listing(
            "Where non-finite rows begin",
            "First layer with NaN or infinite scores of each rank: the lowest is where they come from.",
            Query(promql.reduce("min", worker, promql.select("glassbox_nonfinite_first_layer"))),
            "none",
            worker,
            sort=False,
            value="first layer",
        ),
    ]
