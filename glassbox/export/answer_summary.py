"""A traced request in a few numbers, as the answer to it carries them (`glassbox_respond`).

Owns the summary's fields and their bound: it grows with the model's layers by one number each, and with the probes and
signals that are asked for.
What a number means is known where it is made; the whole trace is `trace_document.py`'s. NaN ("no value") is null.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from glassbox.core.statistics import PHASES, STATISTICS
from glassbox.export.trace_document import finite, mean
from glassbox.signals import request_signals
from glassbox.store.trace_record import RequestTrace

# Under which a server shows its traces.
REQUESTS_PATH: Final = "/glassbox/v1/requests"
_OF_PLACES: Final = frozenset({"places"})
_OF_TRACE: Final = ("status", "prompt_len", "num_generated", "truncated")


def trace_path(request_id: str) -> str:
    """Where a server shows the trace of a request."""
    return f"{REQUESTS_PATH}/{quote(request_id, safe='')}"


def summary_of(trace: RequestTrace, scores: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a request whose trace is there.

    Fields: `request_id`, `internal_id`; `trace`, the path of the whole; `status`, `prompt_len`, `num_generated`,
    `num_rows`, `truncated` as there; `means`, by phase and statistic, over all rows, layers and heads; `signals`; and
    `scores` as there, without the numbers of single layers and heads.

    Args:
        trace: of the request, merged over workers.
        scores: of the document.
    """
    return {
        **_named(trace.request_id, trace.internal_id),
        **{name: getattr(trace, name) for name in _OF_TRACE},
        "num_rows": len(trace.positions),
        "means": _means(trace),
        "signals": finite(request_signals(trace)),
        "scores": {name: value for name, value in scores.items() if name not in _OF_PLACES},
    }


def summary_without(request_id: str, internal_id: str, why: str) -> dict[str, Any]:
    """What is said of one whose trace isn't there.

    Args:
        internal_id: empty if it isn't known.
        why: in words.
    """
    return {**_named(request_id, internal_id), "missing": why}


def _named(request_id: str, internal_id: str) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "internal_id": internal_id or None,
        "trace": trace_path(internal_id or request_id),
    }


def _means(trace: RequestTrace) -> dict[str, dict[str, Any]]:
    found = {}
    for number, phase in enumerate(PHASES):
        stats = trace.stats[trace.phases == number].reshape(-1, trace.stats.shape[-1])
        if len(stats):
            means: np.ndarray[Any, Any] = mean(stats, axis=0)
            found[phase.value] = {one.name: finite(means[i]) for i, one in enumerate(STATISTICS)}
    return found
