"""The alerts about silence: what is shown is old, or no longer reaches those who should get it.

Their metrics are made by the process that answers the scrape, so that they tell the truth about those who write. A
scrape that is missed, as on a machine that has too much to do, ends a series for Prometheus, and with it the time that
an alert waits: so each takes the last value of some minutes.
"""

from collections.abc import Iterator
from typing import Final

from glassbox.cli.dashboards.rule_model import ENGINE_LABELS, SERVER_LABELS, WHERE, Alert, RuleSettings

_SERVER: Final = ", ".join(SERVER_LABELS)


def _last(metric: str, s: RuleSettings) -> str:
    return f"last_over_time({metric}[{s.missed}])"


def _old(age: str, s: RuleSettings) -> str:
    """An age beyond what the interval of the exports explains."""
    interval = f"max by ({_SERVER}) ({_last('glassbox_export_interval_seconds', s)})"
    return f"{age}\n  > on ({_SERVER}) group_left ()\n({s.stale_s:g} + {s.stale_intervals} * {interval})"


def liveness_alerts(s: RuleSettings) -> Iterator[Alert]:
    """Of snapshots, the exporter and its sinks."""
    too_old = f"more than {s.stale_intervals} times export.interval_s and {s.stale_s:g} seconds"
    worker = ", ".join((*ENGINE_LABELS, "rank", "host"))
    yield Alert(
        "SnapshotStale",
        "critical",
        _old(f"max by ({worker}) ({_last('glassbox_snapshot_age_seconds', s)})", s),
        summary=f"glassbox's numbers are old in {WHERE}, rank {{{{ $labels.rank }}}} on {{{{ $labels.host }}}}",
        found="Age: {{ $value | humanizeDuration }}.",
        when=f"A worker has not written what it measures for {too_old}. What is shown of it stands still, its errors "
        "included, and no other alert can see it.",
    )
    yield Alert(
        "ExporterDown",
        "warning",
        f"min by ({_SERVER}) ({_last('glassbox_exporter_up', s)}) == 0",
        summary="glassbox's exporter does not work at {{ $labels.instance }}",
        found="",
        when="The configuration needs the exporter's process, but there is none, or it gives no sign of life. Nothing "
        "reaches the own port, OTLP, files or, with several API servers, vLLM's /metrics.",
    )
    last = f"max by ({_SERVER}, sink) ({_last('glassbox_sink_last_success_timestamp_seconds', s)})"
    yield Alert(
        "SinkFailing",
        "warning",
        # Of an exporter that is down that alone is told; of one that comes and goes, this.
        f"(\n{_old(f'time() - {last}', s)}\n)\nunless on ({_SERVER})\n"
        f"  max by ({_SERVER}) (max_over_time(glassbox_exporter_up[{s.hold['SinkFailing']}])) == 0",
        summary="glassbox can't export to {{ $labels.sink }} at {{ $labels.instance }}",
        found="",
        when=f"A sink of the exporter last succeeded {too_old} ago, or never has. The other sinks go on.",
    )
