"""Which module computes which signal; `core/signal_table.py` says what each needs and what it gives.

Owns asking for signals by name. Computing never raises: what has no value is said in `SignalValues.refused`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

import numpy as np

from glassbox.signals import (
    asymmetry,
    attention_tracker,
    cyclic,
    focus,
    heavy_hitters,
    laplacian,
    lookback,
    magnetic,
    rauq,
    routing,
    selfattn,
    spectral,
)
from glassbox.signals.values import Floats, SignalValues
from glassbox.store.trace_record import RequestTrace

COMPUTE: Final[Mapping[str, Callable[[RequestTrace], SignalValues]]] = {
    "spectral": spectral.compute,
    "asymmetry": asymmetry.compute,
    "selfattn": selfattn.compute,
    "laplacian": laplacian.compute,
    "routing": routing.compute,
    "tracker": attention_tracker.compute,
    "cyclic": cyclic.compute,
    "magnetic": magnetic.compute,
    "rauq": rauq.compute,
    "lookback": lookback.compute,
    "focus": focus.compute,
    "heavy_hitters": heavy_hitters.compute,
}


def signal_values(
    trace: RequestTrace, names: Iterable[str], focus_heads: Collection[tuple[int, int]] | None = None
) -> dict[str, SignalValues]:
    """Signals of a traced request, by name; for a running one of what there is so far.

    Args:
        trace: of the request.
        names: of the signals; each is computed once.
        focus_heads: (layer, head), global indices, over which `focus` is taken; None is all that the trace has.
    """
    return {name: _compute(trace, name, focus_heads) for name in dict.fromkeys(names)}


def _compute(trace: RequestTrace, name: str, focus_heads: Collection[tuple[int, int]] | None) -> SignalValues:
    if name not in COMPUTE:
        return SignalValues(refused=f"signals must be of {', '.join(COMPUTE)}, got {name[:80]!r}; correct or remove it")
    try:
        with np.errstate(all="ignore"):  # whatever numbers there are, they are not the log's
            return _finite(focus.compute(trace, focus_heads) if name == "focus" else COMPUTE[name](trace))
    except Exception as error:  # a trace is what another process left: it may be of any size and hold any numbers
        return SignalValues(refused=f"{name} failed: {type(error).__name__}: {error}; please report this")


def _finite(values: SignalValues) -> SignalValues:
    """With NaN for what is infinite."""

    def known(arrays: dict[str, Floats]) -> dict[str, Floats]:
        return {name: np.where(np.isfinite(array), array, np.float32(np.nan)) for name, array in arrays.items()}

    of_request = {name: value if np.isfinite(value) else float("nan") for name, value in values.of_request.items()}
    return SignalValues(known(values.by_place), known(values.by_token), of_request, values.refused)
