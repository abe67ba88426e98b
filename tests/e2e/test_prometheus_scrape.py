"""A real Prometheus scrapes a real server beside mixed traffic, and what it has stored adds up."""

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from glassbox.cli.dashboards import promql
from glassbox.core.statistics import STATISTICS
from tests.e2e.mixed_traffic import MixedTraffic
from tests.e2e.samples import PREFIX, Key, counts_against_rows, glassbox_samples
from tests.prometheus_server import PrometheusServer
from tests.serving import GlassboxServer, require_tool, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SCRAPED_S: Final = 40.0
# A scrape may take long while two cores compute attention; Prometheus gives it this time.
INTERVAL_S: Final = 5.0
WINDOW: Final = "5m"  # everything since Prometheus was started
NUM_LAYERS: Final = 30


@dataclass(frozen=True)
class Scraped:
    """Traffic of all kinds, its end settled, and Prometheus still there to be asked.

    Attributes:
        text: `/metrics` as it was after the last request.
        samples: glassbox's samples in it; Prometheus has stored these values.
    """

    prometheus: PrometheusServer
    traffic: MixedTraffic
    text: str
    samples: dict[Key, float]


def stored(prometheus: PrometheusServer, name: str) -> dict[frozenset[tuple[str, str]], float]:
    """Values that Prometheus holds of a metric, without the labels of the target."""
    added = {"job", "instance"}
    return {
        frozenset((label, text) for label, text in labels if label not in added): value
        for labels, value in prometheus.query(name).items()
    }


