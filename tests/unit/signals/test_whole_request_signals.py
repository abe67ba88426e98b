"""Signals of all tokens of a request, against dense float64 matrices from the definitions (tests/signal_truth.py)."""

import math
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox.core.signal_table import ON_REQUEST, SIGNAL_NAMES, SIGNALS
from glassbox.core.statistics import INDEX
from glassbox.signals import attention_tracker, cyclic, magnetic, routing
from glassbox.signals.kept_head import KeptHead
from glassbox.signals.on_demand import Deadline, Limits, OutOfTimeError
from glassbox.signals.operators import AttentionOperator, commutator_norm, hodge_split, leading_triples
from glassbox.signals.registry import COMPUTE, signal_values
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace
from tests import signal_truth as truth
from tests.signal_truth import Layer, attention_of, make_heads, measured_trace
from tests.trace_samples import with_arrays

STREAMING = ("spectral", "asymmetry", "selfattn", "laplacian")
ON_DEMAND = ("routing", "tracker", "cyclic", "magnetic")
# What a worker measures is rounded to float32, and so are the values.
TOLERANCE = 1e-5
LAYERS = {
    "plain": Layer(),
    "window": Layer(window=5),
    "soft cap": Layer(soft_cap=2.0, window=9),
    "learned sink": Layer(sink=0.7),
    "all": Layer(scale=0.3, soft_cap=5.0, window=11, sink=-1.0),
}

# Of `numbers()`, by upstream's formulas.
NUMBERS_STREAMING = {
    "spectral": {
        "singular_value_0": 6.6458929,
        "singular_value_1": 4.5471846,
        "singular_value_2": 1.3802968,
        "sv1": 6.6458929,
        "sv_entropy": 0.94736618,
        "sv_ratio": 1.4615401,
    },
    "asymmetry": {"G": 0.52707631, "Gamma": 0.33788784, "C": 0.40452595},
    "selfattn": {
        "attn_diag_logmean": -1.7544692,
        "eigval_0": 1.0,
        "eigval_1": 0.4378235,
        "eigval_2": 0.15955042,
        "eigval_5": 0.039546512,
    },
    "laplacian": {"eigval_0": 1.5269934, "eigval_1": 1.0003286, "eigval_2": 0.64803264, "eigval_5": 0.0},
}
ROW_NORMS = [0.24850999, 0.25064649, 0.2173259, 0.22864411, 0.17349793, 0.15368261]
NUMBERS_ON_DEMAND = {
    "routing": {
        "sv1": 1.0,
        "sv_entropy": 1.2572704,
        "sv_ratio": 1.2382773,
        "sigma2": 0.80757353,
        "sigma2_asym": 0.51942638,
        "commutator_norm": 0.27760485,
        "G": 0.5741912,
        "Gamma": 0.34322302,
        "C": 0.4603189,
        "curl_ratio": 0.80168227,
        "phi_hat": 0.11690701,
    },
    "tracker": {
        "sv1": 1.4056304,
        "sv_entropy": 1.1617974,
        "sv_ratio": 1.9760657,
        "sigma2": 0.71132774,
        "sigma2_asym": 0.58237749,
        "commutator_norm": 0.38302618,
    },
    "cyclic": {"T_cyc": 8.0},
    "magnetic": {"frustration": 0.2350674, "phase_curl": 6.4799308, "phase_curl_w": 2.0762968},
}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Nothing that a trace can hold may fill the exporter's log with numpy's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_values(found: SignalValues, expected: Mapping[str, float], layer: int, head: int) -> None:
    """Each expected value; squares, because roots magnify what rounding leaves of a 0."""
    for name, value in expected.items():
        here = float(found.by_place[name][layer, head])
        if name in {"G", "Gamma", "C"}:
            assert here**2 == pytest.approx(value**2, abs=TOLERANCE), name
        else:
            assert here == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


def expected_streaming(q: np.ndarray, k: np.ndarray, layer: Layer) -> dict[str, dict[str, float]]:
    attention = attention_of(q, k, layer)
    own = np.diag(attention)
    down = sorted(attention.sum(axis=0) - own, reverse=True)[:10]
    return {
        "spectral": truth.spectrum(q.astype(np.float64) @ k.astype(np.float64).T),
        "asymmetry": truth.asymmetry(attention),
        "selfattn": {
            "attn_diag_logmean": float(np.log(own).mean()),
            **{f"eigval_{i}": value for i, value in enumerate(sorted(own, reverse=True)[:10])},
        },
        "laplacian": {f"eigval_{i}": value for i, value in enumerate(down)},
    }


