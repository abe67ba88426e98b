"""The demo's numbers are those of the scrape, and its tables say what is missing."""

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, RenderableType

from glassbox.demo.summary import Distribution, Summary, exported_statistics, summarise
from glassbox.demo.table import format_value, layer_table, missing_samples, report, totals_table
from glassbox.statistics import STATISTICS, Phase, Statistic

LABELS = 'model_name="m",engine="0"'
ENTROPY = "glassbox_attention_entropy_ratio"
BY_NAME = {statistic.name: statistic for statistic in STATISTICS}


def scrape(text: str) -> Summary:
    return summarise(text_string_to_metric_families(text))


def histogram(metric: str, labels: str, buckets: dict[str, int], total: float | None = None) -> str:
    lines = [f'{metric}_bucket{{{labels},le="{le}"}} {count}' for le, count in buckets.items()]
    lines.append(f"{metric}_count{{{labels}}} {buckets['+Inf']}")
    if total is not None:
        lines.append(f"{metric}_sum{{{labels}}} {total}")
    return "\n".join([f"# TYPE {metric} histogram", *lines, ""])


def shown(renderable: RenderableType, width: int = 100) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def full_scrape() -> str:
    """Every exported statistic, both phases (decode only where there is no other), layers 0 and 11."""
    parts = [f"# TYPE {BY_NAME['max_logit'].metric}_window_max gauge"]
    for statistic in exported_statistics():
        for phase in Phase:
            if statistic.decode_only and phase != Phase.DECODE:
                continue
            for layer in (0, 11):
                labels = f'{LABELS},phase="{phase}",layer="{layer}"'
                le = str(statistic.buckets[0])
                parts.append(histogram(statistic.metric, labels, {le: 1, "+Inf": 4}, None if statistic.signed else 2.0))
    for layer in (0, 11):
        for phase in Phase:
            parts.append(f'glassbox_attention_rows_total{{{LABELS},phase="{phase}",layer="{layer}"}} 4')
    parts += [f"glassbox_steps_total{{{LABELS}}} 20", f"glassbox_sampled_steps_total{{{LABELS}}} 10"]
    parts += [f"glassbox_layers_observed{{{LABELS}}} 12", ""]
    return "\n".join(parts)


class TestQuantile:
    @pytest.mark.parametrize(
        ("expected", "share"),
        [
            (0.5, 0.25),  # 5 of 20 rows: half of the first bucket, which holds 10
            (1.0, 0.5),  # exactly its end
            (2.0, 0.75),  # half of the 10 rows between 1 and 3
            (3.0, 1.0),
        ],
    )
    def test_is_interpolated_in_its_bucket(self, expected: float, share: float) -> None:
        """Rows are taken as evenly spread inside a bucket, as histogram_quantile does."""
        distribution = Distribution({1.0: 10, 3.0: 20, math.inf: 20})
        assert expected == distribution.quantile(share, lower=0.0)

    def test_beyond_the_last_bound_ends_at_the_upper_end_of_the_range(self) -> None:
        """A ratio ends at 1, so rows above the last bound lie between it and 1."""
        assert 0.95 == pytest.approx(Distribution({0.9: 0, math.inf: 8}).quantile(0.5, 0.0, 1.0))

    def test_beyond_the_last_bound_of_an_open_range_is_that_bound(self) -> None:
        """Nothing is invented above the largest finite bound."""
        assert 4096.0 == Distribution({4096.0: 0, math.inf: 8}).quantile(0.5, 1.0)

    def test_below_the_first_bound_of_an_open_range_is_that_bound(self) -> None:
        """Nothing is invented below the smallest bound."""
        assert -10.0 == Distribution({-10.0: 8, 0.0: 8, math.inf: 8}).quantile(0.5)

    def test_empty_buckets_are_passed_over(self) -> None:
        """A bucket without rows holds no quantile."""
        assert 2.5 == Distribution({1.0: 0, 2.0: 0, 3.0: 4, math.inf: 4}).quantile(0.5, 0.0)

    def test_has_no_value_without_rows(self) -> None:
        """No rows, no number."""
        assert math.isnan(Distribution({1.0: 0, math.inf: 0}).quantile(0.5, 0.0))


