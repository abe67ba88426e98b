"""Merging snapshots, and the families made of them: exact numbers, names and labels."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.config.load import PrometheusConfig
from glassbox.core.accumulator_arrays import ARRAY
from glassbox.core.statistics import INDEX
from glassbox.export.families import (
    METRICS,
    build_families,
    effective_detail,
    fitting_detail,
    samples_per_place,
    series_count,
)
from glassbox.export.family import Family, Series
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import Detail, MergedEngine, aggregate, merge
from tests.export_samples import changed, make_snapshot, of_layers, split_heads


def assert_equal(expected: MergedEngine, found: MergedEngine, ignore: tuple[str, ...] = ()) -> None:
    for name in vars(expected):
        if name in ARRAY:
            np.testing.assert_array_equal(getattr(expected, name), getattr(found, name), err_msg=name)
        elif name == "checks":
            for part, array in vars(expected.checks).items():
                np.testing.assert_array_equal(array, getattr(found.checks, part), err_msg=part)
        elif name not in {"numbers", "workers"}:  # which tell the parts apart
            assert getattr(expected, name) == getattr(found, name), name
    for name in expected.numbers:
        if name not in ignore:
            assert expected.numbers[name] == found.numbers[name], name
    assert expected.numbers.keys() == found.numbers.keys()


def by_name(families: list[Family]) -> dict[str, Family]:
    return {family.name: family for family in families}


def values(family: Family) -> dict[tuple[str, ...], float]:
    return {series.labels: series.value for series in family.series}


class TestMerge:
    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 2**16), heads=st.integers(2, 6), data=st.data())
    def test_split_heads_equal_unsplit(self, seed: int, heads: int, data: st.DataObject) -> None:
        """Two tensor-parallel ranks side by side are what one rank with all heads would have been."""
        whole = make_snapshot(seed=seed, heads=heads)
        parts = split_heads(whole, data.draw(st.integers(1, heads - 1)))
        assert_equal(merge([whole])[0], merge(parts)[0])

    @settings(max_examples=50, deadline=None)
    @given(seed=st.integers(0, 2**16), at=st.integers(1, 4))
    def test_split_layers_equal_unsplit(self, seed: int, at: int) -> None:
        """Two pipeline stages bring different layers; both see every step, each observes its own layers."""
        whole = make_snapshot(
            seed=seed, layers=(0, 2, 3, 5, 9), layers_observed=5, layers_bypassed={}, dropped_rows={}, errors={}
        )
        parts = [
            of_layers(
                whole,
                half,
                instance=f"pp{number}",
                layers_observed=len(whole.layers[half]),
                canary_rows=whole.numbers["canary_rows"] if number == 0 else {},
            )
            for number, half in enumerate((slice(None, at), slice(at, None)))
        ]
        assert_equal(merge([whole])[0], merge(parts)[0])

    def test_layers_with_different_numbers_of_heads(self) -> None:
        """Two ranks with 1 and 3 heads of two layers: each layer has its own, and no others are shown."""
        ranks = [
            make_snapshot(
                seed=rank,
                instance=f"tp{rank}",
                rank=rank,
                heads=3,
                layer_heads=(1, 3),
                head_offsets=(rank, 3 * rank),
                total_heads=6,
            )
            for rank in range(2)
        ]
        (engine,) = merge(ranks)
        assert (2, 6) == engine.layer_heads
        for rank, snapshot in enumerate(ranks):
            np.testing.assert_array_equal(snapshot.rows[0, :1], engine.rows[0, rank : rank + 1])
            np.testing.assert_array_equal(snapshot.rows[1], engine.rows[1, 3 * rank : 3 * rank + 3])
        by_head = aggregate(engine, "head")
        assert [("0", "0"), ("0", "1"), *(("1", str(head)) for head in range(6))] == list(by_head.labels)
        np.testing.assert_array_equal(np.concatenate([engine.rows[0, :2], engine.rows[1]]), by_head.rows)

    @settings(max_examples=30, deadline=None)
    @given(order=st.permutations(range(5)))
    def test_the_order_of_files_does_not_matter(self, order: list[int]) -> None:
        """Ranks, restarts and engines in any order give the same result."""
        first, second = split_heads(make_snapshot(seed=1, heads=4), 2)
        snapshots = [
            first,
            second,
            replace(make_snapshot(seed=2, heads=2, total_heads=4), instance="again", start_time_s=1_700_000_050.0),
            make_snapshot(seed=3, engine="10"),
            make_snapshot(seed=4, engine="9"),
        ]
        expected = merge(snapshots)
        found = merge([snapshots[number] for number in order])
        assert [engine.engine for engine in found] == ["0", "9", "10"]
        for left, right in zip(expected, found, strict=True):
            assert_equal(left, right)

    @settings(max_examples=30, deadline=None)
    @given(seeds=st.lists(st.integers(0, 2**16), min_size=1, max_size=4, unique=True))
    def test_a_restarted_worker_never_lowers_a_counter(self, seeds: list[int]) -> None:
        """Each further instance of a rank adds to what the ones before have counted."""
        snapshots = [make_snapshot(seed=seed, start_time_s=1_700_000_000.0 + k) for k, seed in enumerate(seeds)]
        for n in range(1, len(snapshots)):
            before, after = merge(snapshots[:n])[0], merge(snapshots[: n + 1])[0]
            for name in ("counts", "rows", "nonfinite"):
                assert (getattr(after, name) >= getattr(before, name)).all()
            for name in ("steps", "sampled_steps", "overhead_seconds"):
                assert after.numbers[name] >= before.numbers[name]  # type: ignore[operator]
        np.testing.assert_array_equal(sum(s.counts for s in snapshots), merge(snapshots)[0].counts)
        assert merge(snapshots)[0].steps == 1000 * len(snapshots)

    def test_steps_are_those_of_the_furthest_rank(self) -> None:
        """Instances of one rank follow each other (sum), ranks run side by side (maximum)."""
        first, second = split_heads(make_snapshot(heads=2, steps=100, sampled_steps=10, overhead_seconds=1.0), 1)
        again = changed(second, instance="again", steps=7, sampled_steps=2, overhead_seconds=0.5)
        merged = merge([first, second, again])[0]
        assert (merged.steps, merged.sampled_steps, merged.numbers["overhead_seconds"]) == (107, 12, 1.5)

    def test_dropped_rows_and_errors_are_sums(self) -> None:
        """Every worker drops its own rows."""
        first, second = split_heads(make_snapshot(heads=2), 1)
        second = changed(second, dropped_rows={"max_rows": 2, "late": 1}, errors={"kernel": 4})
        merged = merge([first, second])[0]
        assert merged.numbers["dropped_rows"] == {"late": 1, "max_rows": 5}
        assert merged.numbers["errors"] == {"kernel": 4, "sampler": 1}

    def test_gauges_are_those_of_the_living(self) -> None:
        """What a dead instance last said about its window, rate or reload does not stick."""
        dead = make_snapshot(seed=1, instance="a", reload_successful=False, sample_rate=1.0, reload_timestamp_s=5.0)
        dead.window_max[:] = 1e6
        alive = make_snapshot(seed=2, instance="b", time_s=dead.time_s + 60, reload_timestamp_s=4.0)
        merged = merge([dead, alive])[0]
        assert merged.numbers["reload_successful"] is True
        assert (merged.numbers["sample_rate"], merged.numbers["reload_timestamp_s"]) == (0.01, 4.0)
        np.testing.assert_array_equal(alive.window_max, merged.window_max)

    def test_one_failed_reload_is_a_failed_reload(self) -> None:
        """A server has reloaded when all its workers have."""
        first, second = split_heads(make_snapshot(heads=2), 1)
        assert merge([first, changed(second, reload_successful=False)])[0].numbers["reload_successful"] is False

    def test_replicated_heads_count_once(self) -> None:
        """If two ranks measure the same head, the lower rank stands for it."""
        first = make_snapshot(seed=1)
        nothing = {"dropped_rows": {}, "errors": {}, "canary_rows": {}, "build": first.build}
        second = make_snapshot(seed=2, rank=1, **nothing, checks=split_heads(first, 1)[1].checks)
        assert_equal(merge([first])[0], merge([second, first])[0], ignore=("build",))

    def test_a_stage_without_observed_layers_counts_its_bypassed_ones(self) -> None:
        """A pipeline stage whose attention is bypassed altogether is part of the model."""
        observed = make_snapshot(layers=(0, 1), layers_bypassed={})
        bypassed = make_snapshot(seed=1, layers=(), layers_observed=0, layers_bypassed={"cache_type": 2})
        merged = merge([observed, bypassed])[0]
        numbers = merged.numbers
        assert (numbers["layers_observed"], numbers["layers_bypassed"]) == (2, {"cache_type": 2})
        assert merged.layers == (0, 1)

    def test_models_and_engines_stay_apart(self) -> None:
        """Data-parallel engines are labels, not sums."""
        merged = merge([make_snapshot(engine="1", steps=5), make_snapshot(engine="0", steps=7)])
        assert [(engine.engine, engine.steps) for engine in merged] == [("0", 7), ("1", 5)]

    def test_nothing_is_nothing(self) -> None:
        """No snapshots, no engines, no families."""
        assert merge([]) == []
        assert build_families([], "layer", {"otel": 3}) == []


class TestAggregate:
    @pytest.mark.parametrize(("detail", "labels"), [("model", ((),)), ("layer", (("3",), ("7",)))])
    def test_sums_over_what_is_not_told_apart(self, detail: str, labels: tuple[tuple[str, ...], ...]) -> None:
        """Model is the sum of the layers, a layer that of its heads; the window's maximum is a maximum."""
        engine = merge([make_snapshot(layers=(3, 7), heads=3)])[0]
        part = aggregate(engine, detail)  # type: ignore[arg-type]
        assert part.labels == labels
        assert part.rows.sum() == engine.rows.sum()
        assert part.counts.sum() == engine.counts.sum()
        assert part.window_max.max() == engine.window_max.max()

    def test_head_keeps_every_place(self) -> None:
        """Labels are global layer and head indices, in the order of the arrays."""
        engine = merge([make_snapshot(layers=(3, 7), heads=2, head_offset=2, total_heads=4)])[0]
        part = aggregate(engine, "head")
        assert part.labels == tuple((str(layer), str(head)) for layer in (3, 7) for head in range(4))
        assert part.rows[2].tolist() == engine.rows[0, 2].tolist()
        assert part.rows[0].tolist() == [0, 0]


