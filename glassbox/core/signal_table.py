"""THE table of signals: numbers of a whole request that a client or the YAML file asks for by name.

Owns their names, what each needs of a trace, what it gives, and the bounds of what is kept for them. It is pure data:
a request is checked, a worker told what to keep and a document written by the same rows. Formulas are in `signals/`,
one module for each; what the arrays are is said in `trace_arrays.py`.
"""

from dataclasses import dataclass
from typing import Final, Literal

# Queries and keys are kept for signals on demand alone, and of a request within these bounds: 134 MB of float32 with a
# head size of 128. Whole attention matrices are then made of them by whoever reads the trace, never in a step.
MAX_KEPT_TOKENS: Final = 4096
MAX_KEPT_PLACES: Final = 32  # layers x heads
# After which computing one of them ends.
ON_DEMAND_SECONDS: Final = 60
# Largest singular values of a trace's `singular_values`.
NUM_SINGULAR_VALUES: Final = 16
# Arrays of a trace that are empty unless a signal needs them, or every row of the prompt is asked for (`received`).
ON_REQUEST: Final = (
    "received",
    "received_squares",
    "singular_values",
    "queries",
    "keys",
    "score_params",
    "logprobs",
)

# `streaming`: from sums that grow with the tokens; `on demand`: from all queries and keys at once, within the bounds.
Cost = Literal["streaming", "on demand"]


@dataclass(frozen=True)
class Signal:
    """One signal.

    Attributes:
        name: as a client gives it; `signals/registry.py` has the module of each.
        prompt: it is right only with every row of the prompt.
        arrays: of the trace that it is made of.
        cost: see `Cost`.
        values: names of its numbers, of each layer and head unless they are among `of_request`.
        meaning: in one line.
        formula: of its values, in the notation of docs/signals.md.
        source: paper or code that it comes from.
        bounds: of what it keeps or computes.
        refuses: when it has no value.
        of_request: values of which there is one a request.
        by_span: values of which there is one for each named span, too: `value_NAME`.
        by_token: numbers of each row, layer and head, beside `values`.
    """

    name: str
    prompt: bool
    arrays: tuple[str, ...]
    cost: Cost
    values: tuple[str, ...]
    meaning: str
    formula: str
    source: str
    bounds: str
    refuses: str
    of_request: tuple[str, ...] = ()
    by_span: tuple[str, ...] = ()
    by_token: tuple[str, ...] = ()


_UPSTREAM: Final = "dmaniloff/glassbox"
_KEPT: Final = ("queries", "keys", "score_params")
_SPECTRUM: Final = ("sv1", "sv_ratio", "sv_entropy", *(f"singular_value_{i}" for i in range(4)))
_TEN: Final = range(10)
_EVERY_ROW: Final = "a token's row is missing"
_ON_DEMAND: Final = f"{MAX_KEPT_TOKENS} tokens, {MAX_KEPT_PLACES} layers x heads, {ON_DEMAND_SECONDS} s to compute"

