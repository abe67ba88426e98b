"""Panels about silence: how old the numbers are, whether the exporter lives, and when each sink last succeeded."""

from grafana_foundation_sdk.models import dashboard

from glassbox.cli.dashboards import promql
from glassbox.cli.dashboards.common import RATE_UNIT
from glassbox.cli.dashboards.panels import Query, lines

_SERVER = "{{instance}}"


def liveness() -> list[dashboard.Panel]:
    """Five panels, of the process that answers the scrape."""
    interval = f"max({promql.of_server('glassbox_export_interval_seconds')})"
    return [
        lines(
            "Age of the snapshots",
            "Seconds since each worker last wrote what it has measured, against the interval of export.interval_s. "
            "All other numbers of the worker are as old.",
            [
                Query(
                    promql.reduce(
                        "max", ("instance", "engine", "rank"), promql.select("glassbox_snapshot_age_seconds")
                    ),
                    "{{instance}} engine {{engine}} rank {{rank}}",
                ),
                Query(interval, "interval"),
            ],
            "s",
            bounds=(0.0, None),
        ),
        lines(
            "Exporter",
            "1 where the exporter's process works, 0 where it is dead or hangs; empty where none is needed.",
            [Query(promql.reduce("min", ("instance",), promql.of_server("glassbox_exporter_up")), _SERVER)],
            "none",
            bounds=(0.0, 1.0),
            steps=True,
        ),
        lines(
            "Silence of the exporter",
            "Seconds since its last sign of life, of which it gives one every few seconds.",
            [
                Query(
                    promql.reduce("max", ("instance",), promql.of_server("glassbox_exporter_silence_seconds")),
                    _SERVER,
                ),
            ],
            "s",
            bounds=(0.0, None),
        ),
        lines(
            "Last success of each sink",
            "Seconds since the own port, OTLP, JSONL or records last did all that was asked.",
            [
                Query(
                    "time() - "
                    + promql.reduce(
                        "min", ("instance", "sink"), promql.of_server("glassbox_sink_last_success_timestamp_seconds")
                    ),
                    "{{instance}} {{sink}}",
                )
            ],
            "s",
            bounds=(0.0, None),
        ),
        lines(
            "Failures of the sinks, restarts of the exporter",
            "Failures per second, each round that a sink hangs included, and exporters that died.",
            [
                Query(_rate("glassbox_sink_failures_total", "sink"), "{{instance}} {{sink}}"),
                Query(_rate("glassbox_exporter_restarts_total"), "{{instance}} restarts"),
            ],
            RATE_UNIT,
            bounds=(0.0, None),
        ),
    ]


def _rate(metric: str, *by: str) -> str:
    return promql.reduce("sum", ("instance", *by), f"rate({promql.of_server(metric)}[$__rate_interval])")
