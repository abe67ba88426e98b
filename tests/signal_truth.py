"""Signals from whole L x L matrices in float64, straight from their definitions; and traces as a worker measures them.

Slow on purpose: loops over rows and nodes, dense decompositions, nothing that the code under test uses.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from glassbox.core.signal_table import NUM_SINGULAR_VALUES
from glassbox.core.statistics import INDEX, NUM_STATISTICS
from glassbox.store.trace_record import RequestTrace
from tests.trace_samples import make_trace


@dataclass(frozen=True)
class Layer:
    """How a layer makes attention of queries and keys."""

    scale: float = 0.5
    soft_cap: float = 0.0
    window: int = 0
    sink: float = math.nan


def scores_of(q: np.ndarray, k: np.ndarray, layer: Layer) -> np.ndarray:
    """Scores [L, L] of one head before the softmax; -inf where hidden."""
    scores = np.full((len(q), len(q)), -np.inf)
    for i, j in itertools.product(range(len(q)), repeat=2):
        if j <= i and (not layer.window or i - j < layer.window):
            score = layer.scale * float(q[i].astype(np.float64) @ k[j].astype(np.float64))
            scores[i, j] = layer.soft_cap * math.tanh(score / layer.soft_cap) if layer.soft_cap else score
    return scores


def attention_of(q: np.ndarray, k: np.ndarray, layer: Layer) -> np.ndarray:
    """A [L, L] of one head."""
    scores = scores_of(q, k, layer)
    scores = np.concatenate([scores, np.full((len(q), 1), -np.inf if math.isnan(layer.sink) else layer.sink)], axis=1)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True))[:, :-1]


def spectrum(matrix: np.ndarray) -> dict[str, float]:
    """sv1, sv_ratio and sv_entropy of the four largest singular values."""
    values = np.linalg.svd(matrix, compute_uv=False)[:4]
    p = values / values.sum()
    found = {f"singular_value_{i}": value for i, value in enumerate(values)}
    found |= {"sv1": values[0], "sv_entropy": -sum(x * math.log(x) for x in p if x > 0)}
    if len(values) > 1:
        found |= {"sv_ratio": values[0] / values[1]}
    return found


def asymmetry(matrix: np.ndarray) -> dict[str, float]:
    """G, Gamma and C."""
    skew = (matrix - matrix.T) / 2
    whole = np.linalg.norm(matrix)
    g = np.linalg.norm(skew) / whole
    gamma = math.sqrt(2 * np.linalg.norm(skew.sum(axis=1)) ** 2 / len(matrix)) / whole
    return {"G": g, "Gamma": gamma, "C": math.sqrt(max(g**2 - gamma**2, 0))}


def row_norms(matrix: np.ndarray) -> np.ndarray:
    """Of each row of M_asym, over that of M."""
    return np.asarray(np.linalg.norm((matrix - matrix.T) / 2, axis=1) / np.linalg.norm(matrix))


def conductance(matrix: np.ndarray) -> float:
    """Smallest conductance of the first parts of the nodes in the order of the second singular vectors."""
    left, _, right = np.linalg.svd(matrix)
    size = len(matrix)
    nodes = sorted(range(2 * size), key=lambda node: left[node, 1] if node < size else right[1, node - size])
    degree = [*matrix.sum(axis=1), *matrix.sum(axis=0)]
    best = 1.0
    for count in range(1, 2 * size):
        inside = set(nodes[:count])
        cut = sum(matrix[i, j] for i in range(size) for j in range(size) if (i in inside) != (size + j in inside))
        smaller = min(sum(degree[node] for node in inside), sum(degree[node] for node in nodes[count:]))
        if smaller > 1e-12:
            best = min(best, cut / smaller)
    return best


def tracker(attention: np.ndarray) -> dict[str, float]:
    """Of any operator."""
    symmetric, skew = (attention + attention.T) / 2, (attention - attention.T) / 2
    commutator = symmetric @ skew - skew @ symmetric
    return {
        **spectrum(attention),
        "sigma2": np.linalg.svd(attention, compute_uv=False)[1],
        "sigma2_asym": np.linalg.svd(skew, compute_uv=False)[1],
        "commutator_norm": np.linalg.norm(commutator) / np.linalg.norm(attention),
    }


def routing(attention: np.ndarray) -> dict[str, float]:
    """Of the operator with its columns made alike."""
    matrix = attention @ np.diag(attention.sum(axis=0) ** -0.5)
    hodge = asymmetry(matrix)
    curl_ratio = hodge["C"] / (hodge["G"] + 1e-10)
    return {**tracker(matrix), **hodge, "curl_ratio": curl_ratio, "phi_hat": conductance(matrix)}


def cyclic(scores: np.ndarray) -> dict[str, float]:
    """Triples that are cycles, one by one."""
    size = len(scores)

    def beats(i: int, j: int) -> bool:
        lead = scores[i, j] - scores[j, i]
        return bool(lead > 0 or (lead == 0 and i < j))

    triples = itertools.combinations(range(size), 3)
    return {"T_cyc": sum(beats(i, j) == beats(j, k) == beats(k, i) for i, j, k in triples)}


def magnetic(scores: np.ndarray) -> dict[str, float]:
    """Of scaled scores that aren't masked."""
    size = len(scores)
    weight, theta = np.zeros((size, size)), np.zeros((size, size))
    for i, j in itertools.product(range(size), repeat=2):
        total = scores[i, j] + scores[j, i]
        weight[i, j] = 0 if i == j else (abs(scores[i, j]) + abs(scores[j, i])) / 2
        theta[i, j] = math.atan((scores[i, j] - scores[j, i]) / total) if total else 0
    degree = weight.sum(axis=1)
    laplacian = np.diag(degree) - weight * np.exp(1j * theta)
    flow = (weight * theta).sum(axis=1)
    curl = (theta**2).sum() - 2 * (theta.sum(axis=1) ** 2).sum() / size
    weighted = (weight * theta**2).sum() - 2 * (flow**2 / (degree + 1e-10)).sum()
    return {
        "frustration": max(np.linalg.eigvalsh(laplacian)[0], 0),
        "phase_curl": max(curl, 0),
        "phase_curl_w": max(weighted, 0),
    }