class TestSummarise:
    def test_reads_mean_and_rows_per_layer_and_phase(self) -> None:
        """A layer's mean is its sum over its count; rows come from their own counter."""
        labels = f'{LABELS},phase="decode",layer="7"'
        summary = scrape(
            histogram(ENTROPY, labels, {"0.5": 1, "+Inf": 4}, 3.0) + f"glassbox_attention_rows_total{{{labels}}} 4\n"
        )
        assert 0.75 == summary.histograms["entropy_ratio", Phase.DECODE, 7].mean
        assert {(Phase.DECODE, 7): 4.0} == summary.rows

    def test_adds_heads_and_engines(self) -> None:
        """Series that differ in head or engine are one distribution of their layer."""
        series = [
            f'model_name="m",engine="{engine}",phase="decode",layer="0",head="{head}"'
            for engine in (0, 1)
            for head in (0, 1, 2)
        ]
        text = "".join(histogram(ENTROPY, labels, {"0.5": 1, "+Inf": 2}, 1.5) for labels in series)
        merged = scrape(text).histograms["entropy_ratio", Phase.DECODE, 0]
        assert ({0.5: 6.0, math.inf: 12.0}, 9.0) == (merged.cumulative, merged.total)

    def test_a_histogram_without_sum_has_a_median_and_no_mean(self) -> None:
        """`max_logit` may be negative and is exported without a sum."""
        text = histogram(BY_NAME["max_logit"].metric, f'{LABELS},phase="prefill"', {"0.0": 2, "5.0": 4, "+Inf": 4})
        distribution = scrape(text).histograms["max_logit", Phase.PREFILL, None]
        assert math.isnan(distribution.mean)
        assert 0.0 == distribution.quantile(0.5)

    def test_ignores_what_is_not_of_glassbox(self) -> None:
        """vLLM's own metrics stand in the same scrape."""
        assert Summary() == scrape('vllm:num_requests_running{engine="0"} 3\n')


class TestMissing:
    def test_a_complete_scrape_misses_nothing(self) -> None:
        """All statistics with rows in their phases: nothing is missing, and the report says so."""
        summary = scrape(full_scrape())
        assert [] == missing_samples(summary)
        assert f"All {len(exported_statistics())} exported statistics had samples." in shown(report(summary))

    @pytest.mark.parametrize("statistic", exported_statistics(), ids=lambda statistic: statistic.name)
    def test_a_statistic_without_series_is_named(self, statistic: Statistic) -> None:
        """Whichever statistic is absent from the scrape, it is the one that is named."""
        text = "\n".join(line for line in full_scrape().splitlines() if f"{statistic.metric}_" not in line)
        missing = missing_samples(scrape(text + "\n"))
        assert {statistic.name} == {name.split()[0] for name in missing}
        assert statistic.name in shown(report(scrape(text + "\n"))).split("No samples for")[1]

    def test_rows_in_one_phase_only_are_not_enough(self) -> None:
        """Decode rows don't make up for prefill rows, except where there are none by definition."""
        text = "\n".join(line for line in full_scrape().splitlines() if 'phase="prefill"' not in line)
        missing = missing_samples(scrape(text + "\n"))
        both = [statistic for statistic in exported_statistics() if not statistic.decode_only]
        assert [f"{statistic.name} (prefill)" for statistic in both] == missing

    def test_an_empty_scrape_misses_everything(self) -> None:
        """A server without the plugin is reported, not an error."""
        summary = scrape("")
        assert {statistic.name for statistic in exported_statistics()} == {
            name.split()[0] for name in missing_samples(summary)
        }
        assert "0 of 0 steps measured" in shown(report(summary))


class TestTables:
    def test_layers_come_in_the_order_of_their_numbers(self) -> None:
        """Layer 11 stands below layer 0, and lookback only in the decode table."""
        summary = scrape(full_scrape())
        lines = shown(layer_table(summary, Phase.DECODE)).splitlines()
        assert ["0", "11"] == [line.split()[0] for line in lines if line.split()[:1] in (["0"], ["11"])]
        assert "lookback" in "\n".join(lines)
        assert "lookback" not in shown(layer_table(summary, Phase.PREFILL))

    def test_every_column_fits_a_terminal_of_100_columns(self) -> None:
        """No name or number is cut off with an ellipsis."""
        summary = scrape(full_scrape())
        assert "…" not in shown(report(summary))

    def test_totals_name_each_statistic_and_phase(self) -> None:
        """One line per exported statistic and phase."""
        text = shown(totals_table(scrape(full_scrape())))
        expected = [
            [statistic.name, str(phase)]
            for statistic in exported_statistics()
            for phase in Phase
            if phase == Phase.DECODE or not statistic.decode_only
        ]
        found = [line.split()[:2] for line in text.splitlines() if line.split()[:1] and line.split()[0] in BY_NAME]
        assert expected == found

    @pytest.mark.parametrize(
        ("expected", "value"),
        [
            ("-", math.nan),
            ("0.000", 0.0),
            ("~0", 0.0001),
            ("0.940", 0.94),
            ("-4.62", -4.62),
            ("56.0", 56.0),
            ("1,372", 1372.4),
        ],
    )
    def test_numbers_keep_the_same_width_of_meaning(self, expected: str, value: float) -> None:
        """Three decimals below 1, fewer above."""
        assert expected == format_value(value)
