"""Quantiles of latencies that were measured in rounds, against those of servers without the plugin, with intervals.

Owns the arithmetic of `bench_tail.py`. The tokens of one request wait for the same steps as those beside them, and a
slow minute of the machine hits a whole round: neither tokens nor requests are independent. So an interval comes from a
bootstrap of two stages, rounds (the same ones for all arms) and requests within them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

QUANTILES: Final = (0.5, 0.99, 0.999)
# Fewer values than this beyond a quantile are anecdotes.
_MIN_BEYOND: Final = 1.0
_LEVEL: Final = 0.95

# Latencies of each request of a round, in seconds; the arrays of some requests may be empty.
Requests = Sequence[NDArray[np.float64]]


@dataclass(frozen=True)
class Quantile:
    """One quantile of one arm.

    Attributes:
        at: which, 0 .. 1.
        values: how many latencies it is of.
        seconds: of all rounds together; None where there are too few values.
        ratio, low, high: to the mean of that quantile of the plain arms, and its interval of 95 %; None likewise.
    """

    at: float
    values: int
    seconds: float | None
    ratio: float | None
    low: float | None
    high: float | None


def tail(
    rounds: Sequence[Mapping[str, Requests]], plain: Sequence[str], resamples: int = 500
) -> dict[str, list[Quantile]]:
    """The quantiles of each arm.

    Args:
        rounds: of each its arms, the same ones in all.
        plain: arms without the plugin.
        resamples: of the bootstrap.
    """
    arms = list(rounds[0])
    found = {arm: _quantiles(_pooled(one[arm] for one in rounds)) for arm in arms}
    ratios = _against(found, plain)
    rng = np.random.default_rng(0)
    drawn: dict[str, list[NDArray[np.float64]]] = {arm: [] for arm in arms}
    for _ in range(resamples):
        chosen = [rounds[number] for number in rng.integers(len(rounds), size=len(rounds))]
        again = {arm: _quantiles(_pooled(_redrawn(one[arm], rng) for one in chosen)) for arm in arms}
        for arm, ratio in _against(again, plain).items():
            drawn[arm].append(ratio)
    beyond = (1 - _LEVEL) / 2
    answer: dict[str, list[Quantile]] = {}
    for arm in arms:
        count = sum(len(request) for one in rounds for request in one[arm])
        low, high = np.quantile(drawn[arm], [beyond, 1 - beyond], axis=0)
        numbers = zip(QUANTILES, found[arm], ratios[arm], low, high, strict=True)
        answer[arm] = [
            Quantile(at, count, *(float(number) for number in of))
            if count * (1 - at) >= _MIN_BEYOND
            else Quantile(at, count, None, None, None, None)
            for at, *of in numbers
        ]
    return answer


def _pooled(rounds: Iterable[Requests]) -> NDArray[np.float64]:
    return np.concatenate([request for requests in rounds for request in requests])


def _redrawn(requests: Requests, rng: np.random.Generator) -> Requests:
    return [requests[number] for number in rng.integers(len(requests), size=len(requests))]


def _quantiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.quantile(values, QUANTILES).astype(np.float64)


def _against(found: Mapping[str, NDArray[np.float64]], plain: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    reference = np.mean([found[arm] for arm in plain], axis=0)
    return {arm: values / reference for arm, values in found.items()}