def expected_on_demand(q: np.ndarray, k: np.ndarray, layer: Layer) -> dict[str, dict[str, float]]:
    attention, scores = attention_of(q, k, layer), q.astype(np.float64) @ k.astype(np.float64).T
    found = {"cyclic": truth.cyclic(scores), "magnetic": truth.magnetic(layer.scale * scores)}
    return {**found, "routing": truth.routing(attention), "tracker": truth.tracker(attention)}


class TestTable:
    def test_every_signal_is_computed(self) -> None:
        """Those of the table, in its order, and no others."""
        assert list(SIGNAL_NAMES) == list(COMPUTE)

    def test_names_of_values(self) -> None:
        """A signal gives what the table says: for each layer and head, of the request, by token and by span."""
        q, k = make_heads(20)
        trace = measured_trace(q, k, logprobs=np.full(3, -1, dtype=np.float32))
        for signal, values in zip(SIGNALS, signal_values(trace, SIGNAL_NAMES).values(), strict=True):
            if signal.name == "focus":
                continue  # without a span it has nothing to say; its names are tested with one
            assert values.refused == ""
            assert set(signal.values) == set(values.by_place) | set(values.of_request)
            assert set(signal.of_request) == set(values.of_request)
            assert set(signal.by_token) == set(values.by_token)
            for place in values.by_place.values():
                assert (place.shape, place.dtype) == ((2, 4), np.float32)
            for row in values.by_token.values():
                assert (row.shape, row.dtype) == ((20, 2, 4), np.float32)


