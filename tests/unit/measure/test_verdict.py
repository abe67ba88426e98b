"""A layer that does what glassbox believes is reproduced, whatever it computes in; one that doesn't is found."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from glassbox.core.output_checks import (
    NONFINITE_BOTH,
    NONFINITE_OUTPUT,
    NONFINITE_REFERENCE,
    OUTPUT_SUM,
    OUTPUT_SUMS,
    Verdict,
)
from glassbox.measure.verdict import judge, judge_layers
from tests.kernels.simulated_layer import Layer

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDOFF = 2.0**-8


def verdict_of(layer: Layer, output: torch.Tensor) -> Verdict:
    sums, _ = layer.check(output)
    assert sums.isfinite().all()
    return judge(sums.numpy(), layer.roundoff)


def any_layer(seed: int) -> tuple[Layer, dict[str, Any]]:
    """Of any shape, and how it is served without a fault."""
    pick = random.Random(seed)
    rows, longest = pick.choice([1, 1, 2, 3, 8, 16]), pick.choice([1, 2, 20, 300, 600])
    kv_dtype = pick.choice([None, None, None, E4M3, E5M2])
    kv_heads = pick.choice([1, 2, 4])
    layer = Layer(
        tuple(pick.randint(max(1, longest // 2), longest) for _ in range(rows)),
        heads=kv_heads * pick.choice([1, 2, 4]),
        kv_heads=kv_heads,
        size=pick.choice([64, 80, 128]),
        dtype=pick.choice([BF16, BF16, F16, F32]),
        kv_dtype=kv_dtype,
        kv_scales=(pick.choice([1.0, 0.7, 0.013]), pick.choice([1.0, 0.3, 0.02])) if kv_dtype else (1.0, 1.0),
        spread=pick.choice([0.0, 0.01, 1.0, 2.0, 2.0, 5.0, 30.0]),
        sink=pick.choice([0.0, 4.0, 4.0, 10.0, 100.0]),
        common=pick.choice([0.0, 0.3, 3.0]),
        window=pick.choice([None, None, None, 1, 50]),
        soft_cap=pick.choice([None, None, None, None, 30.0]),
        alibi=pick.random() < 0.15,
        learned_sinks=pick.choice([None, None, None, None, 0.0, 4.0, 40.0]),
        seed=seed,
    )
    how = {"exact_weights": pick.random() < 0.2, "rounded_kv": kv_dtype is not None and pick.random() < 0.5}
    return layer, how


class TestHealthy:
    @pytest.mark.parametrize("first_seed", range(0, 600, 100))
    def test_any_layer(self, first_seed: int) -> None:
        """One-hot, uniform and other attention, one row or many, one key or many, in all types: none fails."""
        for seed in range(first_seed, first_seed + 100):
            layer, how = any_layer(seed)
            verdict = verdict_of(layer, layer.served(**how))
            assert verdict.reproduced, f"seed {seed}: {verdict.what}"
            assert verdict.what == ""
            assert len(verdict.ratios) == len(layer.lengths)

    @pytest.mark.parametrize("dtype", [BF16, F16])
    @pytest.mark.parametrize(("length", "step"), [(300, 0.13), (4096, 0.7)])
    def test_weights_that_are_rounded_alike(self, dtype: torch.dtype, length: int, step: float) -> None:
        """A sink before equal scores, in all rows and heads: one rounding error is that of all weights, the worst it
        can be, and a sink with little weight makes the outputs grow hardly at all with the scores."""
        for sink in np.arange(0.0, 12.0, step):
            layer = Layer((length,) * 4, dtype=dtype, spread=0.0, sink=float(sink), common=3.0)
            verdict = verdict_of(layer, layer.served())
            assert verdict.reproduced, f"sink {sink}: {verdict.what}"

    def test_merged_parts(self) -> None:
        """Cascade attention merges outputs of two parts of the keys, each rounded already."""
        for seed in range(20):
            layer = Layer((200, 300, 250, 400), seed=seed)
            assert verdict_of(layer, layer.served(parts=(100,))).reproduced


def sums_of(rows: int = 2, layers: int = 1, heads: int = 3, **columns: float) -> np.ndarray:
    """Sums [R, L, H, C] of outputs that are as they should be, but for the given columns."""
    sums = np.zeros((rows, layers, heads, len(OUTPUT_SUMS)), dtype=np.float32)
    healthy = {"worst": 0.3, "error2": 1e-4, "noise2": 1e-4, "norm2": 10.0, "gain_noise2": 1e-4}
    for name, value in (healthy | columns).items():
        sums[..., OUTPUT_SUM[name]] = value
    return sums


class TestRatios:
    def test_of_rows(self) -> None:
        """Each row has that of its worst head."""
        sums = sums_of(rows=3)
        sums[1, 0, 2, OUTPUT_SUM["worst"]] = 0.8
        verdict = judge(sums[:, 0], ROUNDOFF)
        assert verdict.ratios == pytest.approx([0.3, 0.8, 0.3])
        assert verdict.ratio == pytest.approx(0.8)
        assert (verdict.head, verdict.what, verdict.reproduced) == (2, "", True)

    def test_layers_are_judged_by_themselves(self) -> None:
        """As if each came alone."""
        sums = sums_of(layers=3)
        sums[0, 1, 1, OUTPUT_SUM["worst"]] = 14.0
        verdicts = judge_layers(sums, ROUNDOFF)
        assert verdicts == [judge(sums[:, layer], ROUNDOFF) for layer in range(3)]
        assert [verdict.reproduced for verdict in verdicts] == [True, False, True]
        assert verdicts[1].what == "row error 14 times what rounding in bfloat16 explains, in head 1"

    def test_no_rows(self) -> None:
        """Nothing was found."""
        verdict = judge(sums_of(rows=0)[:, 0], ROUNDOFF)
        assert (list(verdict.ratios), verdict.ratio, verdict.what) == ([], 0.0, "")

    def test_errors_of_many_elements(self) -> None:
        """Each within what rounding explains, all together too large; of one head, then of the layer."""
        sums = sums_of(heads=16)
        sums[:, :, 5, OUTPUT_SUM["error2"]] = 49e-4
        assert judge(sums[:, 0], ROUNDOFF).what == (
            "head 5's mean error 7 times what rounding in bfloat16 makes (allowed 6)"
        )
        verdict = judge(sums_of(error2=25e-4)[:, 0], 2.0**-11)
        assert verdict.ratio == pytest.approx(1.25)
        assert verdict.what == "mean error 5 times what rounding in float16 makes (allowed 4), most in head 0"

    @pytest.mark.parametrize("scale", [1.0, 1e-25, 1e15])
    def test_outputs_of_any_size(self, scale: float) -> None:
        """Squares that a float32 doesn't hold fail nothing."""
        with np.errstate(over="ignore"):
            sums = sums_of() * np.float32(scale**2)
        sums[..., OUTPUT_SUM["worst"]] = 0.3
        assert judge(sums[:, 0], ROUNDOFF).reproduced

    def test_outputs_of_zero(self) -> None:
        """Values that are all 0: no error is no error, an error is infinitely large."""
        nothing = dict.fromkeys(OUTPUT_SUMS, 0.0)
        assert judge(sums_of(**nothing)[:, 0], ROUNDOFF).ratio == 0
        assert judge(sums_of(**(nothing | {"worst": np.inf, "error2": 1.0}))[:, 0], ROUNDOFF).ratio == np.inf

    def test_another_table(self) -> None:
        """Says how many columns there must be."""
        with pytest.raises(ValueError, match=f"sums must have {len(OUTPUT_SUMS)} columns, got 6"):
            judge(np.zeros((1, 1, 6)), ROUNDOFF)