def make_heads(
    tokens: int, *, layers: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0, size: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Random queries and keys [layers, heads, tokens, dim], float32; query heads share keys (GQA)."""
    rng = np.random.default_rng(seed)
    q = size * rng.standard_normal((layers, heads, tokens, dim))
    k = size * rng.standard_normal((layers, kv_heads, tokens, dim))
    return q.astype(np.float32), np.repeat(k, heads // kv_heads, axis=1).astype(np.float32)


def measured_trace(
    q: np.ndarray,
    k: np.ndarray,
    *,
    prompt_len: int | None = None,
    layer: Layer | None = None,
    kept: bool = True,
    **changes: Any,
) -> RequestTrace:
    """The trace of a request with these queries and keys [layers, heads, tokens, dim], of all its rows.

    Args:
        q, k: float32.
        prompt_len: None is all of the tokens but two, at least one.
        layer: how attention is made.
        kept: whether queries, keys and what makes attention of them are.
        changes: of the trace's fields and arrays.
    """
    layer = layer or Layer()
    layers, heads, tokens, _ = q.shape
    attention = np.array([[attention_of(q[a, b], k[a, b], layer) for b in range(heads)] for a in range(layers)])
    scores = np.array([[scores_of(q[a, b], k[a, b], layer) for b in range(heads)] for a in range(layers)])
    by_row = attention.transpose(2, 0, 1, 3)  # [T, L, H, T]
    stats = np.zeros((tokens, layers, heads, NUM_STATISTICS + 1), dtype=np.float32)
    stats[..., INDEX["effective_keys"]] = by_row.sum(axis=-1) ** 2 / (by_row**2).sum(axis=-1)
    own = np.moveaxis(np.diagonal(attention, axis1=2, axis2=3), -1, 0)
    stats[..., INDEX["self_logprob"]] = np.log(np.maximum(own, 1e-300))
    stats[..., INDEX["max_logit"]] = np.moveaxis(scores.max(axis=-1), -1, 0)
    stats[..., INDEX["top1_ratio"]] = by_row.max(axis=-1)
    previous = np.full((tokens, layers, heads), np.nan, dtype=np.float32)
    for row in range(1, tokens):
        previous[row] = attention[:, :, row, row - 1]
    singular = np.linalg.svd(q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2), compute_uv=False)
    singular = np.pad(singular[..., :NUM_SINGULAR_VALUES], [(0, 0), (0, 0), (0, max(NUM_SINGULAR_VALUES - tokens, 0))])
    arrays: dict[str, Any] = {
        "stats": stats,
        "previous_mass": previous,
        "received": attention.sum(axis=2).astype(np.float32),
        "received_squares": (np.tril(attention, -1) ** 2).sum(axis=2).astype(np.float32),
        "singular_values": singular.astype(np.float32),
        "keys": np.zeros((tokens, layers, heads, 0), dtype=np.float32),
        "span_mass": np.zeros((tokens, layers, heads, 0), dtype=np.float32),
    }
    if kept:
        params = np.array([layer.scale, layer.soft_cap, layer.window, layer.sink], dtype=np.float32)
        arrays |= {
            "queries": q.transpose(2, 0, 1, 3).copy(),
            "keys": k.transpose(2, 0, 1, 3).copy(),
            "score_params": np.broadcast_to(params, (layers, heads, 4)).copy(),
        }
    prompt_len = max(tokens - 2, 1) if prompt_len is None else prompt_len
    return make_trace(
        **{
            "prompt_len": prompt_len,
            "positions": tuple(range(tokens)),
            "layers": tuple(range(layers)),
            "heads": tuple(range(heads)),
            "top_k": 0,
            "spans": (),
            "attention": False,
            "num_generated": tokens - prompt_len + 1,
            **arrays,
            **changes,
        }
    )
