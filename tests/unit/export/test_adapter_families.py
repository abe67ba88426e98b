"""Statistics by LoRA adapter: merged by name, bounded, and exported beside the totals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from glassbox.core.accumulator_arrays import CUMULATIVE_ARRAYS, AdapterArrays
from glassbox.core.statistics import INDEX
from glassbox.export.families import adapter_series_count, build_families, effective_detail, series_count
from glassbox.export.family import Family
from glassbox.export.jsonl import WindowSummaries
from glassbox.export.otel import to_otel
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import MergedEngine, merge
from glassbox.store.snapshot import Snapshot, read_snapshots, write_snapshot
from tests.export_samples import make_snapshot


def with_adapters(snapshot: Snapshot, names: tuple[str, ...], limit: int = 3, other: int = 0) -> Snapshot:
    """Its rows dealt out to base, these adapters in turn, and others: slot n has the rows n + 1 times, to tell them."""
    factors = np.zeros(limit + 2, dtype=np.int64)
    factors[: len(names) + 1] = np.arange(len(names) + 1) + 1
    factors[-1] = other
    arrays = {}
    for name in CUMULATIVE_ARRAYS:
        total = getattr(snapshot, name).sum(axis=(0, 1))
        arrays[name] = np.multiply.outer(factors, total).astype(total.dtype)
    return replace(snapshot, by_adapter=AdapterArrays(**arrays), adapters=names)


def rows(engine: MergedEngine) -> dict[str, int]:
    assert engine.by_adapter is not None
    return {label: int(of.sum()) for (label,), of in zip(engine.by_adapter.labels, engine.by_adapter.rows, strict=True)}


def by_name(families: list[Family]) -> dict[str, Family]:
    return {family.name: family for family in families}


class TestFile:
    def test_everything_comes_back(self, tmp_path: Path) -> None:
        """Arrays with their types, and names of any characters."""
        snapshot = with_adapters(make_snapshot(), ('po"et\n', "\u00e4\u4e2d"), other=2)
        write_snapshot(tmp_path, snapshot)
        (found,) = read_snapshots(tmp_path)
        assert found.adapters == snapshot.adapters
        for name, array in vars(snapshot.by_adapter).items():
            np.testing.assert_array_equal(getattr(found.by_adapter, name), array)
            assert getattr(found.by_adapter, name).dtype == array.dtype

    def test_without_adapters_there_are_none(self, tmp_path: Path) -> None:
        """No array more is in the file."""
        with np.load(write_snapshot(tmp_path, make_snapshot())) as archive:
            assert not [name for name in archive if name.startswith("adapters_")]
        assert read_snapshots(tmp_path)[0].by_adapter is None

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"adapters": ("a", "a")}, "distinct names"),
            ({"adapters": (1,)}, "distinct names"),
            ({"adapters": ("a", "b", "c", "d")}, "at most 3 slots"),
            ({"adapters": ("a",), "by_adapter": None}, "at most 0 slots"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes: dict[str, Any], said: str) -> None:
        """A file may say anything."""
        with pytest.raises(ValueError, match=said):
            replace(with_adapters(make_snapshot(), ("a",)), **changes)


class TestMerge:
    def test_ranks_are_joined_by_name(self) -> None:
        """Two that met adapters in different orders, and one of which has not met all."""
        first = with_adapters(make_snapshot(seed=1, total_heads=4), ("a", "b"), other=7)
        second = with_adapters(make_snapshot(seed=2, head_offset=2, total_heads=4, rank=1), ("b",))
        (engine,) = merge([second, first])
        one, two = int(first.rows.sum()), int(second.rows.sum())
        assert rows(engine) == {"base": one + two, "a": 2 * one, "b": 3 * one + 2 * two, "other": 7 * one}
        assert engine.adapter_slots == 5

    def test_restarted_workers_bring_no_more_names_than_one_has_slots(self) -> None:
        """Those of the oldest stay; what comes beyond is among the others."""
        old = with_adapters(make_snapshot(seed=1), ("a", "b"), limit=2)
        new = with_adapters(replace(make_snapshot(seed=2), start_time_s=old.start_time_s + 50), ("c", "a"), limit=2)
        (engine,) = merge([new, old])
        before, after = int(old.rows.sum()), int(new.rows.sum())
        assert rows(engine) == {
            "base": before + after,
            "a": 2 * before + 3 * after,
            "b": 3 * before,
            "other": 2 * after,
        }

    def test_engines_are_kept_apart(self) -> None:
        """And one without adapters has none."""
        one = with_adapters(make_snapshot(seed=1), ("a",))
        two = make_snapshot(seed=2, engine="1")
        engines = merge([one, two])
        assert [engine.by_adapter is None for engine in engines] == [False, True]
        assert engines[1].adapter_slots == 0


class TestFamilies:
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_values_and_labels(self, detail: Any) -> None:
        """The same at every detail: over all layers and heads."""
        snapshot = with_adapters(make_snapshot(), ("poet",), other=5)
        found = by_name(build_families(merge([snapshot]), detail))
        assert snapshot.by_adapter is not None
        counted = found["glassbox_adapter_attention_rows_total"]
        assert counted.label_names == ("model_name", "engine", "phase", "adapter")
        assert {series.labels: series.value for series in counted.series} == {
            ("tiny/model", "0", phase, adapter): snapshot.by_adapter.rows[slot, p]
            for p, phase in enumerate(("prefill", "decode"))
            for slot, adapter in ((0, "base"), (1, "poet"), (4, "other"))
        }
        of_poet = [
            s for s in found["glassbox_adapter_attention_sink_ratio"].series if s.labels[2:] == ("decode", "poet")
        ]
        assert [s.buckets for s in of_poet] == [tuple(snapshot.by_adapter.counts[1, 1, INDEX["sink_ratio"]].tolist())]
        assert [s.sum for s in of_poet] == [snapshot.by_adapter.sums[1, 1, INDEX["sink_ratio"]]]
        assert all(s.sum is None for s in found["glassbox_adapter_attention_max_logit"].series)

    def test_without_adapters_there_are_none(self) -> None:
        """Not one series."""
        assert not [f for f in build_families(merge([make_snapshot()]), "layer") if "adapter" in f.name]

    def test_the_totals_stay_what_they_are(self) -> None:
        """Every other family is the same with and without."""
        snapshot = make_snapshot()
        with_them = build_families(merge([with_adapters(snapshot, ("a",))]), "layer")
        assert [f for f in with_them if "adapter" not in f.name] == build_families(merge([snapshot]), "layer")

    def test_names_are_escaped(self) -> None:
        """A quote and a line break in a name make no other line of the page; OTLP has it as it is."""
        name = 'po"et\n} 1'
        families = build_families(merge([with_adapters(make_snapshot(), (name,))]), "model")
        counted = by_name(families)["glassbox_adapter_attention_rows_total"]

        class Page(Collector):
            def collect(self) -> Any:
                return [to_metric(counted)]

        registry = CollectorRegistry()
        registry.register(Page())
        text = generate_latest(registry).decode()
        assert 'adapter="po\\"et\\n} 1"' in text
        assert len([line for line in text.splitlines() if not line.startswith("#")]) == len(counted.series)
        points = to_otel(counted, 1.0).data.data_points
        assert name in [point.attributes["glassbox.adapter"] for point in points]

    def test_the_series_are_those_that_are_foreseen(self) -> None:
        """Once every slot has a name; and they count for max_series."""
        engines = merge([with_adapters(make_snapshot(heads=4), ("a", "b", "c"), limit=3, other=1)])
        families = [f for f in build_families(engines, "layer") if "adapter" in f.name]
        foreseen = adapter_series_count(5)
        assert foreseen == sum(len(to_metric(family).samples) for family in families)
        assert (adapter_series_count(1), adapter_series_count(0)) == (0, 0)
        needed = series_count("layer", (4, 4)) + foreseen
        assert effective_detail("layer", needed, engines) == ("layer", None)
        assert effective_detail("layer", needed - 1, engines)[0] == "model"


class TestJsonl:
    def test_a_window_by_adapter(self) -> None:
        """What came since the line before, of adapters that have rows in it."""
        first = with_adapters(make_snapshot(seed=1), ("poet",))
        assert first.by_adapter is not None
        more = {name: getattr(first.by_adapter, name).copy() for name in CUMULATIVE_ARRAYS}
        more["rows"][1, 1] += 9
        second = replace(
            first,
            by_adapter=AdapterArrays(**more),
            time_s=first.time_s + 5,
            rows=first.rows + 1,
            instance=first.instance,
        )
        summaries = WindowSummaries()
        (line,) = summaries.summarize(merge([first]), "model")
        assert {(one["adapter"], one["phase"]) for one in line["adapters"]} == {
            (adapter, phase) for adapter in ("base", "poet") for phase in ("prefill", "decode")
        }
        (line,) = summaries.summarize(merge([second]), "model")
        (came,) = line["adapters"]
        assert (came["adapter"], came["phase"], came["rows"]) == ("poet", "decode", 9)
