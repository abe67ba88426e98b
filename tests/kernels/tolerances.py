"""How far a kernel may be from the float64 reference. All tolerances of the kernel tests stand here.

The rule is that of two oracles: a kernel's error is at most twice the error of plain torch in the same dtype,
plus rounding. Rounding is what any order of float32 operations may do: a score is a sum of D products, and
its error moves every statistic by a known factor.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from glassbox.core.output_checks import OUTPUT_SUM
from glassbox.core.statistics import INDEX, NUM_STATISTICS

EPS32: Final = torch.finfo(torch.float32).eps
# Of plain torch's error in the same dtype.
ORACLE_FACTOR: Final = 2.0
# torch.softmax's exponential is within 20 units in the last place; a sum over keys adds some.
SUM_ROUNDING: Final = 40 * EPS32
# A dot product's rounding in units of eps * sum |scale * q_d * k_d|.
SCORE_ROUNDING: Final = 2.0
# Of vLLM's attention output (values of magnitude 1 to 4), whose p and result are rounded to the model's
# dtype. A wrong convention (sign, order, window) shows as 1 and more.
ATTENTION_OUTPUT: Final = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Of the sums of an output's check where its errors are a hundredth of it and more: float32 loses 1e-6 and a few times
# as much for large scores. What c is made of cancels, down to where `output_rounding.LOST` gives it up.
OUTPUT_SUMS_ERROR: Final = 1e-3
OUTPUT_GROWTH_ERROR: Final = 1e-2
# Of what rounding adds to weights; and how many may be farther off, since float32's error of a weight takes it over the
# middle between two numbers at times, and all of one more.
OUTPUT_SHARED_ERROR: Final = 0.05
OUTPUT_SHARED_OFF: Final = 0.03


def score_error(magnitude: float) -> float:
    """Possible error of a float32 score.

    Args:
        magnitude: largest sum over d of |scale * q_d * k_d| (and of |bias|) of the rows.
    """
    return SCORE_ROUNDING * EPS32 * magnitude


def rounding(magnitude: float, max_keys: int) -> Tensor:
    """Rounding of each statistic, float64 [NUM_STATISTICS]; of `effective_keys` relative to its value.

    With every score off by at most d, a share p_j moves by at most 2 d p_j, so masses move by 2 d, the log of
    a share by 2 d, the entropy by 2 d ln n (and ln n is divided out), the mean distance by 2 d times the
    largest distance.
    """
    d = score_error(magnitude)
    mass = 2 * d + SUM_ROUNDING
    out = torch.full((NUM_STATISTICS,), mass, dtype=torch.float64)
    out[INDEX["entropy_ratio"]] = 4 * d + 2 * SUM_ROUNDING
    out[INDEX["effective_keys"]] = 4 * d + 2 * SUM_ROUNDING
    out[INDEX["max_logit"]] = d + EPS32 * magnitude
    out[INDEX["distance_tokens"]] = mass * max_keys
    # ln p is as large as a difference of scores.
    out[INDEX["self_logprob"]] = 2 * d + SUM_ROUNDING + 2 * EPS32 * magnitude
    return out


def assert_two_oracles(actual: Tensor, expected: Tensor, same_dtype: Tensor, magnitude: float, max_keys: int) -> None:
    """Checks statistics [R, H, NUM_STATISTICS + 1] against the float64 reference and the same-dtype oracle.

    NaN must stand in the same places. Statistics named in the message failed, with error and bound.
    """
    assert actual.shape == expected.shape
    assert torch.equal(actual[..., -1].double(), expected[..., -1]), "nonfinite differs"
    got, want, oracle = (x[..., :-1].double() for x in (actual, expected, same_dtype))
    assert torch.equal(got.isnan(), want.isnan()), "NaN stands elsewhere"
    bound = rounding(magnitude, max_keys)
    for name, column in INDEX.items():
        present = ~want[..., column].isnan()
        if not present.any():
            continue
        value = want[..., column][present]
        error = (got[..., column][present] - value).abs()
        allowed = torch.full_like(value, float(bound[column]))
        if name == "effective_keys":
            allowed *= value
        torch_error = torch.nan_to_num((oracle[..., column][present] - value).abs())
        excess = error - allowed - ORACLE_FACTOR * torch_error.max()
        worst = int(np.argmax(excess.numpy()))
        assert excess[worst] <= 0, (
            f"{name}: {float(value[worst])} expected, error {float(error[worst]):.3g}, allowed "
            f"{float(allowed[worst]):.3g} + {ORACLE_FACTOR} x {float(torch_error.max()):.3g}"
        )


def assert_output_sums(actual: Tensor, expected: Tensor) -> None:
    """Checks sums of outputs [..., len(OUTPUT_SUMS)] against the reference; products of both signs relative to what
    they could be at most."""
    assert actual.shape == expected.shape
    got, want = actual.double(), expected
    of = {name: want[..., column] for name, column in OUTPUT_SUM.items()}
    for name, column in OUTPUT_SUM.items():
        size = of[name].abs()
        if name.endswith("dot"):
            size = (of["error2"] * of["norm2" if name == "gain_dot" else "scale_norm2"]).sqrt()
        allowed = size * (OUTPUT_GROWTH_ERROR if name.startswith("scale") else OUTPUT_SUMS_ERROR)
        few = 0
        if name.endswith("shared"):
            allowed = OUTPUT_SHARED_ERROR * (size + size.mean())
            few = 1 + int(OUTPUT_SHARED_OFF * size.numel())
        excess = (got[..., column] - of[name]).abs() - allowed
        off = (excess.isnan() | (excess > 0)).nonzero()
        assert len(off) <= few, (
            f"{name}: {got[..., column][tuple(off[0])]}, expected {of[name][tuple(off[0])]} at {off[0].tolist()}"
        )
