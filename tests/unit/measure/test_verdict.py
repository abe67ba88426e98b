"""A layer that does what glassbox believes is reproduced, whatever it computes in; one that doesn't is found."""

import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from glassbox.core.output_checks import (
    Verdict,
)
from glassbox.measure.verdict import judge
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
    def test_weights_that_are_rounded_alike(self, dtype: torch.dtype) -> None:
        """A sink before equal scores: one rounding error is that of all weights, the worst it can be."""
        for sink in np.arange(0.0, 12.0, 0.13):
            layer = Layer((300,) * 4, dtype=dtype, spread=0.0, sink=float(sink), common=3.0)
            assert verdict_of(layer, layer.served()).reproduced

    def test_merged_parts(self) -> None:
        """Cascade attention merges outputs of two parts of the keys, each rounded already."""
        for seed in range(20):
            layer = Layer((200, 300, 250, 400), seed=seed)
            assert verdict_of(layer, layer.served(parts=(100,))).reproduced


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
