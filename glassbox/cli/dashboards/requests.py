"""The dashboard Requests: what the model does with its context while it answers."""

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.adapter_panels import adapters
from glassbox.cli.dashboards.common import RATE_UNIT, config_tile, rows_tile, sample_rate_tile, statistic_line
from glassbox.cli.dashboards.layout import Page, Section
from glassbox.cli.dashboards.panels import Query, lines, note, tile
from glassbox.cli.dashboards.probe_panels import scores

UID = "glassbox-requests"
_DECODE = 'phase="decode"'
_LOW = 0.1  # a bucket bound of lookback_ratio


def _top() -> list[dashboard.Panel]:
    return [
        tile(
            "Lookback",
            "Median attention per prompt key against attention per generated key.",
            Query(promql.quantile(0.5, "lookback_ratio")),
            "percentunit",
        ),
        tile(
            "Rows with low lookback",
            f"Share of decode rows whose lookback ratio is at most {_LOW:g}: they hardly use the prompt.",
            Query(promql.share_up_to("lookback_ratio", _LOW)),
            "percentunit",
        ),
        tile(
            "Distance",
            "Mean distance, in tokens, from a generated token to the keys it attends to.",
            Query(promql.mean("distance_tokens", _DECODE)),
            "short",
            decimals=1,
        ),
        rows_tile("Decode rows measured", _DECODE),
        sample_rate_tile(),
        config_tile(),
    ]


def _context() -> list[dashboard.Panel]:
    by_model = Query(promql.mean("lookback_ratio", by=("model_name", "engine")), "{{model_name}} engine {{engine}}")
    low = Query(promql.share_up_to("lookback_ratio", _LOW, by=("model_name",)), "{{model_name}}")
    return [
        *statistic_line("lookback_ratio", exemplars=True),
        lines(
            "Lookback by model and engine",
            "Mean lookback ratio of each engine: one that differs from its siblings is broken.",
            [by_model],
            "percentunit",
            bounds=(0.0, 1.0),
            size=(12, 8),
        ),
        lines(
            "Rows with low lookback by model",
            f"Share of decode rows whose lookback ratio is at most {_LOW:g}.",
            [low],
            "percentunit",
            bounds=(0.0, 1.0),
            size=(12, 8),
        ),
    ]


def _measured() -> list[dashboard.Panel]:
    return [
        lines(
            "Rows measured by phase",
            "Attention rows measured per second, of prompts and of generated tokens.",
            [Query(promql.total("glassbox_attention_rows_total", by=("phase",)), "{{phase}}")],
            RATE_UNIT,
            bounds=(0.0, None),
            stacked=True,
            size=(12, 8),
        ),
        lines(
            "Dropped rows by reason",
            "Rows of measured steps that were left out, per second.",
            [Query(promql.total("glassbox_dropped_rows_total", by=("reason",)), "{{reason}}")],
            RATE_UNIT,
            bounds=(0.0, None),
            size=(12, 8),
        ),
    ]


def _traced() -> list[dashboard.Panel]:
    running = promql.reduce("sum", ("model_name", "engine"), promql.select("glassbox_traced_requests_active"))
    return [
        lines(
            "Traced requests",
            "Requests that are being traced: all of their measured rows are kept.",
            [Query(running, "{{model_name}} engine {{engine}}")],
            "short",
            bounds=(0.0, None),
            steps=True,
        ),
        lines(
            "Requests traced by why",
            "Requests traced per second, because the client asked (opt_in) or by requests.trace_rate (sampled).",
            [Query(promql.total("glassbox_traced_requests_total", by=("why",)), "{{why}}")],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
        lines(
            "Traces refused by reason",
            "Requests per second that should have been traced but were not, steps per second that traced ones lost to "
            "sampling.overhead_budget, and files of traces per second that were removed because the disk is full. They "
            "were served as any other.",
            [
                Query(promql.total("glassbox_trace_refused_total", by=("reason",)), "{{reason}}"),
                Query(promql.total("glassbox_trace_skipped_steps_total"), "steps lost to the budget"),
                Query(promql.total("glassbox_traces_dropped_total"), "removed: disk full"),
            ],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
    ]


def _rules() -> list[dashboard.Panel]:
    late = promql.reduce("max", ("model_name", "engine"), promql.select("glassbox_watched_requests_delay_seconds"))
    by = ("instance", "rule", "action", "outcome")
    rate = f"rate({promql.of_server('glassbox_actions_total')}[$__rate_interval])"
    return [
        lines(
            "Actions by rule and outcome",
            "What rules (actions in the YAML) did about traced requests per second, or would have done (dry_run).",
            [Query(promql.reduce("sum", by, rate), "{{instance}} {{rule}}: {{action}}, {{outcome}}")],
            RATE_UNIT,
            bounds=(0.0, None),
            size=(12, 8),
        ),
        lines(
            "Delay of watched requests",
            "Seconds that running requests lag behind which rules watch: above 1 rules apply late, because so many or "
            "so long requests are traced.",
            [Query(late, "{{model_name}} engine {{engine}}")],
            "s",
            bounds=(0.0, None),
            size=(12, 8),
        ),
    ]


def _one_request() -> dashboard.Panel:
    return note(
        "From here to one request",
        "How to get from a dot to the request and to its trace.",
        "The dots on the quantiles are **rows of traced requests**. Click one: `request_id` leads to its page "
        "(the tokens that each generated token attended to, and the attention to the spans that the client named), "
        "`trace_id` to the client's trace. They need Prometheus with exemplar storage and a scrape of glassbox's own "
        "port, as in `deploy/`. A client asks for a trace with "
        '`"vllm_xargs": {"glassbox": "trace", "glassbox_spans": ["question=message:-1"]}`.',
        size=(24, 4),
    )


def page() -> Page:
    """All requests together; single requests are not in Prometheus, because a request id is no label.

    They are reached through exemplars.
    """
    return Page(
        uid=UID,
        title="glassbox / Requests",
        description="How the requests being answered use their context: lookback, reach, keys of generated tokens. "
        "All requests together; the dots lead to single traced ones.",
        sections=[
            Section("Answers now", _top()),
            Section("Use of the prompt", _context()),
            Section(
                "Reach of generated tokens",
                [
                    *statistic_line("distance_tokens", _DECODE, exemplars=True),
                    *statistic_line("effective_keys", _DECODE, exemplars=True),
                ],
            ),
            Section("By LoRA adapter", adapters(), folded=True),
            Section("Probes and signals", scores(), folded=True),
            Section("What was measured", _measured()),
            Section("Traced requests", [*_traced(), _one_request()]),
            Section("Rules", _rules(), folded=True),
        ],
    )