class TestNotFinite:
    def test_neither_is(self) -> None:
        """Then the row says nothing."""
        sums = sums_of()
        sums[0, 0, 1] = 0.0
        sums[0, 0, 1, OUTPUT_SUM["nonfinite"]] = NONFINITE_BOTH
        assert judge(sums[:, 0], ROUNDOFF).reproduced

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            (NONFINITE_OUTPUT, "head 1's output is not finite where its keys and values give a finite one"),
            (NONFINITE_REFERENCE, "head 1's output is finite where its keys and values give one that is not"),
        ],
    )
    def test_only_one_is(self, code: int, said: str) -> None:
        """Then nothing can explain it."""
        sums = sums_of()
        sums[1, 0, 1] = 0.0
        sums[1, 0, 1, OUTPUT_SUM["nonfinite"]] = code
        verdict = judge(sums[:, 0], ROUNDOFF)
        assert verdict.ratios == [pytest.approx(0.3), np.inf]
        assert (verdict.ratio, verdict.head, verdict.what) == (np.inf, 1, said)

    def test_an_output_that_the_kernel_spoiled(self) -> None:
        """NaN in the served output of one head."""
        layer = Layer((40, 50))
        output = layer.served()
        output[1, 6, 3] = float("nan")
        verdict = verdict_of(layer, output)
        assert (verdict.ratio, verdict.head) == (np.inf, 6)


LENGTHS = tuple(range(200, 440, 20))
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # name: (the layer, the fault, what is said of it)
    "one slot off": ({}, {"shift": 1}, "times what rounding"),
    "another request's block table": ({}, {"other": 1}, "times what rounding"),
    "a window 16 too wide": ({"window": 100}, {"window": 116}, "times what rounding"),
    "no window": ({"window": 100}, {"window": None}, "times what rounding"),
    "scale 1 % too large": ({}, {"scale": 1.01}, r"scores are 1\.0\d\d times what queries and keys give"),
    "scale 1 % too small": ({}, {"scale": 0.99}, r"scores are 0\.9[89]\d times what queries and keys give"),
    "no soft cap of 30": ({"soft_cap": 30.0, "spread": 4.0}, {"capped": False}, "times what"),
    "no soft cap of 50": ({"soft_cap": 50.0, "spread": 4.0}, {"capped": False}, "times what"),
    "no sink": ({"learned_sinks": 4.0}, {"with_sink": False}, "times what"),
    "one head 2 % larger": ({}, {"gain": 1.02, "gained_head": 3}, r"head 3's output is 1\.02\d times what its keys"),
}


class TestFaults:
    @pytest.mark.parametrize("name", FAULTS)
    @pytest.mark.parametrize("rows", [8, 12])
    def test_a_fault_is_found(self, name: str, rows: int) -> None:
        """In bfloat16, from some rows of a few hundred keys, in every seed; the same layers without it are not."""
        options, fault, said = FAULTS[name]
        for seed in range(15):
            layer = Layer(LENGTHS[:rows], seed=seed, **options)
            verdict = verdict_of(layer, layer.served(**fault))
            assert not verdict.reproduced, f"seed {seed}: {verdict.ratio}"
            assert verdict_of(layer, layer.served()).reproduced
            assert re.search(said, verdict.what), verdict.what
