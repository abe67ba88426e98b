"""The metrics of the output checks: values, labels, and what exists only while something is wrong."""

import math
from dataclasses import replace
from typing import Any

import pytest

from glassbox.core.counters import BYPASS_REASONS
from glassbox.core.output_checks import ERROR_RATIO_BUCKETS, LayerState
from glassbox.export.families import build_families
from glassbox.export.family import Family
from glassbox.export.otel import to_otel
from glassbox.export.prometheus import to_metric
from glassbox.store.merge import MergedEngine, merge
from glassbox.store.merged_checks import NonfiniteOrigin, WrongLayer
from tests.export_samples import changed, make_checks, make_snapshot

CERTIFIED, FAILED = LayerState.CERTIFIED, LayerState.FAILED
KEY = ("tiny/model", "0")
DETAILS = ["model", "layer", "head"]


def engine(layers: tuple[int, ...] = (3, 7, 8), **checks: Any) -> MergedEngine:
    return merge([make_snapshot(layers=layers, checks=make_checks(len(layers), **checks))])[0]


def family(of: MergedEngine, detail: str, name: str) -> Family | None:
    families = build_families([of], detail)  # type: ignore[arg-type]
    return next((one for one in families if one.name == f"glassbox_{name}"), None)


def values(of: MergedEngine, detail: str, name: str) -> dict[tuple[str, ...], float]:
    """By labels, those of the engine left out."""
    found = family(of, detail, name)
    return {} if found is None else {series.labels[2:]: series.value for series in found.series}


class TestErrorRatio:
    @pytest.mark.parametrize("detail", ["layer", "head"])
    def test_a_histogram_per_layer_and_phase(self, detail: str) -> None:
        """Heads are not told apart: rows are counted by their worst one."""
        of = engine()
        found = family(of, detail, "attention_output_error_ratio")
        assert found is not None
        assert (("model_name", "engine", "phase", "layer"), ERROR_RATIO_BUCKETS) == (found.label_names, found.bounds)
        series = {one.labels[2:]: one for one in found.series}
        assert 6 == len(series)
        counts = of.checks.error_counts[1, 1].tolist()
        assert tuple(counts) == series["decode", "7"].buckets
        assert (sum(counts), float(of.checks.error_sums[1, 1])) == (
            series["decode", "7"].value,
            series["decode", "7"].sum,
        )

    def test_the_model_is_the_sum_of_its_layers(self) -> None:
        """One histogram per phase."""
        of = engine()
        found = family(of, "model", "attention_output_error_ratio")
        assert found is not None
        assert [("prefill",), ("decode",)] == [series.labels[2:] for series in found.series]
        assert of.checks.error_counts[:, 1].sum(axis=0).tolist() == list(found.series[1].buckets)

    def test_it_exists_before_the_first_check(self) -> None:
        """With zeros, so that rates see the first row."""
        nothing = engine(error_counts=0, error_sums=0.0)
        assert {0} == set(values(nothing, "layer", "attention_output_error_ratio").values())


class TestFound:
    @pytest.mark.parametrize("detail", ["layer", "head"])
    def test_worst_ratio_names_the_head(self, detail: str) -> None:
        """Of every layer that was checked."""
        of = engine(worst_ratio=[0.5, math.nan, 0.25], worst_head=[1, -1, 0])
        assert {("3", "1"): 0.5, ("8", "0"): 0.25} == values(of, detail, "attention_output_error_worst_ratio")

    def test_of_the_model_the_worst_layer(self) -> None:
        """With its labels."""
        of = engine(worst_ratio=[0.25, math.nan, 0.5], worst_head=[1, -1, 0])
        assert {("8", "0"): 0.5} == values(of, "model", "attention_output_error_worst_ratio")

    @pytest.mark.parametrize("name", ["quantization_error", "saturated"])
    def test_what_the_cache_lost(self, name: str) -> None:
        """Per layer and tensor; of the model the largest of each; nothing where it is not known."""
        field = {"quantization_error": "kv_error", "saturated": "kv_saturated"}[name]
        of = engine(**{field: [[0.25, math.nan], [0.5, math.nan], [math.nan, 0.125]]})
        found = values(of, "layer", f"kv_cache_{name}_ratio")
        assert {("3", "key"): 0.25, ("7", "key"): 0.5, ("8", "value"): 0.125} == found
        assert {("7", "key"): 0.5, ("8", "value"): 0.125} == values(of, "model", f"kv_cache_{name}_ratio")

    @pytest.mark.parametrize("detail", DETAILS)
    def test_before_the_first_check_nothing_is_said(self, detail: str) -> None:
        """No 0 that would look like a perfect layer."""
        of = engine(worst_ratio=math.nan, worst_head=-1, kv_error=math.nan, kv_saturated=math.nan)
        names = {one.name for one in build_families([of], detail)}  # type: ignore[arg-type]
        assert not names & {
            "glassbox_attention_output_error_worst_ratio",
            "glassbox_kv_cache_quantization_error_ratio",
            "glassbox_kv_cache_saturated_ratio",
        }