class TestStreaming:
    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("tokens", [1, 2, 3, 4, 40])
    def test_against_whole_matrices(self, kind: str, tokens: int, kept: bool) -> None:
        """Whatever the mask, for any length, with keys that several query heads share, with and without queries."""
        q, k = make_heads(tokens, seed=tokens, size=1.5)
        found = signal_values(measured_trace(q, k, layer=LAYERS[kind], kept=kept), STREAMING)
        assert [""] * 4 == [values.refused for values in found.values()]
        for layer, head in ((0, 0), (1, 3)):
            expected = expected_streaming(q[layer, head], k[layer, head], LAYERS[kind])
            for name, values in expected.items():
                assert_values(found[name], values, layer, head)
            row_norms = truth.row_norms(attention_of(q[layer, head], k[layer, head], LAYERS[kind]))
            found_norms = found["asymmetry"].by_token["row_norm"][:, layer, head]
            np.testing.assert_allclose(found_norms**2, row_norms**2, rtol=0, atol=TOLERANCE)

    def test_numbers(self) -> None:
        """Upstream's formulas on these queries and keys, made by tests/signal_truth.py and written down."""
        found = signal_values(numbers(), STREAMING)
        assert_numbers(found, NUMBERS_STREAMING)
        np.testing.assert_allclose(found["asymmetry"].by_token["row_norm"][:, 0, 0], ROW_NORMS, rtol=TOLERANCE)

    def test_fewer_tokens_than_values(self) -> None:
        """What a matrix of three tokens doesn't have is no value; neither is the second of one token."""
        q, k = make_heads(3)
        found = signal_values(measured_trace(q, k), STREAMING)
        assert np.isnan(found["spectral"].by_place["singular_value_3"]).all()
        assert np.isnan(found["laplacian"].by_place["eigval_3"]).all()
        assert np.isfinite(found["selfattn"].by_place["eigval_2"]).all()
        q, k = make_heads(1)
        assert np.isnan(signal_values(measured_trace(q, k), ["spectral"])["spectral"].by_place["sv_ratio"]).all()

    @given(size=st.floats(0.01, 12.0), seed=st.integers(0, 1000), tokens=st.integers(1, 30))
    @settings(max_examples=60, deadline=None)
    def test_asymmetry_from_sums(self, size: float, seed: int, tokens: int) -> None:
        """From flat attention to one that is all on single tokens; the norms of the rows add up to G^2."""
        q, k = make_heads(tokens, layers=1, heads=1, kv_heads=1, seed=seed, size=size)
        values = signal_values(measured_trace(q, k), ["asymmetry"])["asymmetry"]
        attention = attention_of(q[0, 0], k[0, 0], Layer())
        assert_values(values, truth.asymmetry(attention), 0, 0)
        row_norms = values.by_token["row_norm"][:, 0, 0]
        np.testing.assert_allclose(row_norms**2, truth.row_norms(attention) ** 2, rtol=0, atol=1e-6)
        assert float((row_norms**2).sum()) == pytest.approx(float(values.by_place["G"][0, 0]) ** 2, abs=TOLERANCE)

    def test_rows_on_the_diagonal(self) -> None:
        """Where each token sees but itself, up to e^-30, the difference of squares has no digits, and G does."""
        q = np.eye(6, dtype=np.float32)[None, None] * 30
        trace = measured_trace(q, np.ascontiguousarray(q / 15), layer=Layer(scale=0.5))
        expected = truth.asymmetry(attention_of(q[0, 0], q[0, 0] / 15, Layer(scale=0.5)))
        found = signal_values(trace, ["asymmetry"])["asymmetry"]
        assert 0 < expected["G"] < 1e-12
        assert found.by_place["G"][0, 0] == pytest.approx(expected["G"], rel=0.5)

    def test_one_direction(self) -> None:
        """Queries and keys that are all alike make one singular value; what the others' roots leave is no ratio."""
        trace = measured_trace(*make_heads(12))
        values = np.zeros_like(trace.singular_values)
        values[..., 0], values[..., 1:] = 50, 4e-7
        found = signal_values(with_arrays(trace, singular_values=values), ["spectral"])["spectral"].by_place
        assert [50, 0, 0] == [found[name][1, 1] for name in ("sv1", "singular_value_1", "sv_entropy")]
        assert np.isnan(found["sv_ratio"]).all()

    def test_learned_sink_of_unknown_strength(self) -> None:
        """Its logit follows from what the rows lack, be it next to nothing or nearly all of them."""
        q, k = make_heads(30)
        for sink in (-6.0, -3.0, 3.0, 9.0):
            found = signal_values(measured_trace(q, k, layer=Layer(sink=sink), kept=False), ["asymmetry"])["asymmetry"]
            assert found.refused == "", sink
            for place in ((0, 0), (1, 3)):
                expected = truth.asymmetry(attention_of(q[place], k[place], Layer(sink=sink)))
                for name, value in expected.items():
                    assert found.by_place[name][place] == pytest.approx(value, rel=2e-3, abs=1e-4), (sink, name)

    def test_rows_that_the_sums_lack(self) -> None:
        """Are no learned sink: rows and columns then don't have the same squares, and such a head says so."""
        q, k = make_heads(30)
        trace = measured_trace(q, k, kept=False)
        attention = attention_of(q[1, 2], k[1, 2], Layer())
        received, squares = trace.received.copy(), trace.received_squares.copy()
        received[1, 2] -= attention[20].astype(np.float32)
        squares[1, 2, :20] -= attention[20, :20].astype(np.float32) ** 2
        found = signal_values(with_arrays(trace, received=received, received_squares=squares), STREAMING)
        assert found["asymmetry"].refused.startswith(
            "1 of 8 heads have rows and columns that don't add up to the same: rows are missing from the sums"
        )
        assert np.argwhere(np.isnan(found["asymmetry"].by_place["G"])).tolist() == [[1, 2]]
        assert np.isnan(found["asymmetry"].by_token["row_norm"][:, 1, 2]).all()
        assert np.isfinite(found["laplacian"].by_place["eigval_0"]).all()

    def test_a_head_without_a_value(self) -> None:
        """A row that was not finite takes its head's values, not those of the others."""
        q, k = make_heads(12)
        trace = measured_trace(q, k)
        stats = trace.stats.copy()
        stats[3, 1, 2] = np.nan
        found = signal_values(with_arrays(trace, stats=stats), ["asymmetry", "selfattn", "laplacian"])
        for signal, name in (("asymmetry", "G"), ("selfattn", "eigval_0"), ("laplacian", "eigval_0")):
            assert np.isnan(found[signal].by_place[name]).sum() == 1
            assert np.isnan(found[signal].by_place[name][1, 2])


