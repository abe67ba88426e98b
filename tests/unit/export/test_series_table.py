"""docs/serving.md tells how many samples come on top; the numbers are those of the code."""

import re
from pathlib import Path

from glassbox.config.model import PrometheusConfig
from glassbox.export.families import adapter_series_count, series_count

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) layers of (\d+) heads \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)


def test_samples_of_models() -> None:
    """Of each model in the table, at each detail."""
    rows = ROW.findall(TEXT)
    assert len(rows) == 3
    for layers, heads, *shown in rows:
        shape = (int(heads),) * int(layers)
        assert [series_count(detail, shape) for detail in ("model", "layer", "head")] == [
            int(number.replace(",", "")) for number in shown
        ]


def test_the_limit_of_a_server() -> None:
    """The default that falls back."""
    assert f"`export.prometheus.max_series` ({PrometheusConfig().max_series:,} for the whole server)" in TEXT


def test_what_a_baseline_adds() -> None:
    """As a part of what there is without one."""
    for detail, part in (("layer", 8), ("head", 7)):
        without, with_drift = (series_count(detail, (9,) * 30, is_there) for is_there in (False, True))
        assert part == round(without / (with_drift - without))
    assert "a baseline adds an eighth, at detail head a seventh" in TEXT


def test_what_adapters_add() -> None:
    """For each value of their label, with the eight of the example."""
    assert f"The time series, {adapter_series_count(10) // 10} for each of the\n10 values of `adapter`" in TEXT