SIGNALS: Final[tuple[Signal, ...]] = (
    Signal(
        name="spectral",
        prompt=True,
        arrays=("singular_values",),
        cost="streaming",
        values=_SPECTRUM,
        meaning="Largest singular values of Q K^T, neither scaled nor masked.",
        formula="sv1 = s1; sv_ratio = s1 / s2; sv_entropy = -sum p ln p, p = s_i / sum of the first 4; "
        "s_i^2 are eigenvalues of (Q^T Q)(K^T K)",
        source=_UPSTREAM,
        bounds="two matrices of head size squared a head",
        refuses=_EVERY_ROW,
    ),
    Signal(
        name="asymmetry",
        prompt=True,
        arrays=("stats", "received", "received_squares"),
        cost="streaming",
        values=("G", "Gamma", "C"),
        by_token=("row_norm",),
        meaning="How far the attention P is from symmetric, and how much of that is a gradient or circulates.",
        formula="G = ||P_asym|| / ||P||; Gamma^2 = (2 ||P_asym 1||^2 / L) / ||P||^2; C^2 = G^2 - Gamma^2; "
        "row_norm = ||P_asym[i, :]|| / ||P||",
        source=_UPSTREAM,
        bounds="two numbers a token and head",
        refuses=f"{_EVERY_ROW}; a head's rows and columns don't add up to the same",
    ),
    Signal(
        name="selfattn",
        prompt=True,
        arrays=("stats",),
        cost="streaming",
        values=("attn_diag_logmean", *(f"eigval_{i}" for i in _TEN)),
        meaning="Tokens' attention to themselves.",
        formula="attn_diag_logmean = mean ln A_ii; eigval_i = the 10 largest A_ii",
        source="LLM-Check, Sriramanan et al., NeurIPS 2024",
        bounds="none: every row has it",
        refuses=_EVERY_ROW,
    ),
    Signal(
        name="laplacian",
        prompt=True,
        arrays=("stats", "received"),
        cost="streaming",
        values=tuple(f"eigval_{i}" for i in _TEN),
        meaning="Largest eigenvalues of the attention graph's Laplacian by in-degree.",
        formula="the 10 largest of c_i - A_ii, c_i = sum_j A_ji",
        source="LapEigvals, arXiv 2502.17598",
        bounds="a number a token and head",
        refuses=_EVERY_ROW,
    ),
    Signal(
        name="routing",
        prompt=True,
        arrays=_KEPT,
        cost="on demand",
        values=(
            *_SPECTRUM,
            "sigma2",
            "sigma2_asym",
            "commutator_norm",
            "phi_hat",
            "G",
            "Gamma",
            "C",
            "curl_ratio",
        ),
        meaning="The attention with its columns made alike: spectrum, conductance and asymmetry.",
        formula="of M = A D^(-1/2), D the column sums of A: as spectral and asymmetry; sigma2 = s2(M); sigma2_asym = "
        "s2(M_asym); commutator_norm = ||[M_sym, M_asym]|| / ||M||; phi_hat = sweep cut along the second singular "
        "vectors; curl_ratio = C / G",
        source=_UPSTREAM,
        bounds=_ON_DEMAND,
        refuses=f"{_EVERY_ROW}; over a bound; a head's attention isn't that of its queries and keys",
    ),
    Signal(
        name="tracker",
        prompt=True,
        arrays=_KEPT,
        cost="on demand",
        values=(*_SPECTRUM, "sigma2", "sigma2_asym", "commutator_norm"),
        meaning="Spectrum of the attention.",
        formula="of A, as routing's",
        source=_UPSTREAM,
        bounds=_ON_DEMAND,
        refuses=f"{_EVERY_ROW}; over a bound; a head's attention isn't that of its queries and keys",
    ),
    Signal(
        name="cyclic",
        prompt=True,
        arrays=("queries", "keys"),
        cost="on demand",
        values=("T_cyc",),
        meaning="Cyclic triples of the tournament in which token i beats j if q_i . k_j > q_j . k_i.",
        formula="T_cyc = C(L, 3) - sum_i C(d_i, 2), d_i = tokens that i beats; of a tie the earlier one wins",
        source=_UPSTREAM,
        bounds=_ON_DEMAND,
        refuses=f"{_EVERY_ROW}; over a bound",
    ),
    Signal(
        name="magnetic",
        prompt=True,
        arrays=_KEPT,
        cost="on demand",
        values=("frustration", "phase_curl", "phase_curl_w"),
        meaning="How far from balanced the directions of the scaled scores S are, not masked.",
        formula="W = (|S_ij| + |S_ji|) / 2, theta = atan((S_ij - S_ji) / (S_ij + S_ji)); frustration = smallest "
        "eigenvalue of diag(d) - W e^(i theta), d = W 1; phase_curl = ||theta||^2 - 2 ||theta 1||^2 / L; "
        "phase_curl_w = sum W theta^2 - 2 sum b^2 / d, b = (W theta) 1",
        source=_UPSTREAM,
        bounds=_ON_DEMAND,
        refuses=f"{_EVERY_ROW}; over a bound",
    ),
    Signal(
        name="rauq",
        prompt=False,
        arrays=("previous_mass", "logprobs"),
        cost="streaming",
        values=("score", "tokens", "layer_score"),
        of_request=("score", "tokens"),
        meaning="Uncertainty of the answer, from its tokens' probabilities p and attention a to the token before.",
        formula="c_1 = p_1, c_i = 0.2 p_i + 0.8 a_(i,i-1) c_(i-1) at each layer's head with the largest mean a; "
        "layer_score = mean of -ln c_i; score = the largest of the layers",
        source="RAUQ, arXiv 2505.20045",
        bounds="a number a token and head",
        refuses="a row of the answer or a token's log-probability is missing",
    ),
    Signal(
        name="lookback",
        prompt=False,
        arrays=("stats", "span_mass"),
        cost="streaming",
        values=("mean", "lowest", "highest"),
        by_span=("mean",),
        by_token=("window",),
        meaning="Look-back ratios over spans of the answer.",
        formula="mean over the answer, or over its tokens in a span; lowest, highest mean of 8 tokens on end (window)",
        source="Lookback Lens, arXiv 2407.07071",
        bounds="none: every row of the answer has it",
        refuses="no row of a generated token was measured",
    ),
    Signal(
        name="focus",
        prompt=False,
        arrays=("span_mass",),
        cost="streaming",
        values=("mass",),
        by_span=("mass",),
        meaning="Attention of the last prompt token to the first span, the instruction, and to each.",
        formula="mass of the span; of the request its mean over the heads that glassbox heads found",
        source="Attention Tracker, arXiv 2411.00348",
        bounds="16 spans",
        refuses="no span is named, the last prompt token's row wasn't measured, or none of the heads was traced",
    ),
    Signal(
        name="heavy_hitters",
        prompt=True,
        arrays=("received",),
        cost="streaming",
        values=(
            "top10_share",
            *(f"position_{i}" for i in _TEN),
            *(f"received_{i}" for i in _TEN),
            "rows_ratio",
        ),
        of_request=("rows_ratio",),
        meaning="Positions that receive most attention, and their share of it.",
        formula="the 10 largest c_j = sum_i A_ij over the measured rows; rows_ratio = measured rows / tokens",
        source="H2O, arXiv 2306.14048",
        bounds="a number a token and head",
        refuses="the sums were not kept",
    ),
)
SIGNAL_NAMES: Final = tuple(signal.name for signal in SIGNALS)


def is_on_demand(name: str) -> bool:
    """Whether the signal of a name is computed on demand; see `Cost`."""
    return signal_row(name).cost == "on demand"


def signal_row(name: str) -> Signal:
    """The signal of a name."""
    return next(signal for signal in SIGNALS if signal.name == name)