class TestMissingRows:
    @pytest.mark.parametrize("name", [*STREAMING, *ON_DEMAND])
    def test_refused(self, name: str) -> None:
        """A prefix from the cache, or sampled rows: no value, how many are missing, and what to ask for."""
        q, k = make_heads(12)
        trace = measured_trace(q, k)
        for positions in (np.arange(4, 16), np.arange(0, 24, 2)):
            values = signal_values(with_arrays(trace, positions=positions.astype(np.int32)), [name])[name]
            assert "tokens are missing" in values.refused
            assert "glassbox_prompt: all" in values.refused
            assert (values.by_place, values.by_token) == ({}, {})

    @pytest.mark.parametrize("name", [*STREAMING, *ON_DEMAND])
    def test_over_a_limit(self, name: str) -> None:
        """A trace that ends before its request does is not taken for the whole of it; one that lost nothing is."""
        q, k = make_heads(12)
        cut = measured_trace(q, k, prompt_len=10, num_generated=8, truncated=True)
        assert "rows of 5 of 17 tokens are missing" in signal_values(cut, [name])[name].refused
        whole = measured_trace(q, k, prompt_len=10, num_generated=3, truncated=True)
        assert signal_values(whole, [name])[name].refused == ""

    @pytest.mark.parametrize("name", ["spectral", "asymmetry", "laplacian", "heavy_hitters", "rauq", *ON_DEMAND])
    def test_arrays_that_were_not_asked_for(self, name: str) -> None:
        """Say by which name they are."""
        q, k = make_heads(12)
        trace = measured_trace(q, k, kept=False)
        nothing = np.zeros((2, 4, 0), dtype=np.float32)
        without = {"received": nothing, "received_squares": nothing, "singular_values": nothing, "keys": trace.keys[:0]}
        values = signal_values(with_arrays(trace, **without), [name])[name]
        assert f"name {name} in its glassbox_signals" in values.refused

    def test_no_row(self) -> None:
        """As of a model that isn't observed."""
        q, k = make_heads(2)
        trace = measured_trace(q, k)
        none = {name: trace.arrays[name][:0] for name in ("positions", "phases", "stats", "previous_mass", "queries")}
        none |= {name: trace.arrays[name][:0] for name in ("span_mass", "topk_positions", "topk_mass")}
        none |= {name: trace.arrays[name][:0] for name in ("mean_topk_positions", "mean_topk_mass")}
        values = signal_values(with_arrays(trace, **none), SIGNAL_NAMES)
        assert all("failed" not in one.refused for one in values.values())
        assert "no row of the request was measured" in values["spectral"].refused

    @given(seed=st.integers(0, 10_000), share=st.sampled_from([0.002, 0.05, 1.0]), tokens=st.integers(1, 12))
    @settings(max_examples=50, deadline=None)
    def test_numbers_of_any_kind(self, seed: int, share: float, tokens: int) -> None:
        """Whatever stands in a trace: nothing fails, nothing warns, and nothing is infinite."""
        rng = np.random.default_rng(seed)
        q, k = make_heads(tokens, layers=1, heads=2, seed=seed, kv_heads=1)
        trace = measured_trace(q, k, logprobs=np.full(3, -1, dtype=np.float32), layer=Layer(sink=0.3))
        names = ("stats", "previous_mass", *ON_REQUEST)
        odd = {}
        for name in names:
            values = trace.arrays[name].copy()
            at = rng.random(values.shape) < share
            values[at] = rng.choice([np.nan, np.inf, -np.inf, 0, -1, 1e38, -1e38, 1e-38], size=at.sum())
            odd[name] = values
        for name, values in signal_values(with_arrays(trace, **odd), SIGNAL_NAMES).items():
            assert "failed" not in values.refused, name
            for array in (*values.by_place.values(), *values.by_token.values()):
                assert not np.isinf(array).any()

    def test_unknown_name(self) -> None:
        """Is refused in words."""
        q, k = make_heads(2)
        assert "signals must be of spectral" in signal_values(measured_trace(q, k), ["x" * 500])["x" * 500].refused

    def test_what_is_no_trace(self) -> None:
        """Computing doesn't raise, whatever it is given: it says what failed."""
        nothing = cast(RequestTrace, SimpleNamespace(positions=np.arange(3)))
        for name, values in signal_values(nothing, SIGNAL_NAMES).items():
            assert values.refused.startswith(f"{name} failed: AttributeError: ")

    def test_unknown_way_of_attention(self) -> None:
        """Without the parameters of the scores there is no attention to be made of queries and keys."""
        q, k = make_heads(6)
        found = signal_values(
            with_arrays(measured_trace(q, k), score_params=np.zeros((2, 4, 0), np.float32)), ON_DEMAND
        )
        assert found["tracker"].refused.startswith("8 of 8 heads have other attention than their queries and keys give")
        assert np.isfinite(found["cyclic"].by_place["T_cyc"]).all()


