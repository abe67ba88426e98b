"""Queries and keys of one head, as a trace keeps them, and its scores and attention made of them again, rows at a time.

Owns how p comes from q and k: scale, soft cap, causal mask, sliding window, learned sink. Whether that is all that the
layer does is seen by whoever uses it, from the diagonal that was measured (`on_demand.py`). Everything is float64.
"""

from dataclasses import dataclass

import numpy as np

from glassbox.signals.values import SCALE, SINK, SOFT_CAP, WINDOW, Doubles
from glassbox.store.trace_record import RequestTrace


@dataclass(frozen=True, eq=False)
class KeptHead:
    """One head of L tokens.

    Attributes:
        queries, keys: [L, D], after RoPE.
        scale: of the scores; NaN if it isn't known.
        soft_cap: the scores are soft_cap * tanh(scores / soft_cap); 0 is none.
        window: keys that a row sees, its own included; 0 is all.
        sink: logit of a learned sink; NaN is none.
    """

    queries: Doubles
    keys: Doubles
    scale: float
    soft_cap: float = 0.0
    window: int = 0
    sink: float = float("nan")

    @property
    def tokens(self) -> int:
        """L."""
        return len(self.queries)

    def scores(self, start: int, stop: int, columns: int | None = None) -> Doubles:
        """Rows of S = Q K^T, neither scaled nor masked, [stop - start, columns]."""
        return self.queries[start:stop] @ self.keys[:columns].T

    def scores_of_others(self, start: int, stop: int) -> Doubles:
        """The same rows of S^T."""
        return self.keys[start:stop] @ self.queries.T

    def attention(self, start: int, stop: int) -> Doubles:
        """Rows of A, [stop - start, stop]: the columns after `stop` are 0."""
        scores = self.scale * self.scores(start, stop, stop)
        if self.soft_cap > 0:
            scores = self.soft_cap * np.tanh(scores / self.soft_cap)
        distance = np.arange(start, stop)[:, None] - np.arange(stop)
        hidden = distance < 0
        if self.window > 0:
            hidden |= distance >= self.window
        scores[hidden] = -np.inf
        largest = np.fmax(scores.max(axis=1, keepdims=True), self.sink)
        weights = np.exp(scores - largest)
        sink = 0.0 if np.isnan(self.sink) else np.exp(self.sink - largest)
        return weights / (weights.sum(axis=1, keepdims=True) + sink)


def kept_head(trace: RequestTrace, layer: int, head: int) -> KeptHead | None:
    """The head at these places along the axes L and H; None if one of its numbers is missing or not finite."""
    queries = trace.queries[:, layer, head].astype(np.float64)
    keys = trace.keys[: len(queries), layer, head].astype(np.float64)
    if not (np.isfinite(queries).all() and np.isfinite(keys).all()):
        return None
    params = trace.score_params[layer, head].astype(np.float64) if trace.score_params.size else np.full(4, np.nan)
    scale, soft_cap, window = params[[SCALE, SOFT_CAP, WINDOW]]
    known = np.isfinite(params[:SINK]).all() and soft_cap >= 0 and window >= 0 and params[SINK] != np.inf
    return KeptHead(
        queries=queries,
        keys=keys,
        scale=float(scale) if known else float("nan"),
        soft_cap=float(soft_cap) if known else 0.0,
        window=int(window) if known else 0,
        sink=float(params[SINK]),
    )
