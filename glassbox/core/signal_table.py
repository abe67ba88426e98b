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
# Largest singular values of a trace's `singular_values`.
NUM_SINGULAR_VALUES: Final = 16
# Arrays of a trace that are empty unless a signal needs them, or every row of the prompt is asked for (`received`).
ON_REQUEST: Final = ("received", "singular_values", "queries", "keys", "score_params", "logprobs")

# `streaming`: from sums that grow with the tokens; `on demand`: from all queries and keys at once, within the bounds.
Cost = Literal["streaming", "on demand"]


@dataclass(frozen=True)
class Signal:
    """One signal.

    Attributes:
        name: as a client gives it, and the module in `signals/`.
        prompt: it is right only with every row of the prompt.
        arrays: of the trace that it is made of.
        cost: see `Cost`.
        values: names of its numbers.
        meaning: in one line.
        source: paper or code that it comes from.
    """

    name: str
    prompt: bool
    arrays: tuple[str, ...]
    cost: Cost
    values: tuple[str, ...]
    meaning: str
    source: str


_UPSTREAM: Final = "dmaniloff/glassbox"
_KEPT: Final = ("queries", "keys", "score_params")

SIGNALS: Final[tuple[Signal, ...]] = (
    Signal(
        name="spectral",
        prompt=True,
        arrays=("singular_values",),
        cost="streaming",
        values=("sv1", "sv_ratio", "sv_entropy"),
        meaning="Singular values of Q K^T, not scaled or masked: the largest, over the second, entropy of the first 4.",
        source=_UPSTREAM,
    ),
    Signal(
        name="asymmetry",
        prompt=True,
        arrays=("stats", "received"),
        cost="streaming",
        values=("G", "Gamma", "C"),
        meaning="How far the attention matrix is from symmetric, and how much of that is flow between tokens.",
        source=_UPSTREAM,
    ),
    Signal(
        name="selfattn",
        prompt=True,
        arrays=("stats",),
        cost="streaming",
        values=("attn_diag_logmean",),
        meaning="Mean logarithm of tokens' attention to themselves.",
        source="LLM-Check, Sriramanan et al., NeurIPS 2024",
    ),
    Signal(
        name="laplacian",
        prompt=True,
        arrays=("stats", "received"),
        cost="streaming",
        values=tuple(f"eigenvalue{i}" for i in range(10)),
        meaning="Largest eigenvalues of the attention graph's Laplacian by in-degree.",
        source="LapEigvals, arXiv 2502.17598",
    ),
    Signal(
        name="routing",
        prompt=True,
        arrays=_KEPT,
        cost="on demand",
        values=(
            "sv1",
            "sv_ratio",
            "sv_entropy",
            "sigma2",
            "phi_hat",
            "G",
            "Gamma",
            "C",
            "curl_ratio",
            "sigma2_asym",
            "commutator_norm",
        ),
        meaning="The attention matrix with its columns made alike: spectrum, conductance and asymmetry.",
        source=_UPSTREAM,
    ),
    Signal(
        name="tracker",
        prompt=True,
        arrays=_KEPT,
        cost="on demand",
        values=("sv1", "sv_ratio", "sv_entropy", "sigma2", "sigma2_asym", "commutator_norm"),
        meaning="Spectrum of the attention matrix.",
        source=_UPSTREAM,
    ),
    Signal(
        name="cyclic",
        prompt=True,
        arrays=("queries", "keys"),
        cost="on demand",
        values=("T_cyc",),
        meaning="Cyclic triples of the tournament in which a token beats another whose score for it is lower.",
        source=_UPSTREAM,
    ),
    Signal(
        name="magnetic",
        prompt=True,
        arrays=("queries", "keys"),
        cost="on demand",
        values=("frustration",),
        meaning="Smallest eigenvalue of the magnetic Laplacian of the scores.",
        source=_UPSTREAM,
    ),
    Signal(
        name="rauq",
        prompt=False,
        arrays=("previous_mass", "logprobs"),
        cost="streaming",
        values=("score",),
        meaning="Uncertainty of the answer, from its tokens' probabilities and attention to the token before.",
        source="RAUQ, arXiv 2505.20045",
    ),
    Signal(
        name="lookback",
        prompt=False,
        arrays=("stats", "span_mass"),
        cost="streaming",
        values=("ratio",),
        meaning="Look-back ratios over spans of the answer.",
        source="Lookback Lens, arXiv 2407.07071",
    ),
    Signal(
        name="focus",
        prompt=False,
        arrays=("span_mass",),
        cost="streaming",
        values=("mass",),
        meaning="Attention of the last prompt token to each span.",
        source="Attention Tracker, arXiv 2411.00348",
    ),
    Signal(
        name="heavy_hitters",
        prompt=True,
        arrays=("received",),
        cost="streaming",
        values=("share",),
        meaning="Positions that receive most attention, and their share of it.",
        source="H2O, arXiv 2306.14048",
    ),
)
SIGNAL_NAMES: Final = tuple(signal.name for signal in SIGNALS)


def signal_row(name: str) -> Signal:
    """The signal of a name."""
    return next(signal for signal in SIGNALS if signal.name == name)
