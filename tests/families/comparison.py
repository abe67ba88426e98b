"""How far measured statistics are from the right ones, over every row, layer and head."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from glassbox.core.statistics import INDEX, NUM_STATISTICS
from tests.families.serving import LOCAL_WINDOW, PREFILL_ROWS, SINK_TOKENS, Served
from tests.families.softmax_truth import Scores, statistics_of

# Logits of random models lie units apart, so any other token than transformers' is this much worse, and more.
TOKEN_GAP: Final = 1e-2
# Of vectors of length 1, computed in float32.
VECTOR_GAP: Final = 1e-4


def largest_deviation(served: Sequence[Served], truths: Sequence[Sequence[Scores]]) -> float:
    """|measured - right| / max(1, |right|), the largest of all rows, layers, heads and statistics.

    Args:
        served: with rows, as many as there must be.
        truths: of each, of the observed layers in their order.
    """
    return max(_deviation(one, truth) for one, truth in zip(served, truths, strict=True))


def _deviation(one: Served, layers: Sequence[Scores]) -> float:
    worst = 0.0
    for place, layer in enumerate(layers):
        right = statistics_of(layer, one.prompt_len, SINK_TOKENS, LOCAL_WINDOW)  # [H, T] each
        for row in one.rows:
            assert row.phase == (row.position >= one.prompt_len)
            stats = row.stats[place, : layer.scores.shape[0]]
            assert not stats[:, NUM_STATISTICS].any(), "no score of these models is NaN or Inf"
            for name, column in INDEX.items():
                measured, expected = stats[:, column], right[name][:, row.position]
                if name == "lookback_ratio" and not row.phase:
                    assert np.isnan(measured).all(), "a prompt row has no lookback ratio"
                    continue
                assert np.isfinite(measured).all(), f"{name} at position {row.position}"
                worst = max(worst, float((np.abs(measured - expected) / np.maximum(1, np.abs(expected))).max()))
    return worst


def assert_rows_are_there(one: Served) -> None:
    """Of the prompt as many as the YAML says, and each generated token's but the last's, which is never fed back."""
    prompt = [row.position for row in one.rows if not row.phase]
    assert min(PREFILL_ROWS, one.prompt_len) == len(set(prompt)) == len(prompt)
    decoded = sorted(row.position for row in one.rows if row.phase)
    assert list(range(one.prompt_len, len(one.tokens) - 1)) == decoded
