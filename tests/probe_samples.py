"""Probes for tests: of a few features, with numbers that can be computed by hand."""

import math
from pathlib import Path

import numpy as np

from glassbox.core.statistics import INDEX
from glassbox.signals.probe import Platt, Probe, ProbeFeature, Trained, write_probe
from glassbox.store.trace_record import RequestTrace

# Means and scales such that a trace of SmolLM2's or of `make_trace` scores neither 0 nor 1.
FEATURES = (
    ProbeFeature("answer_entropy_ratio_L0_H0", mean=0.4, scale=0.2, coefficient=1.5),
    ProbeFeature("answer_lookback_ratio_L0_H1", mean=0.5, scale=0.25, coefficient=-0.75),
)
INTERCEPT, SLOPE, OFFSET = 0.2, 1.25, -0.1


def make_probe(name: str = "drift", threshold: float = 0.5, features: tuple[ProbeFeature, ...] = FEATURES) -> Probe:
    """A probe whose label is `lost`."""
    return Probe(
        name=name,
        label="lost",
        features=features,
        intercept=INTERCEPT,
        calibration=Platt(slope=SLOPE, offset=OFFSET),
        threshold=threshold,
        trained=Trained("tiny/model", samples=100, positives=40, date="2026-11-30T00:00:00Z", data="f.parquet"),
    )


def write(folder: Path, name: str = "drift", **changes: object) -> Path:
    """The file of `make_probe`."""
    path = folder / f"{name}.json"
    write_probe(path, make_probe(name, **changes))  # type: ignore[arg-type]
    return path


def score_by_hand(stats: np.ndarray, layers: list[int], heads: list[int]) -> float:
    """The score of FEATURES from the answer's rows [T, L, H, statistics] alone, feature by feature."""
    z = INTERCEPT
    for statistic, head, mean, scale, coefficient in (
        ("entropy_ratio", 0, 0.4, 0.2, 1.5),
        ("lookback_ratio", 1, 0.5, 0.25, -0.75),
    ):
        values = stats[:, layers.index(0), heads.index(head), INDEX[statistic]].astype(float)
        values = values[np.isfinite(values)]
        z += coefficient * (values.sum() / len(values) - mean) / scale
    return 1 / (1 + math.exp(-(SLOPE * z + OFFSET)))


def score_of(trace: RequestTrace) -> float:
    """The same of a trace."""
    answer = trace.positions >= trace.prompt_len
    return score_by_hand(trace.stats[answer], list(trace.layers), list(trace.heads))