class TestOnDemand:
    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("tokens", [2, 3, 4, 23])
    def test_against_whole_matrices(self, kind: str, tokens: int) -> None:
        """Dense, by LAPACK, for any length and mask."""
        q, k = make_heads(tokens, layers=1, heads=2, kv_heads=1, seed=tokens, size=1.5)
        found = signal_values(measured_trace(q, k, layer=LAYERS[kind]), ON_DEMAND)
        assert [""] * 4 == [values.refused for values in found.values()]
        for name, values in expected_on_demand(q[0, 1], k[0, 1], LAYERS[kind]).items():
            assert_values(found[name], values, 0, 1)

    def test_numbers(self) -> None:
        """Upstream's formulas on these queries and keys, made by tests/signal_truth.py and written down."""
        assert_numbers(signal_values(numbers(), ON_DEMAND), NUMBERS_ON_DEMAND)

    def test_one_token(self) -> None:
        """It has one singular value, no second, and nothing that could be unbalanced."""
        q, k = make_heads(1)
        found = signal_values(measured_trace(q, k), ON_DEMAND)
        assert [""] * 4 == [values.refused for values in found.values()]
        of_routing = {name: float(value[0, 0]) for name, value in found["routing"].by_place.items()}
        assert {name: of_routing[name] for name in ("sv1", "G", "Gamma", "C")} == {
            "sv1": 1.0,
            "G": 0.0,
            "Gamma": 0.0,
            "C": 0.0,
        }
        assert all(math.isnan(of_routing[name]) for name in ("sigma2", "sv_ratio", "phi_hat", "sigma2_asym"))
        assert found["cyclic"].by_place["T_cyc"][0, 0] == 0
        assert found["magnetic"].by_place["frustration"][0, 0] == 0

    @pytest.mark.parametrize("limits", [Limits(dense_tokens=0), Limits(dense_tokens=0, stored_bytes=0)])
    def test_matrix_free(self, limits: Limits) -> None:
        """Lanczos finds what LAPACK does, on a matrix that is kept and on one that is made again by tiles.

        Longer than a tile. The commutator's norm is exact if the matrix is kept, an estimate if not.
        """
        q, k = make_heads(300, layers=1, heads=1, kv_heads=1, size=1.2)
        trace = measured_trace(q, k, layer=LAYERS["all"])
        attention, scores = attention_of(q[0, 0], k[0, 0], LAYERS["all"]), q[0, 0].astype(np.float64) @ k[0, 0].T
        for module, expected in (
            (attention_tracker, truth.tracker(attention)),
            (routing, truth.tracker(attention / np.sqrt(attention.sum(axis=0)))),
            (magnetic, truth.magnetic(LAYERS["all"].scale * scores)),
        ):
            found = module.compute(trace, limits)
            assert found.refused == ""
            if "commutator_norm" in expected and not limits.stored_bytes:
                estimate = float(found.by_place["commutator_norm"][0, 0])
                assert estimate == pytest.approx(expected.pop("commutator_norm"), rel=0.1)
            assert_values(found, expected, 0, 0)

    def test_tiles_and_whole(self) -> None:
        """Operator by operator, the sweep cut too."""
        q, k = make_heads(530, layers=1, heads=1, kv_heads=1)
        head = KeptHead(q[0, 0].astype(np.float64), k[0, 0].astype(np.float64), scale=0.4, window=100)
        whole, tiles = (routing.routing_values(head, Deadline(60), Limits(stored_bytes=n)) for n in (1 << 27, 0))
        for name, value in whole.items():
            assert tiles[name] == pytest.approx(value, rel=0.1 if name == "commutator_norm" else 1e-7), name

    def test_equal_singular_values(self) -> None:
        """Each token sees but itself: the identity, where Lanczos has no direction to prefer."""
        q = np.eye(40)[None, None].astype(np.float32) * 6
        trace = measured_trace(q, q, layer=Layer(scale=1.0))
        for limits in (Limits(), Limits(dense_tokens=0)):
            found = attention_tracker.compute(trace, limits)
            assert found.refused == ""
            for i in range(4):
                assert found.by_place[f"singular_value_{i}"][0, 0] == pytest.approx(1, abs=1e-6)
            assert found.by_place["commutator_norm"][0, 0] == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("limits", [Limits(), Limits(dense_tokens=0), Limits(dense_tokens=0, stored_bytes=0)])
    def test_nothing_to_find(self, limits: Limits) -> None:
        """An operator that is 0 has no direction for Lanczos to begin with, and its value is 0."""
        for q in (np.zeros((40, 8)), np.eye(40) * 60):
            head = KeptHead(q, q, scale=1.0)
            magnetic_values = magnetic.magnetic_values(head, Deadline(60), limits)
            assert {"frustration": 0, "phase_curl": 0, "phase_curl_w": 0} == magnetic_values
        assert 0 == attention_tracker.tracker_values(head, Deadline(60), limits)["sigma2_asym"]
        assert 0 == routing.routing_values(head, Deadline(60), limits)["phi_hat"]
        drained = KeptHead(q, q, scale=1.0, sink=1e6)
        assert {} == routing.routing_values(drained, Deadline(60), limits)
        assert {} == attention_tracker.tracker_values(drained, Deadline(60), limits)

    def test_ties(self) -> None:
        """Tokens that are all alike: of each pair the earlier one wins, so there is no cycle and no frustration."""
        q = np.full((1, 1, 300, 5), 0.1, dtype=np.float32)
        found = signal_values(measured_trace(q, q / 3, kept=True), ["cyclic", "magnetic"])
        assert found["cyclic"].by_place["T_cyc"][0, 0] == 0
        assert found["magnetic"].by_place["phase_curl"][0, 0] == 0
        assert found["magnetic"].by_place["frustration"][0, 0] == pytest.approx(0, abs=1e-9)

    def test_scores_that_cancel(self) -> None:
        """S_ij = -S_ji has an angle of 0 by definition, and no number that isn't one."""
        q = np.array([[[[1, 0], [0, 1], [1, 1]]]], dtype=np.float32)
        k = np.array([[[[0, 1], [-1, 0], [-1, 1]]]], dtype=np.float32)
        scores = q[0, 0].astype(np.float64) @ k[0, 0].T
        assert (scores + scores.T == 0).all()
        found = signal_values(measured_trace(q, k), ["magnetic", "cyclic"])
        assert_values(found["magnetic"], truth.magnetic(Layer().scale * scores), 0, 0)
        assert_values(found["cyclic"], truth.cyclic(scores), 0, 0)

    @given(seed=st.integers(0, 10_000), tokens=st.integers(3, 12))
    @settings(max_examples=40, deadline=None)
    def test_triples_one_by_one(self, seed: int, tokens: int) -> None:
        """Small whole numbers, so that many scores are equal."""
        rng = np.random.default_rng(seed)
        q, k = rng.integers(-1, 2, (2, 1, 1, tokens, 3)).astype(np.float32)
        found = signal_values(measured_trace(q, k), ["cyclic"])["cyclic"]
        assert_values(found, truth.cyclic(q[0, 0] @ k[0, 0].T), 0, 0)

    def test_known_tournament(self) -> None:
        """Three tokens of which each beats the next: one cycle, as many as there can be."""
        assert cyclic.cyclic_triples(np.array([1, 1, 1])) == 1
        assert cyclic.cyclic_triples(np.array([2, 1, 0])) == 0


