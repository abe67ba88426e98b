"""A healthy model under mixed traffic, compared with its baseline and its history: no alert about attention fires.

Of the shipped rules with short windows, in a real Prometheus. The short form runs with the other tests, the long one
(`make soak`, GLASSBOX_SOAK_S seconds) ten minutes.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import yaml

from glassbox.cli.dashboards.rules import alerts, build_groups, to_data
from glassbox.cli.demo.incident import SHORT, WINDOW_S
from glassbox.signals.baseline import from_engines, save_baseline
from glassbox.store.merge import MergedEngine, merge
from glassbox.store.snapshot import read_snapshots
from tests.e2e.mixed_traffic import MixedTraffic
from tests.prometheus_server import PrometheusServer
from tests.serving import GlassboxServer, require_tool, wait_for

pytestmark = pytest.mark.e2e

# Half a window, where the shipped rules wait for a whole one: the first second of a window is a handful of requests.
QUIET: Final = replace(SHORT, hold=dict.fromkeys(SHORT.hold, f"{WINDOW_S // 2}s"))
BASELINE_S: Final = 25.0
SHORT_S: Final = 25.0
LONG_S: Final = float(os.environ.get("GLASSBOX_SOAK_S", "600"))
# All about the model; those of glassbox itself fire here, because every step is measured.
ATTENTION: Final = {
    alert.title for alert in alerts(tuple(group for group in build_groups() if group.name != "glassbox-self"))
}


def measured(server: GlassboxServer) -> MergedEngine:
    """The one engine of the server, once its last rows are in the snapshot."""
    server.settled_rows()
    [engine] = merge(read_snapshots(server.run_dir))
    return engine


def watch(server: GlassboxServer, folder: Path, seconds: float) -> tuple[set[str], float]:
    """Save a baseline of some seconds of mixed traffic, then watch the same kind of traffic.

    Returns:
        alerts about attention that fired, and the largest drift index that counts for one.
    """
    require_tool("prometheus", "prometheus")
    rows = {"sample_rate": 1.0, "sampling": {"prefill_rows_per_request": 32, "max_rows_per_step": 1024}}
    server.edit_config(**rows)
    server.settled_rows()
    before = measured(server)
    errors = server.metric("glassbox_errors_total", stage="baseline") or 0.0
    rules = folder / "rules.yaml"
    rules.write_text(rules_text())
    with PrometheusServer(
        folder, [f"127.0.0.1:{server.port}"], interval_s=1, evaluation_s=1, rule_files=[rules]
    ) as prometheus:
        with MixedTraffic(server.url) as traffic:
            time.sleep(BASELINE_S)
        after = measured(server)
        arrays = {name: getattr(after, name) - getattr(before, name) for name in ("counts", "sums", "rows")}
        save_baseline(folder / "baseline.npz", from_engines([replace(after, **arrays)], "mixed traffic"))
        server.edit_config(**rows, baseline={"path": str(folder / "baseline.npz"), "window_s": WINDOW_S})
        with MixedTraffic(server.url) as traffic:
            time.sleep(seconds)
            history = f"model_layer_phase:glassbox_attention_sink_ratio:mean{SHORT.window}:avg{SHORT.history}"
            for series in ("glassbox_attention_drift_psi", history):  # without these, silence would prove nothing
                wait_for(lambda name=series: prometheus.query(name), bool, 60, series)
        assert [] == traffic.failures
        span = f"[{int(seconds + 60)}s]"
        fired = prometheus.query(f'count by (alertname) (count_over_time(ALERTS{{alertstate="firing"}}{span}))')
        counting = "|".join(SHORT.drift_statistics)
        index = prometheus.query(f'max(max_over_time(glassbox_attention_drift_psi{{statistic=~"{counting}"}}{span}))')
        assert errors == (server.metric("glassbox_errors_total", stage="baseline") or 0.0)
    return {dict(labels)["alertname"] for labels in fired} & ATTENTION, max(index.values())


def rules_text() -> str:
    """The shipped rules with the incident's short windows, as a rule file."""
    return yaml.safe_dump(to_data(build_groups(QUIET), QUIET), sort_keys=False)


class TestShort:
    @pytest.mark.timeout(900)
    def test_no_alert(self, server: GlassboxServer, tmp_path: Path) -> None:
        """Half a minute."""
        fired, index = watch(server, tmp_path, SHORT_S)
        print(f"largest index {index:.2f}")
        assert set() == fired


@pytest.mark.slow
class TestLong:
    @pytest.mark.timeout(LONG_S + 600)
    def test_no_alert(self, server: GlassboxServer, tmp_path: Path) -> None:
        """Ten minutes."""
        fired, index = watch(server, tmp_path, LONG_S)
        print(f"largest index {index:.2f}")
        assert set() == fired
