"""Whether the outputs of a layer were reproduced: what the sums of a check say.

Owns the tests and their allowances. It gets sums of rows and heads (`glassbox/core/output_checks.py`) from the kernels,
which know the types that were computed in, and answers with a ratio that is at most 1 for a kernel that does what
glassbox believes it does. It does not know where the rows come from or what follows from a verdict.

Four tests, since what may be wrong hides in different ways:

- Single rows: no element is farther off than rounding explains at most. Finds wrong keys, pages, masks.
- The mean square of the errors, of each head and of the layer, against the noise that rounding makes on average. Finds
  what is small in each element and present in many.
- The gain of each head: its outputs are g times too large. A least-squares fit over the rows, so that rounding averages
  out: finds a wrong factor of V, a sink that is missing, one head that is scaled.
- The factor of the layer's scores, likewise over all rows and heads: finds a wrong scale of the scores, and of q or K.

The error of a fitted factor has two estimates, of which the larger counts: what the noise of rounding makes of it, and
what the scatter of rows (or of rows and heads) shows, which holds whatever the noise is like but says nothing if there
are few. Both are of random errors; what one rounding may do to all elements alike is allowed in full.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.core.output_checks import NONFINITE_OUTPUT, OUTPUT_SUM, OUTPUT_SUMS, Verdict

# Root mean square of the errors over that of the noise. It is 1 for independent errors, and up to 2.4 where all weights
# of a row are rounded alike (u against the noise's 0.42 u). Reached in 1,500 simulated layers of all kinds: 1.7 of a
# layer and of a head; in PyTorch's kernels on an H200 1.1 and 1.2.
LAYER_NOISE: Final = 4.0
HEAD_NOISE: Final = 6.0
# Standard errors of a fitted factor. A worker fits some thousand factors in a check, and the noise is an estimate.
# Reached in the same layers: 0.26 of what is allowed.
STANDARD_ERRORS: Final = 6.0
# Times what was seen of weights that are rounded alike: a kernel's own rounding may be a worse one than those tried.
# Reached 2.6 in 32,768 equal scores after a sink, in PyTorch's kernels on an H200.
SHARED: Final = 3.0
# What any factor may be off, beside the types' roundoff: exponentials good to 20 units in the last place, float32 sums.
FACTOR: Final = 2.0**-16
# Squares below these are lost in float32's range once they are squared again: |r| of 1e-6, errors of 1e-15.
_SMALLEST_NORM2: Final = 2.0**-40
_SMALLEST_NOISE2: Final = 2.0**-100
# Clusters from which on their scatter is an estimate: with two, one chance agreement would make it 0 or huge.
_MIN_CLUSTERS: Final = 3
# Share of the square errors from which on a factor is named as their cause.
_EXPLAINS: Final = 0.8

_TYPES: Final = {2.0**-8: "bfloat16", 2.0**-11: "float16", 2.0**-24: "float32", 2.0**-4: "FP8", 2.0**-3: "FP8"}

Floats = npt.NDArray[np.float64]


def judge(sums: npt.NDArray[np.floating], dtype_roundoff: float) -> Verdict:
    """Of one layer's rows; see `judge_layers`.

    Args:
        sums: [R, H, len(OUTPUT_SUMS)].
        dtype_roundoff: `OutputRounding.unit` of the layer.
    """
    return judge_layers(np.asarray(sums)[:, None], dtype_roundoff)[0]


def judge_layers(sums: npt.NDArray[np.floating], dtype_roundoff: float) -> list[Verdict]:
    """Of some layers that compute in the same types.

    Rows of which neither output nor reference is finite say nothing, and a row of which only one is has an infinite
    ratio.

    Args:
        sums: [R, L, H, len(OUTPUT_SUMS)].
        dtype_roundoff: relative error that a rounding may make of all elements alike, `OutputRounding.unit`.

    Raises:
        ValueError: for sums of another table.
    """
    if sums.shape[3] != len(OUTPUT_SUMS):
        raise ValueError(f"sums must have {len(OUTPUT_SUMS)} columns, got {sums.shape[3]}; pass a kernel's sums")
    with np.errstate(all="ignore"):  # x / 0 is meant: a test without anything to test has ratio 0
        found = _Tests(np.moveaxis(sums.astype(np.float64), -1, 0), dtype_roundoff)
    return [found.verdict(layer) for layer in range(sums.shape[1])]


class _Tests:
    """Ratios of all tests, of sums [len(OUTPUT_SUMS), R, L, H] in float64.

    Attributes:
        single: [R, L, H].
        head_noise, gain: [L, H].
        layer_noise, scale: [L].
    """

    def __init__(self, sums: Floats, roundoff: float) -> None:
        of = {name: sums[column] for name, column in OUTPUT_SUM.items()}
        self._type = _TYPES.get(roundoff, "the layer's types")
        self._nonfinite = of["nonfinite"]
        self.single = np.where(of["nonfinite"] >= NONFINITE_OUTPUT, np.inf, of["worst"])
        self._error = _root(of["error2"].sum(0), of["noise2"].sum(0))  # [L, H]
        self.head_noise = self._error / HEAD_NOISE
        self._layer_error = _root(of["error2"].sum((0, 2)), of["noise2"].sum((0, 2)))
        self.layer_noise = self._layer_error / LAYER_NOISE

        self._gain, self._gain_allowed = _fit(
            of["gain_dot"], of["norm2"], of["gain_noise2"], of["gain_shared"], roundoff
        )
        self.gain = _over(abs(self._gain), self._gain_allowed)
        self._gain_explains = _over(self._gain**2 * of["norm2"].sum(0), of["error2"].sum(0))
        # All rows and heads of a layer in one fit: [R * H, L].
        names = ("dot", "norm2", "noise2", "shared")
        dot, norm2, noise2, shared = (_clusters(of[f"scale_{name}"]) for name in names)
        self._scale, self._scale_allowed = _fit(dot, norm2, noise2, shared, roundoff)
        self.scale = _over(abs(self._scale), self._scale_allowed)
        self._scale_explains = _over(self._scale**2 * of["scale_norm2"].sum((0, 2)), of["error2"].sum((0, 2)))

    def verdict(self, layer: int) -> Verdict:
        """Of one layer."""
        single = self.single[:, layer]
        ratios = single.max(1, initial=0.0)
        # What is found of the whole layer stands with the head that is farthest off.
        farthest = int(np.argmax(self._error[layer]))
        of_single, gain = single.max(0, initial=0.0), self.gain[layer]
        found = [
            (float(self.scale[layer]), farthest, self._say_scale, self._scale_explains[layer]),
            (float(gain.max()), int(gain.argmax()), self._say_gain, self._gain_explains[layer, gain.argmax()]),
            (float(of_single.max()), int(of_single.argmax()), self._say_single, 0.0),
            (float(self.head_noise[layer].max()), farthest, self._say_head_noise, 0.0),
            (float(self.layer_noise[layer]), farthest, self._say_layer_noise, 0.0),
        ]
        ratio = max(test[0] for test in found)
        # A factor that makes most of the errors says more than how large they are.
        causes = [test for test in found if test[0] > 1 and test[3] > _EXPLAINS]
        _, head, say, _ = max(causes or found, key=lambda test: test[0])
        return Verdict(ratios.tolist(), ratio, head, say(layer, head) if ratio > 1 else "")

    def _say_single(self, layer: int, head: int) -> str:
        of_head = self.single[:, layer, head]
        row = int(np.argmax(of_head))
        if np.isinf(of_head[row]) and self._nonfinite[row, layer, head] == NONFINITE_OUTPUT:
            return f"head {head}'s output is not finite where its keys and values give a finite one"
        if np.isinf(of_head[row]):
            return f"head {head}'s output is finite where its keys and values give one that is not"
        return f"row error {of_head[row]:.3g} times what rounding in {self._type} explains, in head {head}"

    def _say_head_noise(self, layer: int, head: int) -> str:
        return (
            f"head {head}'s mean error {self._error[layer, head]:.3g} times what rounding in {self._type} makes "
            f"(allowed {HEAD_NOISE:g})"
        )

    def _say_layer_noise(self, layer: int, head: int) -> str:
        return (
            f"mean error {self._layer_error[layer]:.3g} times what rounding in {self._type} makes (allowed "
            f"{LAYER_NOISE:g}), most in head {head}"
        )

    def _say_gain(self, layer: int, head: int) -> str:
        return (
            f"head {head}'s output is {1 + self._gain[layer, head]:.3f} times what its keys and values give (allowed "
            f"{_allowed(self._gain[layer, head], self._gain_allowed[layer, head])})"
        )

    def _say_scale(self, layer: int, head: int) -> str:
        return (
            f"scores are {1 + self._scale[layer]:.3f} times what queries and keys give (allowed "
            f"{_allowed(self._scale[layer], self._scale_allowed[layer])}), most errors in head {head}"
        )


def _allowed(factor: float, allowed: float) -> str:
    return f"{1 + float(np.copysign(allowed, factor)):.3f}"


def _root(error2: Floats, noise2: Floats) -> Floats:
    """Root of a mean square over that of its noise; 0 where there is no error."""
    return np.sqrt(_over(error2, noise2 + _SMALLEST_NOISE2))


def _over(x: Floats, y: Floats) -> Floats:
    """x / y, 0 where that is no number: nothing over nothing, or a sum beyond float32."""
    ratio = np.where(x == 0, 0.0, x / y)
    return np.where(np.isnan(ratio), 0.0, ratio)


def _clusters(x: Floats) -> Floats:
    """[R, L, H] as [R * H, L]."""
    return np.moveaxis(x, 2, 1).reshape(-1, x.shape[1])


def _fit(dot: Floats, norm2: Floats, noise2: Floats, shared: Floats, roundoff: float) -> tuple[Floats, Floats]:
    """The factor that fits clusters best, and how large it may be in a layer that is reproduced.

    Args:
        dot, norm2: of each cluster the error times the direction, and that times itself, [clusters, ...].
        noise2: mean square of `dot` by rounding.
        shared: size of `dot` by rounding that may be the same in all clusters.
        roundoff: as `judge_layers` takes it.
    """
    known = norm2 > _SMALLEST_NORM2
    dot, norm2, noise2, shared = (np.where(known, x, 0.0) for x in (dot, norm2, noise2, shared))
    total = norm2.sum(0)
    factor = _over(dot.sum(0), total)
    by_noise = np.sqrt(_over(noise2.sum(0), total**2))
    count = known.sum(0)
    scatter = np.sqrt(_over(((dot - factor * norm2) ** 2).sum(0), total**2) * count / np.maximum(count - 1, 1))
    error = np.maximum(by_noise, np.where(count >= _MIN_CLUSTERS, scatter, 0.0))
    alike = np.maximum(roundoff, SHARED * _over(shared.sum(0), total))
    return factor, alike + FACTOR + STANDARD_ERRORS * error