class TestBounds:
    def trace(self) -> RequestTrace:
        return measured_trace(*make_heads(30))

    @pytest.mark.parametrize("module", [routing, attention_tracker, cyclic, magnetic])
    def test_each_says_which(self, module: object) -> None:
        """Tokens, places, seconds; heads that were done before keep their values."""
        compute = module.compute  # type: ignore[attr-defined]
        assert "is for at most 20 tokens, got 30" in compute(self.trace(), Limits(tokens=20)).refused
        few = compute(self.trace(), Limits(places=3))
        assert (
            few.refused == "5 of 8 heads are over the bound of 3 layers x heads; ask for fewer with glassbox_layers "
            "and glassbox_heads"
        )
        name = next(iter(few.by_place))
        assert np.isfinite(few.by_place[name]).tolist() == [[True, True, True, False], [False] * 4]
        late = compute(self.trace(), Limits(seconds=-1))
        assert late.refused.startswith("8 of 8 heads were not done within -1 s; ask for fewer")
        assert np.isnan(late.by_place[name]).all()

    def test_time_ends_amid_a_head(self) -> None:
        """Each tile looks at the clock."""
        q, k = make_heads(30)
        head = KeptHead(q[0, 0].astype(np.float64), k[0, 0].astype(np.float64), scale=0.5)
        with pytest.raises(OutOfTimeError):
            AttentionOperator(head, Deadline(-1), Limits())

    def test_not_finite(self) -> None:
        """A key that isn't finite takes its heads' values."""
        trace = self.trace()
        keys = trace.keys.copy()
        keys[4, 1, 2, 0] = np.inf
        values = signal_values(with_arrays(trace, keys=keys), ["cyclic"])["cyclic"]
        assert values.refused.startswith("1 of 8 heads have queries or keys that are not finite")
        assert np.isnan(values.by_place["T_cyc"][1, 2])

    def test_attention_that_is_another(self) -> None:
        """With a bias, p isn't what queries and keys give: the measured diagonal says so, and there is no value."""
        trace = self.trace()
        stats = trace.stats.copy()
        stats[1:, 0, 1, INDEX["self_logprob"]] += 0.7
        found = signal_values(with_arrays(trace, stats=stats), ON_DEMAND)
        for name in ("routing", "tracker"):
            assert found[name].refused.startswith("1 of 8 heads have other attention than their queries and keys give")
            assert np.isnan(found[name].by_place["sv1"]).sum() == 1
        assert found["cyclic"].refused == found["magnetic"].refused == ""

    def test_a_head_that_does_not_converge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is said; the scores of the others are there."""
        monkeypatch.setattr("glassbox.signals.operators._MOST_RESTARTS", 1)
        q, k = make_heads(80, layers=1, heads=1, kv_heads=1, dim=64, size=3)
        found = attention_tracker.compute(measured_trace(q, k), Limits(dense_tokens=0))
        assert found.refused.startswith("1 of 1 heads did not converge (singular values)")


class TestOperators:
    def test_commutator_and_split(self) -> None:
        """From products of the whole matrix, without its symmetric part."""
        q, k = make_heads(50, layers=1, heads=1, kv_heads=1, size=2)
        head = KeptHead(q[0, 0].astype(np.float64), k[0, 0].astype(np.float64), scale=0.5)
        columns = np.random.default_rng(0).random(50)
        operator = AttentionOperator(head, Deadline(60), Limits(), columns)
        matrix = attention_of(q[0, 0], k[0, 0], Layer()) * columns
        symmetric, skew = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
        expected = np.linalg.norm(symmetric @ skew - skew @ symmetric)
        assert commutator_norm(operator) == pytest.approx(expected, rel=1e-9)
        split = hodge_split(operator)
        assert {name: split[name] for name in ("G", "Gamma", "C")} == pytest.approx(truth.asymmetry(matrix), rel=1e-9)
        left, values, right = leading_triples(operator, Limits(dense_tokens=0))
        np.testing.assert_allclose(matrix @ right, left * values, atol=1e-6)


def numbers() -> RequestTrace:
    """Six tokens of one head whose queries and keys are small fractions."""
    i, d = np.mgrid[0:6, 0:4]
    q = ((5 * i + 3 * d) % 7 - 3) / 2
    k = ((2 * i + 5 * d * d) % 9 - 4) / 4
    return measured_trace(q[None, None].astype(np.float32), k[None, None].astype(np.float32), layer=Layer(scale=0.5))


def assert_numbers(found: Mapping[str, SignalValues], expected: Mapping[str, Mapping[str, float]]) -> None:
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert_values(found[name], values, 0, 0)
