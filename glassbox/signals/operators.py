"""Attention of one head as an operator, and what Lanczos or LAPACK and one pass over its rows tell of it.

Owns the choice between a matrix that is kept whole and one that is made again by tiles of rows each time it is applied,
and the formulas that `routing` and `tracker` share. With M = A D (D a diagonal scaling of the columns; M is lower
triangular as A is) and M_sym, M_asym = (M +- M^T) / 2:

    <M, M^T> = sum M_ii^2, so ||M_asym||^2 = (||M||^2 - sum M_ii^2) / 2
    [M_sym, M_asym] = (M^T M - M M^T) / 2, so its norm is the root of (||M^T M||^2 - ||M M||^2) / 2
    M_asym is skew, so its singular values come in pairs: the second is the first
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from glassbox.signals.kept_head import KeptHead
from glassbox.signals.on_demand import Deadline, Limits, NotSolvedError
from glassbox.signals.spectrum import RANK, spectrum_values
from glassbox.signals.values import Doubles

TILE: Final = 256
# Vectors of the estimate of the commutator's norm where the matrix isn't kept: +-5 % with two thirds certainty.
PROBES: Final = 256
SPECTRAL_NAMES: Final = (
    "sv1",
    "sv_ratio",
    "sv_entropy",
    *(f"singular_value_{i}" for i in range(RANK)),
    "sigma2",
    "sigma2_asym",
    "commutator_norm",
)
_SEED: Final = 0
_MOST_RESTARTS: Final = 300
# Of the eigenvalues of M^T M, relative; those of M are as exact.
_TOLERANCE: Final = 1e-8


class AttentionOperator:
    """A of one head, or M = A D.

    Attributes:
        columns: [L], the diagonal of D.
        row_sums, column_sums, diagonal: [L], of M.
        square_sum: ||M||_F^2.
        matrix: [L, L] if it is kept.
    """

    def __init__(self, head: KeptHead, deadline: Deadline, limits: Limits, columns: Doubles | None = None) -> None:
        tokens = head.tokens
        self._head, self._deadline = head, deadline
        self.columns = np.ones(tokens) if columns is None else columns
        self.row_sums, self.column_sums, self.diagonal = np.zeros(tokens), np.zeros(tokens), np.zeros(tokens)
        self.square_sum = 0.0
        self.matrix: Doubles | None = None
        whole = np.zeros((tokens, tokens)) if tokens**2 * 8 <= limits.stored_bytes else None
        for start, stop, rows in self.tiles():
            self.row_sums[start:stop] = rows.sum(axis=1)
            self.column_sums[:stop] += rows.sum(axis=0)
            self.diagonal[start:stop] = rows[np.arange(stop - start), np.arange(start, stop)]
            self.square_sum += float((rows**2).sum())
            if whole is not None:
                whole[start:stop, :stop] = rows
        self.matrix = whole

    @property
    def tokens(self) -> int:
        """L."""
        return self._head.tokens

    def tiles(self) -> Iterator[tuple[int, int, Doubles]]:
        """start, stop, rows [stop - start, stop]; the columns after `stop` are 0."""
        for start in range(0, self.tokens, TILE):
            self._deadline.check()
            stop = min(start + TILE, self.tokens)
            if self.matrix is None:
                yield start, stop, self._head.attention(start, stop) * self.columns[:stop]
            else:
                yield start, stop, self.matrix[start:stop, :stop]

    def apply(self, vectors: Doubles) -> Doubles:
        """M x, for [L] or [L, N]."""
        return np.concatenate([rows @ vectors[:stop] for _, stop, rows in self.tiles()])

    def apply_transposed(self, vectors: Doubles) -> Doubles:
        """M^T x."""
        result = np.zeros_like(vectors)
        for start, stop, rows in self.tiles():
            result[:stop] += rows.T @ vectors[start:stop]
        return result

    def apply_asymmetric(self, vectors: Doubles) -> Doubles:
        """M_asym x."""
        return (self.apply(vectors) - self.apply_transposed(vectors)) / 2


def received(head: KeptHead, deadline: Deadline) -> Doubles:
    """Column sums of A, [L].

    Raises:
        OutOfTimeError: they are not found.
    """
    sums = np.zeros(head.tokens)
    for start in range(0, head.tokens, TILE):
        deadline.check()
        stop = min(start + TILE, head.tokens)
        sums[:stop] += head.attention(start, stop).sum(axis=0)
    return sums


def spectral_values(operator: AttentionOperator, singular_values: Doubles, limits: Limits) -> dict[str, float]:
    """What `routing` and `tracker` say of their operators alike: SPECTRAL_NAMES.

    Args:
        operator: M.
        singular_values: its largest, falling.
        limits: of the signal.

    Raises:
        NotSolvedError, OutOfTimeError: one is not found.
    """
    known = np.pad(singular_values, (0, RANK - len(singular_values)), constant_values=np.nan)
    return {
        **{name: float(value) for name, value in spectrum_values(known).items()},
        "sigma2": float(known[1]),
        "sigma2_asym": asymmetric_norm(operator, limits),
        "commutator_norm": commutator_norm(operator) / float(np.sqrt(operator.square_sum)),
    }


def leading_triples(operator: AttentionOperator, limits: Limits) -> tuple[Doubles, Doubles, Doubles]:
    """The at most RANK largest singular values of M and their vectors: left [L, R], values [R] falling, right [L, R].

    Raises:
        NotSolvedError, OutOfTimeError: they are not found.
    """
    if operator.tokens <= limits.dense_tokens and operator.matrix is not None:
        from scipy.linalg import svd

        left, values, right = svd(operator.matrix, lapack_driver="gesdd")
        return left[:, :RANK], values[:RANK], right[:RANK].T
    left, values, right = _lanczos(operator.tokens, operator.apply, operator.apply_transposed, RANK)
    order = np.argsort(-values)
    return left[:, order], values[order], right[order].T


def asymmetric_norm(operator: AttentionOperator, limits: Limits) -> float:
    """Largest singular value of M_asym, which is the second, too; NaN of a single token.

    Raises:
        NotSolvedError, OutOfTimeError: it is not found.
    """
    if operator.tokens < 2:
        return float("nan")
    if operator.square_sum <= float((operator.diagonal**2).sum()):
        return 0.0  # each token sees but itself, and Lanczos would find no direction
    if operator.tokens <= limits.dense_tokens and operator.matrix is not None:
        return float(np.linalg.norm((operator.matrix - operator.matrix.T) / 2, 2))
    apply = operator.apply_asymmetric
    return float(_lanczos(operator.tokens, apply, lambda vectors: -apply(vectors), 1)[1][0])


def commutator_norm(operator: AttentionOperator) -> float:
    """||[M_sym, M_asym]||_F; an estimate if the matrix isn't kept.

    Raises:
        OutOfTimeError: it is not found.
    """
    if operator.matrix is not None:
        matrix = operator.matrix
        square = ((matrix.T @ matrix) ** 2).sum() - ((matrix @ matrix) ** 2).sum()
        return float(np.sqrt(max(square, 0) / 2))
    signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], size=(operator.tokens, PROBES))
    applied = operator.apply_transposed(operator.apply(signs)) - operator.apply(operator.apply_transposed(signs))
    return float(np.sqrt((applied**2).sum() / PROBES) / 2)


def hodge_split(operator: AttentionOperator) -> dict[str, float]:
    """G, Gamma, C and curl_ratio = C / G of M; see asymmetry.py."""
    asymmetric = max(operator.square_sum - float((operator.diagonal**2).sum()), 0) / 2
    imbalance = (operator.row_sums - operator.column_sums) / 2
    # Two tokens make no circle: all of it is gradient, and the difference would be the root of a rounding error.
    gradient = 2 * float((imbalance**2).sum()) / operator.tokens if operator.tokens > 2 else asymmetric
    whole = operator.square_sum
    split = {"G": asymmetric, "Gamma": gradient, "C": max(asymmetric - gradient, 0)}
    values = {name: float(np.sqrt(square / whole)) for name, square in split.items()}
    return {**values, "curl_ratio": values["C"] / (values["G"] + 1e-10)}


def _lanczos(
    tokens: int, apply: Callable[[Doubles], Doubles], transposed: Callable[[Doubles], Doubles], count: int
) -> tuple[Any, Any, Any]:
    from scipy.sparse.linalg import ArpackError, LinearOperator, svds

    operator = LinearOperator((tokens, tokens), matvec=apply, rmatvec=transposed, dtype=np.float64)
    start = np.random.default_rng(_SEED).standard_normal(tokens)
    try:
        return svds(operator, k=count, v0=start, tol=_TOLERANCE, maxiter=_MOST_RESTARTS, solver="arpack")
    except ArpackError:
        raise NotSolvedError("singular values") from None
