"""The state of some keys of a row in the Triton kernels of row statistics: what of them is merged with what of others.

Owns the functions that are compiled into the kernels, and the order of the numbers: m, context sum, generated sum, E,
Z2, sink, local, distance, own score, nonfinite mark; see `row_stats.py`.
"""

import triton
import triton.language as tl

from glassbox.kernels.paged_keys import LOG2E

# 2^-256 is 0 in float32; a finite floor keeps 0 * -inf out of E.
_MIN_EXPONENT = tl.constexpr(-256.0)


@triton.jit
def exponent(score, reference):
    """log2 of e^(score - reference), floored; NaN (both infinite) becomes the floor."""
    # Subtract before scaling: exact for scores near the maximum however large they are.
    return tl.maximum((score - reference) * LOG2E, _MIN_EXPONENT)


@triton.jit
def combine(m1, a1, b1, c1, d1, e1, f1, g1, o1, x1, m2, a2, b2, c2, d2, e2, f2, g2, o2, x2):
    """Of two elements' maximum, seven sums, own score and nonfinite mark."""
    return (
        tl.maximum(m1, m2), a1 + a2, b1 + b2, c1 + c2, d1 + d2, e1 + e2, f1 + f2, g1 + g2, tl.maximum(o1, o2), x1 + x2
    )  # fmt: skip


@triton.jit
def no_keys(zeros):
    """State of no keys, for `combine`: nothing is above its maximum, and nothing is in its sums."""
    lowest = zeros + float("-inf")
    return lowest, zeros, zeros, zeros, zeros, zeros, zeros, zeros, lowest, zeros