@pytest.fixture(scope="module")
def scraped(
    _shared_server: Callable[[], GlassboxServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scraped]:
    """The shared server under traffic and Prometheus."""
    require_tool("prometheus", "prometheus")
    server = _shared_server()
    server.restore_config()
    folder = tmp_path_factory.mktemp("prometheus")
    with PrometheusServer(folder, [f"127.0.0.1:{server.port}"], interval_s=INTERVAL_S) as prometheus:
        prometheus.wait_for("up == 1")
        with MixedTraffic(server.url) as traffic:
            time.sleep(SCRAPED_S)
        server.settled_rows()
        text = server.metrics_text()
        samples = glassbox_samples(text)
        rows = {labels: value for (name, labels), value in samples.items() if name == "glassbox_attention_rows_total"}
        wait_for(
            lambda: stored(prometheus, "glassbox_attention_rows_total"),
            lambda found: found == rows,
            what="the last scrape",
        )
        yield Scraped(prometheus, traffic, text, samples)


def counters(samples: dict[Key, float]) -> list[str]:
    """Names of glassbox's counters, those of its histograms included."""
    return sorted({name for name, _ in samples if name.endswith(("_total", "_bucket", "_count", "_sum"))})


class TestScrape:
    def test_traffic_of_all_kinds_is_answered_while_prometheus_scrapes(self, scraped: Scraped) -> None:
        """No request fails; each kind was there."""
        assert scraped.traffic.failures == []
        assert set(scraped.traffic.answered) == {"chat", "streamed", "completion", "aborted", "long"}

    def test_every_scrape_succeeds(self, scraped: Scraped) -> None:
        """The target is up from the first scrape to the last, and is scraped all along."""
        assert set(scraped.prometheus.query(f"min_over_time(up[{WINDOW}])").values()) == {1.0}
        (scrapes,) = scraped.prometheus.query(f"count_over_time(up[{WINDOW}])").values()
        assert scrapes >= SCRAPED_S / INTERVAL_S * 0.9

    def test_counters_never_fall(self, scraped: Scraped) -> None:
        """PromQL's resets() is 0 for every counter, bucket, count and sum; all of them were scraped."""
        names = counters(scraped.samples)
        assert len(names) > 20
        for name in names:
            resets = scraped.prometheus.query(f"resets({name}[{WINDOW}])")
            assert resets, name
            assert set(resets.values()) == {0.0}, name

    def test_counters_rise_in_many_steps(self, scraped: Scraped) -> None:
        """The numbers are live, not delivered at the end: rows change between most scrapes."""
        changes = scraped.prometheus.query(f'min(changes(glassbox_attention_rows_total{{phase="decode"}}[{WINDOW}]))')
        assert min(changes.values()) >= SCRAPED_S / 6

    def test_prometheus_stores_what_metrics_shows(self, scraped: Scraped) -> None:
        """Every counter sample of /metrics, to the last digit, with its labels."""
        for name in counters(scraped.samples):
            shown = {labels: value for (found, labels), value in scraped.samples.items() if found == name}
            assert stored(scraped.prometheus, name) == shown, name

    def test_quantiles_are_found_for_each_layer(self, scraped: Scraped) -> None:
        """histogram_quantile over rates gives a number within the statistic's range for all layers."""
        for statistic in STATISTICS:
            if not statistic.exported:
                continue
            found = scraped.prometheus.query(
                f"histogram_quantile(0.5, sum by (le, layer) "
                f'(rate({statistic.metric}_bucket{{phase="decode"}}[{WINDOW}])))'
            )
            assert {dict(labels)["layer"] for labels in found} == {str(layer) for layer in range(NUM_LAYERS)}
            lower = -10.0 if statistic.lower is None else statistic.lower
            upper = statistic.buckets[-1] if statistic.upper is None else statistic.upper
            assert all(lower <= value <= upper for value in found.values()), statistic.name


class TestNumbers:
    def test_histogram_counts_equal_rows(self, scraped: Scraped) -> None:
        """For each label set `_count` is rows_total less the non-finite rows; lookback has decode rows only."""
        assert counts_against_rows(scraped.samples) == {}
        lookback = {labels for name, labels in scraped.samples if name == "glassbox_attention_lookback_ratio_count"}
        assert len(lookback) == NUM_LAYERS
        assert all(("phase", "decode") in labels for labels in lookback)

    def test_prometheus_finds_no_count_that_differs_from_the_rows(self, scraped: Scraped) -> None:
        """The same, asked in PromQL as an alert would; the comparison itself has all series."""
        for statistic in STATISTICS:
            if statistic.exported:
                series, matchers = promql.rows_of(statistic.name)
                count = f"{series}{{{', '.join(matchers)}}}"
                if matchers:  # its last bucket, which has a label more
                    count = f"sum without (le) ({count})"
                assert scraped.prometheus.query(f"{count} != glassbox_attention_rows_total") == {}
                equal = scraped.prometheus.query(f"{count} == glassbox_attention_rows_total")
                assert len(equal) == NUM_LAYERS * (1 if statistic.decode_only else 2)

    def test_no_error_was_counted(self, scraped: Scraped) -> None:
        """glassbox_errors_total did not rise under traffic and aborts."""
        rises = scraped.prometheus.query(f"increase(glassbox_errors_total[{WINDOW}])")
        assert all(value == 0 for value in rises.values()), rises


def lint(text: str) -> list[str]:
    """promtool's complaints about an exposition, a line each."""
    promtool = require_tool("promtool", "prometheus")
    run = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return (run.stdout + run.stderr).splitlines()


class TestPromtool:
    def test_metrics_pass_promtool(self, scraped: Scraped) -> None:
        """`promtool check metrics` on the whole of /metrics says nothing about a glassbox metric.

        It may say something about vLLM's own; a complaint begins with the metric's name, so they can be told apart.
        A text that can't be parsed would be one complaint without a name, at the end.
        """
        complaints = lint(scraped.text)
        assert [line for line in complaints if PREFIX in line] == []
        assert [line for line in complaints if not line.startswith(("vllm:", "http_", "process_", "python_"))] == []

    def test_glassbox_alone_is_clean(self, scraped: Scraped) -> None:
        """With only glassbox's lines, promtool is silent."""
        own = [line for line in scraped.text.splitlines() if PREFIX in line]
        assert lint("\n".join(own) + "\n") == []

    def test_promtool_does_complain(self) -> None:
        """The check can fail: a counter without _total and without help is named."""
        assert any("glassbox_steps" in line for line in lint("# TYPE glassbox_steps counter\nglassbox_steps 1\n"))
