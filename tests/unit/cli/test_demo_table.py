"""The demo's tables, and what they say is missing."""

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, RenderableType

from glassbox.cli.demo.table import layer_table, missing_samples, report, totals_table
from glassbox.core.statistics import STATISTICS, Phase, Statistic
from glassbox.view.measured import Measured, exported_statistics
from glassbox.view.scrape import read_families
from glassbox.view.text import format_value

LABELS = 'model_name="m",engine="0"'
BY_NAME = {statistic.name: statistic for statistic in STATISTICS}


def scrape(text: str) -> Measured:
    return read_families(text_string_to_metric_families(text), "a page", 0.0)


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
                buckets = {**{str(bound): 1 for bound in statistic.buckets}, "+Inf": 4}
                parts.append(histogram(statistic.metric, labels, buckets, None if statistic.signed else 2.0))
    for layer in (0, 11):
        for phase in Phase:
            parts.append(f'glassbox_attention_rows_total{{{LABELS},phase="{phase}",layer="{layer}"}} 4')
    parts += [f"glassbox_steps_total{{{LABELS}}} 20", f"glassbox_sampled_steps_total{{{LABELS}}} 10"]
    parts += [f"glassbox_layers_observed{{{LABELS}}} 12", ""]
    return "\n".join(parts)


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
