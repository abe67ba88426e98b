"""`magnetic`: how far from balanced the directions of the scores S = scale Q K^T are (not masked, no soft cap).

With W_ij = (|S_ij| + |S_ji|) / 2, theta_ij = atan((S_ij - S_ji) / (S_ij + S_ji)) (0 where both vanish), no loops
(W_ii = 0), and d_i = sum_j W_ij: `frustration` is the smallest eigenvalue of the Hermitian magnetic Laplacian
diag(d) - W o e^(i theta); 0 if theta is a difference of potentials. Energies of theta's curl, which need no eigenvalue:
`phase_curl` = ||theta||^2 - 2 ||theta 1||^2 / L, and `phase_curl_w` = sum W theta^2 - 2 sum b_i^2 / d_i with
b_i = sum_j W_ij theta_ij. frustration and phase_curl_w grow with the layer's scale, phase_curl doesn't.
Source: dmaniloff/glassbox, diagnostics/magnetic.py.
Cost: on demand, O(L^2) to O(L^3) a head, in the bounds of `on_demand.py`. Needs the rows of all tokens.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.signals.kept_head import KeptHead
from glassbox.signals.on_demand import LIMITS, Deadline, Limits, NotSolvedError, over_heads
from glassbox.signals.values import Doubles, SignalValues
from glassbox.store.trace_record import RequestTrace

NAMES: Final = ("frustration", "phase_curl", "phase_curl_w")
_TILE: Final = 256
_EPSILON: Final = 1e-10
_MOST_RESTARTS: Final = 300
_TOLERANCE: Final = 1e-8
_SEED: Final = 0

Complexes = npt.NDArray[np.complex128]


def edges(head: KeptHead, deadline: Deadline) -> Iterator[tuple[int, int, Doubles, Doubles, Doubles]]:
    """start, stop, and of these rows W without loops, S_ij - S_ji and S_ij + S_ji, each [stop - start, L].

    Raises:
        OutOfTimeError: the deadline has passed.
    """
    for start in range(0, head.tokens, _TILE):
        deadline.check()
        stop = min(start + _TILE, head.tokens)
        scores = head.scale * head.scores(start, stop)
        others = head.scale * head.scores_of_others(start, stop)
        weights = (np.abs(scores) + np.abs(others)) / 2
        weights[np.arange(stop - start), np.arange(start, stop)] = 0
        yield start, stop, weights, scores - others, scores + others


def transport(weights: Doubles, difference: Doubles, total: Doubles) -> Complexes:
    """W e^(i theta): the cosine of an arc tangent is |total| / hypot, its sine the rest."""
    length = np.hypot(difference, total)
    flat = (total == 0) | (length == 0)
    safe = np.where(flat, 1, length)
    cosine = np.where(flat, 1, np.abs(total) / safe)
    sine = np.where(flat, 0, difference * np.sign(total) / safe)
    return weights * (cosine + 1j * sine)


def phases(difference: Doubles, total: Doubles) -> Doubles:
    """theta."""
    return np.where(total == 0, 0, np.arctan(difference / np.where(total == 0, 1, total)))


def magnetic_values(head: KeptHead, deadline: Deadline, limits: Limits) -> dict[str, float]:
    """Of one head, by name.

    Raises:
        NotSolvedError, OutOfTimeError: a value is not found.
    """
    tokens = head.tokens
    if np.isnan(head.scale):
        return {}
    degrees, turns, weighted = np.zeros(tokens), np.zeros(tokens), np.zeros(tokens)
    energy = weighted_energy = 0.0
    matrix = np.zeros((tokens, tokens), dtype=np.complex128) if tokens**2 * 16 <= limits.stored_bytes else None
    for start, stop, weights, difference, total in edges(head, deadline):
        theta = phases(difference, total)
        degrees[start:stop], turns[start:stop] = weights.sum(axis=1), theta.sum(axis=1)
        weighted[start:stop] = (weights * theta).sum(axis=1)
        energy += float((theta**2).sum())
        weighted_energy += float((weights * theta**2).sum())
        if matrix is not None:
            matrix[start:stop] = transport(weights, difference, total)
    return {
        "frustration": max(_smallest_eigenvalue(head, degrees, matrix, deadline, limits), 0.0),
        "phase_curl": max(energy - 2 * float((turns**2).sum()) / tokens, 0.0),
        "phase_curl_w": max(weighted_energy - 2 * float((weighted**2 / (degrees + _EPSILON)).sum()), 0.0),
    }


def _smallest_eigenvalue(
    head: KeptHead, degrees: Doubles, matrix: Complexes | None, deadline: Deadline, limits: Limits
) -> float:
    if not degrees.any():
        return 0.0  # no edges, and Lanczos would find no direction
    if matrix is not None and head.tokens <= limits.dense_tokens:
        from scipy.linalg import eigh

        laplacian = np.diag(degrees) - matrix
        return float(eigh(laplacian, eigvals_only=True, subset_by_index=[0, 0])[0])
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    def apply(vector: Any) -> Any:
        flat = vector.ravel()
        if matrix is not None:
            deadline.check()
            return degrees * flat - matrix @ flat
        moved = [transport(*edge) @ flat for _, _, *edge in edges(head, deadline)]
        return degrees * flat - np.concatenate(moved)

    tokens = head.tokens
    operator = LinearOperator((tokens, tokens), matvec=apply, dtype=np.complex128)
    start = np.random.default_rng(_SEED).standard_normal(tokens).astype(np.complex128)
    options = {"v0": start, "tol": _TOLERANCE, "maxiter": _MOST_RESTARTS, "return_eigenvectors": False}
    try:
        found = eigsh(operator, k=1, which="SA", **options)
    except ArpackError:
        raise NotSolvedError("frustration") from None
    return float(found[0])


def compute(trace: RequestTrace, limits: Limits = LIMITS) -> SignalValues:
    """See the module."""
    return over_heads(trace, "magnetic", magnetic_values, limits, attention=False, names=NAMES)