class TestEngineNumbers:
    @pytest.mark.parametrize("detail", DETAILS)
    def test_certified_layers_are_counted(self, detail: str) -> None:
        """Also where there are none."""
        assert {(): 2} == values(engine(state=[CERTIFIED, FAILED, CERTIFIED]), detail, "layers_certified")
        assert {(): 0} == values(engine(state=0), detail, "layers_certified")

    def test_every_known_reason_and_result_has_a_series(self) -> None:
        """A sum over reasons is 0 if nothing is bypassed, not missing; a worker may have reasons of its own."""
        (of,) = merge([make_snapshot(layers_bypassed={"backend": 2, "other": 1}, canary_rows={})])
        expected = dict.fromkeys(((reason,) for reason in BYPASS_REASONS), 0) | {("backend",): 2, ("other",): 1}
        assert expected == values(of, "model", "layers_bypassed")
        assert {("reproduced",): 0, ("failed",): 0} == values(of, "model", "canary_rows_total")


class TestAccused:
    WRONG = (
        WrongLayer(3, 1, 0, "gpu-0", 4.0),
        WrongLayer(7, 0, 0, "gpu-0", math.inf),
        WrongLayer(7, 0, 1, "gpu-1", 2.0),
    )

    @pytest.mark.parametrize("detail", ["layer", "head"])
    def test_a_wrong_layer_is_named_with_head_rank_and_host(self, detail: str) -> None:
        """The value is by how much it is wrong."""
        found = values(replace(engine(), wrong=self.WRONG), detail, "attention_output_wrong")
        expected = {("3", "1", "0", "gpu-0"): 4.0, ("7", "0", "0", "gpu-0"): math.inf, ("7", "0", "1", "gpu-1"): 2.0}
        assert expected == found

    def test_at_detail_model_each_rank_names_its_worst_layer(self) -> None:
        """One series per rank and host."""
        found = values(replace(engine(), wrong=self.WRONG), "model", "attention_output_wrong")
        assert {("7", "0", "0", "gpu-0"): math.inf, ("7", "0", "1", "gpu-1"): 2.0} == found

    @pytest.mark.parametrize("detail", DETAILS)
    def test_where_non_finite_rows_begin(self, detail: str) -> None:
        """Layer 0 is a place, too."""
        origins = (NonfiniteOrigin(0, 1, "gpu-1"), NonfiniteOrigin(5, 0, "gpu-0"))
        found = values(replace(engine(), nonfinite_origins=origins), detail, "nonfinite_first_layer")
        assert {("1", "gpu-1"): 0, ("0", "gpu-0"): 5} == found

    @pytest.mark.parametrize("detail", DETAILS)
    def test_no_series_while_nothing_is_wrong(self, detail: str) -> None:
        """Their presence is the alarm."""
        for name in ("attention_output_wrong", "nonfinite_first_layer"):
            assert family(engine(), detail, name) is None

    def test_labels_in_opentelemetry(self) -> None:
        """The host by the semantic conventions' name, indices as numbers."""
        wrong = family(replace(engine(), wrong=self.WRONG), "layer", "attention_output_wrong")
        assert wrong is not None
        assert {
            "gen_ai.request.model": "tiny/model",
            "glassbox.engine": "0",
            "glassbox.layer": 3,
            "glassbox.head": 1,
            "glassbox.rank": 0,
            "host.name": "gpu-0",
        } == to_otel(wrong, 1.0).data.data_points[0].attributes


def test_no_two_series_have_the_same_labels() -> None:
    """Two stages of a rank on one host, both with non-finite rows and wrong layers."""
    stages = [
        changed(
            make_snapshot(layers=layers, checks=make_checks(len(layers), state=FAILED)),
            instance=f"stage{number}",
            first_nonfinite_layer=layers[0],
        )
        for number, layers in enumerate(((0, 1), (2, 3)))
    ]
    for detail in DETAILS:
        for one in build_families(merge(stages), detail):  # type: ignore[arg-type]
            names = [(sample.name, *sorted(sample.labels.items())) for sample in to_metric(one).samples]
            assert len(names) == len(set(names)), one.name
