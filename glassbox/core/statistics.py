"""THE table of statistics: name, unit, buckets, meaning.

Owns what is measured and in which column it stands. Config, kernels, accumulators, exporters, docs and dashboards
derive from it; no other module lists statistics. It holds no code that computes them (that is `kernels/`).

A row is one query token of one request in one layer and one head. With s_j the row's scores over its n visible keys
(scale * q.k_j, then soft cap, ALiBi bias, sliding window and causal mask) and m = max s_j:

    Zk = sum e^(s_j - m)    Z = Zk + e^(sink - m) with a learned sink, else Z = Zk    p_j = e^(s_j - m) / Z
    E  = sum e^(s_j - m) (s_j - m)    Z2 = sum e^(2 (s_j - m))

Masses (top1, sink, local, self) are shares p_j of the whole softmax, a learned sink included, as the model uses them.
Shapes (entropy, effective keys, distance) describe how the mass that goes to keys is spread, so they use Zk: with a
learned sink they would otherwise leave the ranges given here.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Phase(StrEnum):
    """Of a row: `prefill` if its token belongs to the prompt, `decode` if it was generated."""

    PREFILL = "prefill"
    DECODE = "decode"


PHASES: Final = (Phase.PREFILL, Phase.DECODE)


@dataclass(frozen=True)
class Statistic:
    """One number per row.

    Attributes:
        name: of the statistic; the metric is `glassbox_attention_<name>`.
        unit: OpenTelemetry unit (UCUM); `1` is dimensionless.
        formula: in the symbols of this module's docstring.
        lower, upper: range of the value; None is unbounded (or bounded by n).
        buckets: upper bounds (`le`), ascending, without +Inf. All statistics have the same number of them,
            because the accumulators are one tensor.
        meaning: help text of the metric.
        decode_only: True if only decode rows have it.
        exported: True if it has a histogram metric; the others appear in JSONL and in traced requests.
    """

    name: str
    unit: str
    formula: str
    lower: float | None
    upper: float | None
    buckets: tuple[float, ...]
    meaning: str
    decode_only: bool = False
    exported: bool = True

    @property
    def metric(self) -> str:
        """Prometheus name of the histogram."""
        return f"glassbox_attention_{self.name}"

    @property
    def signed(self) -> bool:
        """True if values may be negative: such a histogram has no `_sum` (OpenMetrics, OpenTelemetry)."""
        return self.lower is None or self.lower < 0


_RATIO_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 0.99)

STATISTICS: Final[tuple[Statistic, ...]] = (
    Statistic(
        name="entropy_ratio",
        unit="1",
        formula="(ln Zk - E / Zk) / ln n; 0 if n = 1",
        lower=0.0,
        upper=1.0,
        buckets=(0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        meaning="Entropy of the attention over the keys, as a share of the largest possible entropy (ln n).",
    ),
    Statistic(
        name="effective_keys",
        unit="{key}",
        formula="Zk^2 / Z2",
        lower=1.0,
        upper=None,
        buckets=(1.1, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0, 4096.0),
        meaning="Number of keys that matter (inverse participation ratio of the attention).",
    ),
    Statistic(
        name="max_logit",
        unit="1",
        formula="m",
        lower=None,
        upper=None,
        buckets=(-10.0, 0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 1000.0),
        meaning="Largest attention score (scaled, before softmax) of the row.",
    ),
    Statistic(
        name="top1_ratio",
        unit="1",
        formula="1 / Z",
        lower=0.0,
        upper=1.0,
        buckets=_RATIO_BUCKETS,
        meaning="Attention mass of the most attended key; near 1 the row is saturated (one-hot).",
    ),
    Statistic(
        name="sink_ratio",
        unit="1",
        formula="sum of p_j over the sequence's first sink_tokens keys that are visible",
        lower=0.0,
        upper=1.0,
        buckets=_RATIO_BUCKETS,
        meaning="Attention mass of the first sink_tokens positions of the sequence (attention sink).",
    ),
    Statistic(
        name="local_ratio",
        unit="1",
        formula="sum of p_j over the last local_window visible keys, the row's own included",
        lower=0.0,
        upper=1.0,
        buckets=_RATIO_BUCKETS,
        meaning="Attention mass of the last local_window positions, the row's own included.",
    ),
    Statistic(
        name="distance_tokens",
        unit="{token}",
        formula="sum of e^(s_j - m) (i - j) / Zk, i the row's own position",
        lower=0.0,
        upper=None,
        buckets=(1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0, 65536.0),
        meaning="Mean distance, in tokens, from the row to the keys it attends to.",
    ),
    Statistic(
        name="self_logprob",
        unit="1",
        formula="ln p_i = s_i - m - ln Z, i the row's own position",
        lower=None,
        upper=0.0,
        buckets=(-50.0, -20.0, -15.0, -10.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, -0.1),
        meaning="Log of the attention mass of the row's own key.",
        exported=False,
    ),
    Statistic(
        name="lookback_ratio",
        unit="1",
        formula="c / (c + g): c, g the mean p_j over the visible prompt keys and over the visible generated keys",
        lower=0.0,
        upper=1.0,
        buckets=_RATIO_BUCKETS,
        meaning="Attention per prompt key against attention per generated key (Lookback Lens); decode rows only.",
        decode_only=True,
    ),
)

INDEX: Final[dict[str, int]] = {statistic.name: i for i, statistic in enumerate(STATISTICS)}
NUM_STATISTICS: Final = len(STATISTICS)
# Finite bounds plus +Inf.
NUM_BUCKETS: Final = len(STATISTICS[0].buckets) + 1
