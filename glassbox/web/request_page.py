"""A traced request as one readable page that needs nothing else.

Owns which numbers are put into the page, and how: `request_page.html` draws them. The page works when it is saved to a
disk; it loads nothing.
"""

import base64
import html
import json
import secrets
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.statistics import INDEX, STATISTICS
from glassbox.core.trace_arrays import trace_array
from glassbox.export.trace_document import Selection, Texts, document, pick
from glassbox.store.trace_record import RequestTrace

# Of the numbers per layer and head; beyond it, layers are left out, evenly.
MAX_BYTES: Final = 8_000_000
# Most attended positions shown of a trace that has whole attention vectors but no top-k.
_WHOLE_TOP_K: Final = 8
# What the page draws along the answer; both from 0 to 1.
_DRAWN: Final = ("entropy_ratio", "lookback_ratio")
_ONE: Final = 65_535
# Tokens drawn of a sequence whose text is not shown; the last ones.
_MAX_POSITIONS: Final = 8192
_NAMED: Final = (
    "request_id",
    "requested_model",
    "adapter",
    "status",
    "truncated",
    "prompt_len",
    "num_generated",
    "start_time_s",
    "signals",
    "scores",
)


def page(
    trace: RequestTrace, chosen: Selection, texts: Texts | None = None, scores: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """The page, and the nonce of its scripts and styles for the Content-Security-Policy.

    Args:
        trace: of a request.
        chosen: layers and heads that can be selected in the page.
        texts: makes texts of token ids; None: the page shows positions.
        scores: of `TraceScores.document`; None: the page shows none.

    Raises:
        SelectionError: a layer or head is not in the trace.
    """
    nonce = secrets.token_urlsafe(16)
    # `<` would let a text end the script that holds it.
    data = json.dumps(page_data(trace, chosen, texts, scores), allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    template = files("glassbox.web").joinpath("request_page.html").read_text(encoding="utf-8")
    filled = template.replace("__NONCE__", nonce).replace("__TITLE__", html.escape(trace.request_id))
    return filled.replace("__DATA__", data), nonce


def page_data(
    trace: RequestTrace, chosen: Selection, texts: Texts | None = None, scores: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the page's script reads; arrays [row][layer][head]([k]) are little-endian in base64."""
    shown = document(trace, texts)
    # By layer and head they are in the JSON alone.
    shown["scores"] = scores and {name: part for name, part in scores.items() if name != "places"}
    layers, heads = pick("layers", chosen.layers, trace.layers), pick("heads", chosen.heads, trace.heads)
    positions, masses, mean = _top_k(trace)
    layers, note = _fitting(trace, layers, len(heads), positions.shape[-1])
    at = np.ix_(np.arange(len(trace.positions)), np.asarray(layers), np.asarray(heads))
    whole = len(layers) == len(trace.layers) and len(heads) == len(trace.heads)
    text: Mapping[str, Any] = shown.get("text") or {}
    length = max(trace.prompt_len + trace.num_generated, int(trace.positions.max(initial=-1)) + 1)
    return {name: shown[name] for name in _NAMED} | {
        "note": note,
        "layers": [trace.layers[index] for index in layers],
        "heads": [trace.heads[index] for index in heads],
        "positions": trace.positions.tolist(),
        "length": length,
        "first": text["first_position"] if text else max(length - _MAX_POSITIONS, 0),
        "text": text.get("tokens") or None,
        "k": positions.shape[-1],
        "key_positions": _base64(np.maximum(positions[at], 0).astype("<u4")),
        "key_masses": _base64(np.rint(np.clip(masses[at], 0, 1) * _ONE).astype("<u2")),
        "mean": mean if whole else None,
        "statistics": {name: _base64(_quantised(trace.stats[at][..., INDEX[name]])) for name in _DRAWN},
        "labels": {name: _label(name) for name in _DRAWN},
    }


def _label(name: str) -> str:
    return STATISTICS[INDEX[name]].name.replace("_", " ")


def _top_k(trace: RequestTrace) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], dict[str, Any] | None]:
    """Positions and masses [T, L, H, k], and those of the mean; from whole vectors if only these were asked for."""
    if trace.topk_mass.shape[-1] or not trace.has_attention:
        mean = {
            "position": trace.mean_topk_positions.tolist(),
            "mass": np.round(trace.mean_topk_mass.astype(np.float64), 6).tolist(),
        }
        return trace.topk_positions, trace.topk_mass, mean
    sizes = {**trace.sizes, "top_k": _WHOLE_TOP_K}
    positions, masses = (trace_array(name).filled(sizes) for name in ("topk_positions", "topk_mass"))
    for t in range(len(positions)):
        attention = np.nan_to_num(trace.attention(t).astype(np.float32))
        best = np.argsort(-attention, axis=-1, kind="stable")[..., :_WHOLE_TOP_K]
        positions[t, ..., : best.shape[-1]] = best + trace.attention_starts[t]
        masses[t, ..., : best.shape[-1]] = np.take_along_axis(attention, best, axis=-1)
    return positions, masses, None


def _fitting(trace: RequestTrace, layers: list[int], num_heads: int, k: int) -> tuple[list[int], str]:
    """As many of the layers, evenly, as there is room for, and what to tell about it."""
    per_layer = max(len(trace.positions) * num_heads * (6 * k + 2 * len(_DRAWN)), 1)
    room = max(MAX_BYTES // per_layer, 1)
    if len(layers) <= room:
        return layers, ""
    kept = [layers[int(i)] for i in np.linspace(0, len(layers) - 1, room).round()]
    return kept, f"Only {len(kept)} of {len(layers)} layers fit into this page; choose others with ?layers=."


def _quantised(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    finite = np.isfinite(values)
    steps = np.rint(np.clip(np.where(finite, values, 0), 0, 1) * (_ONE - 1))
    result: npt.NDArray[np.uint16] = np.where(finite, steps, _ONE).astype("<u2")
    return result


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