class TestFamilies:
    def test_the_metrics_are_those_of_the_design(self) -> None:
        """Name, kind and labels of every metric."""
        engine = ("model_name", "engine")
        phase = (*engine, "phase")
        statistics = [
            "entropy_ratio",
            "effective_keys",
            "max_logit",
            "top1_ratio",
            "sink_ratio",
            "local_ratio",
            "distance_tokens",
            "lookback_ratio",
        ]
        expected: dict[str, tuple[str, tuple[str, ...]]] = {
            f"glassbox_attention_{name}": ("histogram", phase) for name in statistics
        }
        expected |= {
            "glassbox_attention_max_logit_window_max": ("gauge", phase),
            "glassbox_attention_rows_total": ("counter", phase),
            "glassbox_attention_nonfinite_rows_total": ("counter", phase),
            "glassbox_attention_drift_psi": ("gauge", (*phase, "statistic")),
            "glassbox_attention_drift_mean_shift": ("gauge", (*phase, "statistic")),
            **{
                f"glassbox_adapter_attention_{name}": ("histogram", (*phase, "adapter"))
                for name in INDEX
                if name != "self_logprob"
            },
            "glassbox_adapter_attention_rows_total": ("counter", (*phase, "adapter")),
            "glassbox_adapter_attention_nonfinite_rows_total": ("counter", (*phase, "adapter")),
            "glassbox_steps_total": ("counter", engine),
            "glassbox_sampled_steps_total": ("counter", engine),
            "glassbox_dropped_rows_total": ("counter", (*engine, "reason")),
            "glassbox_errors_total": ("counter", (*engine, "stage")),
            "glassbox_overhead_seconds_total": ("counter", engine),
            "glassbox_sample_rate": ("gauge", engine),
            "glassbox_layers_observed": ("gauge", engine),
            "glassbox_layers_bypassed": ("gauge", (*engine, "reason")),
            "glassbox_layers_certified": ("gauge", engine),
            "glassbox_canary_rows_total": ("counter", (*engine, "result")),
            "glassbox_attention_output_error_ratio": ("histogram", phase),
            "glassbox_attention_output_error_worst_ratio": ("gauge", (*engine, "layer", "head")),
            "glassbox_attention_output_wrong": ("gauge", (*engine, "layer", "head", "rank", "host")),
            "glassbox_nonfinite_first_layer": ("gauge", (*engine, "rank", "host")),
            "glassbox_kv_cache_quantization_error_ratio": ("gauge", (*engine, "layer", "tensor")),
            "glassbox_kv_cache_saturated_ratio": ("gauge", (*engine, "layer", "tensor")),
            "glassbox_probe_score": ("histogram", (*engine, "probe")),
            "glassbox_probe_requests_total": ("counter", (*engine, "probe", "outcome")),
            "glassbox_probe_missing_features_total": ("counter", (*engine, "probe")),
            "glassbox_signal_requests_total": ("counter", (*engine, "signal", "outcome")),
            "glassbox_scoring_seconds_total": ("counter", engine),
            "glassbox_actions_total": ("counter", ("rule", "action", "outcome")),
            "glassbox_watched_requests_delay_seconds": ("gauge", engine),
            "glassbox_traced_requests_active": ("gauge", engine),
            "glassbox_traced_requests_total": ("counter", (*engine, "why")),
            "glassbox_trace_refused_total": ("counter", (*engine, "reason")),
            "glassbox_traces_dropped_total": ("counter", engine),
            "glassbox_trace_skipped_steps_total": ("counter", engine),
            "glassbox_start_seconds": ("gauge", (*engine, "part")),
            "glassbox_build_info": ("gauge", (*engine, "version", "vllm_version", "backend")),
            "glassbox_config_last_reload_successful": ("gauge", engine),
            "glassbox_config_last_reload_timestamp_seconds": ("gauge", engine),
            "glassbox_worker_info": ("gauge", (*engine, "rank", "host", "layers", "heads")),
            "glassbox_snapshot_age_seconds": ("gauge", (*engine, "rank", "host", "layers")),
            "glassbox_export_interval_seconds": ("gauge", ()),
            "glassbox_exporter_up": ("gauge", ()),
            "glassbox_exporter_silence_seconds": ("gauge", ()),
            "glassbox_exporter_restarts_total": ("counter", ()),
            "glassbox_sink_last_success_timestamp_seconds": ("gauge", ("sink",)),
            "glassbox_sink_failures_total": ("counter", ("sink",)),
        }
        assert {family.name: (family.kind, family.label_names) for family in METRICS} == expected
        assert all(family.help.endswith(".") and len(family.bounds) <= 11 for family in METRICS)

    def test_values_of_one_engine(self) -> None:
        """Every plain metric shows the number of the snapshot."""
        families = by_name(build_families(merge([make_snapshot()]), "model"))
        key = ("tiny/model", "0")
        assert {
            name: values(family)[key]
            for name, family in families.items()
            if family.label_names == ("model_name", "engine")
        } == {
            "glassbox_steps_total": 1000,
            "glassbox_sampled_steps_total": 10,
            "glassbox_overhead_seconds_total": 0.125,
            "glassbox_traces_dropped_total": 0,
            "glassbox_sample_rate": 0.01,
            "glassbox_layers_observed": 2,
            "glassbox_layers_certified": 2,
            "glassbox_watched_requests_delay_seconds": 0,
            "glassbox_traced_requests_active": 1,
            "glassbox_trace_skipped_steps_total": 0,
            "glassbox_config_last_reload_successful": 1,
            "glassbox_config_last_reload_timestamp_seconds": 1_700_000_000.5,
        }
        assert values(families["glassbox_dropped_rows_total"]) == {(*key, "max_rows"): 3}
        assert values(families["glassbox_build_info"]) == {(*key, "0.1.0", "0.32.0", "CPU_ATTN"): 1}

    def test_a_histogram_holds_the_counts_of_its_statistic(self) -> None:
        """Buckets, count and sum of one layer and phase, added over the heads."""
        snapshot = make_snapshot(layers=(3, 7))
        family = by_name(build_families(merge([snapshot]), "layer"))["glassbox_attention_sink_ratio"]
        (series,) = [s for s in family.series if s.labels == ("tiny/model", "0", "decode", "7")]
        column = INDEX["sink_ratio"]
        buckets = tuple(int(n) for n in snapshot.counts[1, :, 1, column].sum(axis=0))
        total = float(snapshot.sums[1, :, 1, column].sum())
        assert series == Series(series.labels, sum(buckets), 1_700_000_000.0, buckets, total)
        assert series.value == snapshot.rows[1, :, 1].sum() - snapshot.nonfinite[1, :, 1].sum()
        assert family.label_names == ("model_name", "engine", "phase", "layer")

    def test_signed_statistics_have_no_sum(self) -> None:
        """Logits may be negative, so their sum is no counter."""
        families = by_name(build_families(merge([make_snapshot()]), "model"))
        assert {s.sum for s in families["glassbox_attention_max_logit"].series} == {None}
        assert None not in {s.sum for s in families["glassbox_attention_entropy_ratio"].series}

    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_lookback_is_never_in_prefill(self, detail: str) -> None:
        """Only generated tokens look back at the prompt."""
        families = by_name(build_families(merge([make_snapshot()]), detail))  # type: ignore[arg-type]
        phases = {s.labels[2] for s in families["glassbox_attention_lookback_ratio"].series}
        assert phases == {"decode"}

    @pytest.mark.parametrize(("detail", "places"), [("model", 1), ("layer", 2), ("head", 0)])
    def test_before_the_first_row(self, detail: str, places: int) -> None:
        """At model and layer, zeros are shown from the start; at head, nothing; no window maximum at all."""
        snapshot = make_snapshot()
        for name in ("counts", "sums", "rows", "nonfinite"):
            getattr(snapshot, name)[:] = 0
        snapshot.window_max[:] = -np.inf
        families = by_name(build_families(merge([snapshot]), detail))  # type: ignore[arg-type]
        rows = families.get("glassbox_attention_rows_total")
        assert len(rows.series if rows else ()) == 2 * places
        entropy = families.get("glassbox_attention_entropy_ratio")
        assert [s.value for s in entropy.series if entropy] == [0] * 2 * places if entropy else places == 0
        assert "glassbox_attention_max_logit_window_max" not in families

    def test_errors_of_the_exporter_belong_to_the_first_engine(self) -> None:
        """They are added once, not once per engine."""
        engines = merge([make_snapshot(engine=engine) for engine in ("0", "1")])
        family = by_name(build_families(engines, "model", {"otel": 2, "sampler": 5}))["glassbox_errors_total"]
        assert values(family) == {
            ("tiny/model", "0", "otel"): 2,
            ("tiny/model", "0", "sampler"): 6,
            ("tiny/model", "1", "sampler"): 1,
        }

    def test_labels_are_never_request_ids_or_ranks(self) -> None:
        """Cardinality is bounded by the model, not by the traffic; ranks are in what accuses one and in their list."""
        found = build_families(merge([make_snapshot()]), "head")
        names = {name for f in found if f.name != "glassbox_worker_info" for name in f.label_names}
        assert names == {
            "model_name", "engine", "phase", "layer", "head", "reason", "stage", "why", "result", "tensor", "part",
            "version", "vllm_version", "backend",
        }  # fmt: skip


