"""What rounding explains of the difference between a served attention output and its float32 reference.

Owns the roundoff of the types in which an attention kernel computes, and the constants of the bound and of the average
noise that follow from it; the kernels `row_output.py` and `row_output_cpu.py` and their reference evaluate them. It
measures nothing and judges nothing.

The model. A kernel computes s_j = q.k_j in float32 from operands of the model's type, rounds p_j relative to a running
maximum to a type of its own ("weight"), sums p_j v_j in float32 and rounds the quotient by Z (which it sums before p is
rounded) to the output's type. Rounding to a type of n significant bits moves x by at most u |x|, u = 2^-n: 2^-8
bfloat16, 2^-11 float16, 2^-24 float32, 2^-4 e4m3, 2^-3 e5m2; and by half of the smallest step where x is too small for
that. With a_d = sum_j p_j |v_jd|, and x for the score's error:

    |e_d| <= b_d = u_out |o_d| + step_out + (2 u_weight + u_operand + 2 x + SUM_BOUND) a_d + w

- Rounded weights move sum_j p_j v_jd by u_weight a_d. There are two of them because a kernel may merge parts of a row
  that it stored in the output's type (vLLM's cascade attention does), which costs as much once more.
- Weights too small for their type lose up to step_weight, half of the smallest step, of the largest weight, of all n
  visible keys: w = 3 n step_weight v, with v = sqrt(sum_j |v_j|^2 / (n D)) and few elements above three times that.
- u_operand: an FP8 cache may be multiplied by its scale and rounded to the query's type before it is used (vLLM's
  Triton kernel does), and a GPU may take float32 operands as TF32.
- An error x of all scores moves each p_j by at most 2 x p_j. x = SCORE_ERROR max(M, soft cap) + (2 u_operand + tanh) M
  with M = max(1, the mean over the keys, weighted with p, of |s_j|, the same of scale |q| |k_j| / sqrt(D)): the last is
  how large a score would be if its products did not cancel as they do (0 if |k_j| is not finite). Errors of scores
  count by their keys' weight, hence the mean; both q and k are operands.
- SUM_BOUND: float32 sums over long rows, exponentials good to 20 units in the last place, and the reference's own
  errors.

On average a rounding makes MEAN_SQUARE u^2 x^2 of x^2, and errors of different keys are independent, so a sum of p_j
v_jd over j errs by f^2 sum_j p_j^2 v_jd^2. With q2 = sum_j p_j^2 |v_j|^2:

    noise2 = f^2 q2 + MEAN_SQUARE u_out^2 |o|^2 + sum_d h_d^2
    f^2 = MEAN_SQUARE (u_weight^2 + u_operand^2) + y^2
    y^2 = (SCORE_ERROR max(M, soft cap) / 4)^2 + (u_operand M / 2)^2 + (tanh M / 2)^2
    h_d = (SUM_NOISE + y p_sink) a_d + w + step_out

y is the noise of a score. What it has in common for all keys cancels in the softmax, but for a learned sink's share.
For the noise of a projection sum_d e_d z_d, by Cauchy-Schwarz for what the elements share:

    f^2 q2 |z|^2 + MEAN_SQUARE u_out^2 sum_d (o_d z_d)^2 + (sum_d h_d |z_d|)^2

Errors of different keys are not independent where weights are equal: all are rounded alike then, and their sum moves by
some share t of it. t is measured, by rounding the weights to as many bits as the kernel does, relative to a power of
two above the largest weight and times each of PLACES, since it is not known relative to which maximum a kernel rounds:
the largest |sum_j (rounded p_j - p_j)| over sum_j p_j. It moves a projection by up to t sum_d a_d |z_d| ("shared").
"""

import math
from dataclasses import dataclass
from typing import Final

import torch

# Mean square of a rounding's relative error over u^2, for a mantissa that is uniform in its logarithm: the error is
# uniform in +-u of the power of two below x, and the mean of its square over x^2 is u^2 / 3 * 3 / (8 ln 2).
MEAN_SQUARE: Final = 0.18
# Of a float32 score relative to its size: 16 roundoffs, for sums of a few hundred products with some cancellation, the
# factors, and the exponential's argument. Relative to the soft cap for what tanh loses of small arguments.
SCORE_ERROR: Final = 2.0**-20
# Of float32 sums relative to sum_j p_j |v_j|, at most and on average.
SUM_BOUND: Final = 2.0**-17
SUM_NOISE: Final = 2.0**-20
# Elements of V above this many times their root mean square are few.
LARGE_VALUE: Final = 3.0
# Where in their binade weights may be rounded.
PLACES: Final = tuple(2.0 ** (place / 4) for place in range(4))
# c is lost in rounding where |c| is below this many times what rounding of the scores alone makes of it.
LOST: Final = 64.0

# tanh.approx.f32 of NVIDIA GPUs, which kernels use for soft caps: largest relative error, by its documentation.
_TANH: Final = 2.0**-11
# Operands of float32 products on a GPU: TF32, cut off where a kernel does not round.
_TF32: Final = 2.0**-10
# Kernels scale FP8 weights up by this (FlashAttention 3 does), so that fewer are too small.
_FP8_WEIGHT_SCALE: Final = 256.0
_SMALLEST_FLOAT32: Final = 2.0**-126
FP8_TYPES: Final = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class OutputRounding:
    """The u and steps of the module's formulas.

    Attributes:
        weight, weight_step: of the softmax's weights; the step is half of the smallest, relative to the largest weight.
        operand: of the products' operands, 0 if they are taken as they are stored.
        output, output_step: of the output.
        output_limit: an |o_d| from here on rounds to infinity.
        tanh: relative error of a soft cap's tanh.
    """

    weight: float
    weight_step: float
    operand: float
    output: float
    output_step: float
    output_limit: float
    tanh: float

    @classmethod
    def of(cls, query: torch.dtype, output: torch.dtype, *, fp8_cache: bool, on_gpu: bool) -> "OutputRounding":
        """Of kernels for queries, outputs and caches of these types.

        Args:
            query: type of q; weights are rounded to it.
            output: type of the output.
            fp8_cache: whether K and V are stored in FP8.
            on_gpu: whether a GPU computes.
        """
        weight, operand = roundoff(query), 0.0
        step = _half_step(query)
        if query in FP8_TYPES:
            step /= _FP8_WEIGHT_SCALE
        elif fp8_cache:
            operand = weight
        if query == torch.float32 and on_gpu:
            weight, operand = _TF32, max(operand, _TF32)
        largest = torch.finfo(output).max
        # Half a step above the largest number; of float32 that is no float32 itself.
        limit = (
            float("inf")
            if output == torch.float32
            else largest * (1 + roundoff(output) / (2 - torch.finfo(output).eps))
        )
        return cls(weight, step, operand, roundoff(output), _half_step(output), limit, _TANH if on_gpu else 0.0)

    @property
    def lost_bits(self) -> int:
        """Of the 24 significant bits of a float32, those that a weight loses."""
        return round(math.log2(self.weight)) + 24

    @property
    def unit(self) -> float:
        """The largest u: what may be common to all elements of an output."""
        return max(self.weight, self.operand, self.output)


def roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to nearest, 2^-n for n significant bits."""
    return torch.finfo(dtype).eps / 2


def _half_step(dtype: torch.dtype) -> float:
    """Half of the smallest step; all of float32's smallest normal number, below which kernels may set numbers to 0."""
    info = torch.finfo(dtype)
    return max(info.smallest_normal * info.eps / 2, _SMALLEST_FLOAT32)