class TestSeries:
    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    def test_the_count_is_what_prometheus_sees(self, detail: str) -> None:
        """`series_count` equals the samples of the attention metrics that are exposed."""
        engine = merge([make_snapshot(layers=(0, 1, 2), heads=4)])[0]
        families = build_families([engine], detail)  # type: ignore[arg-type]
        counted = ("glassbox_attention_", "glassbox_kv_cache_")
        exposed = sum(len(to_metric(f).samples) for f in families if f.name.startswith(counted))
        assert series_count(detail, (4, 4, 4)) == exposed  # type: ignore[arg-type]

    def test_samples_per_place(self) -> None:
        """7 histograms of 14 samples in two phases, less sums and counts of logits; one in one phase; three plain."""
        assert samples_per_place() == 7 * 14 * 2 - 4 + 14 + 3 * 2

    def test_too_fine_falls_back_with_a_warning(self) -> None:
        """The warning names setting, need, what is used instead, and the remedy."""
        engines = merge([make_snapshot(layers=(0, 1, 2), heads=4)])
        per_layer, per_head = series_count("layer", (4, 4, 4)), series_count("head", (4, 4, 4))
        assert effective_detail("head", per_head, engines) == ("head", None)
        detail, warning = effective_detail("head", per_head - 1, engines)
        assert detail == "layer"
        assert warning == (
            f"export.prometheus.max_series is {per_head - 1}, but detail head needs {per_head} series; "
            f"using detail layer with {per_layer} series; raise max_series to {per_head} or set detail to layer"
        )
        assert effective_detail("head", per_layer - 1, engines)[0] == "model"

    def test_model_is_the_coarsest(self) -> None:
        """Where even `model` is too much it is used, and said so."""
        detail, warning = effective_detail("model", 1, merge([make_snapshot()]))
        assert detail == "model"
        assert warning is not None
        assert "the coarsest there is" in warning

    @pytest.mark.parametrize("detail", ["model", "layer", "head"])
    @pytest.mark.parametrize("max_series", [1, 300, 5_000, 10_000_000])
    @pytest.mark.parametrize("shape", [(2, 2), (64,) * 80, (128,) * 128])
    def test_the_advice_is_accepted_and_enough(self, shape: tuple[int, ...], max_series: int, detail: Detail) -> None:
        """Each of the settings it names is valid, and with it nothing falls back; also for eight large engines."""
        shapes = [shape] * 8
        _, warning = fitting_detail(detail, max_series, shapes)
        if warning is None:
            return
        for advice in warning.rpartition("; ")[2].split(" or "):
            found = dict(re.findall(r"(max_series|detail)(?: to)? (\w+)", advice.replace(" to ", " ")))
            given = {"detail": found.get("detail", detail), "max_series": int(found.get("max_series", max_series))}
            PrometheusConfig.model_validate(given)
            assert (given["detail"], None) == fitting_detail(given["detail"], given["max_series"], shapes)
            assert found

    def test_all_engines_of_a_server_count(self) -> None:
        """Eight engines need eight times the series."""
        engines = merge([make_snapshot(seed=n, engine=str(n)) for n in range(8)])
        assert effective_detail("layer", series_count("layer", (2, 2)) * 7, engines)[0] == "model"


def test_families_are_the_same_whatever_process_builds_them() -> None:
    """Two merges of the same files give equal families, series by series."""
    snapshots = [make_snapshot(seed=n, engine=str(n)) for n in range(2)]
    for order in itertools.permutations(snapshots):
        assert build_families(merge(order), "head") == build_families(merge(snapshots), "head")
