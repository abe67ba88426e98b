"""`rauq`: RAUQ, the uncertainty of an answer (Vazhentsev et al. 2025, arXiv 2505.20045).

Of each layer the head with the largest mean a_{i,i-1} over the answer is taken, a_{i,i-1} the attention of answer token
i to the one before. With p_i the probability of token i: c_1 = p_1, c_i = alpha p_i + (1 - alpha) a_{i,i-1} c_{i-1},
alpha = 0.2. A layer's score is the mean of -ln c_i over the tokens, and that of the request the largest of its layers;
the higher, the less certain. The paper takes the middle third of the layers: ask for these with glassbox_layers.

Values: `score` of the request and the `tokens` that it is of (the last generated token is never an input, so it has no
attention), and `layer_score` at the chosen head of each layer. Cost: streaming, from previous_mass and logprobs.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from glassbox.signals.values import Doubles, Floats, SignalValues, not_kept
from glassbox.store.trace_record import RequestTrace

ALPHA: Final = 0.2


def chosen_heads(previous: Doubles) -> npt.NDArray[np.intp]:
    """Of each layer the head with the largest mean, [L]; -1 where none has one.

    Args:
        previous: [N - 1, L, H], a_{i,i-1} of the tokens from the second on.
    """
    if not len(previous) or not previous.shape[-1]:
        return np.full(previous.shape[1], -1)
    mean = previous.mean(axis=0)
    return np.where(np.isnan(mean).all(axis=-1), -1, np.argmax(np.nan_to_num(mean, nan=-1), axis=-1))


def layer_scores(logprobs: Doubles, previous: Doubles) -> Doubles:
    """Of each layer, [L].

    Args:
        logprobs: [N], ln p_i of the answer's tokens.
        previous: [N - 1, L], a_{i,i-1} of the tokens from the second on, at the chosen head.
    """
    confidence = np.full(previous.shape[1], np.exp(logprobs[0]))
    total = -np.log(confidence)
    for probability, mass in zip(np.exp(logprobs[1:]), previous, strict=True):
        confidence = ALPHA * probability + (1 - ALPHA) * mass * confidence
        total -= np.log(confidence)
    return total / len(logprobs)


def compute(trace: RequestTrace) -> SignalValues:
    """See the module."""
    if not trace.logprobs.size:
        return SignalValues(refused=not_kept("logprobs", "rauq") if trace.num_generated else "nothing was generated")
    decode = trace.decode()
    index = trace.positions[decode].astype(np.int64) - trace.prompt_len
    tokens = int(index[-1]) + 1 if index.size else 1
    missing = tokens - len(index) if index.size else 0
    if missing:
        return SignalValues(
            refused=f"rows of {missing} of {tokens} answer tokens are missing, and this needs all of them"
        )
    logprobs = trace.logprobs[:tokens].astype(np.float64)
    unknown = tokens - int(np.isfinite(logprobs).sum())
    if unknown:
        return SignalValues(
            refused=f"the log-probability of {unknown} of {tokens} answer tokens is not known; "
            "send the request through the API server that glassbox is installed in"
        )
    previous = trace.previous_mass[decode][1:].astype(np.float64)
    heads = chosen_heads(previous)
    at = previous[:, np.arange(len(heads)), heads]
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = layer_scores(logprobs, at)
    scores = np.where(np.isfinite(scores), scores, np.nan)
    places: Floats = np.full(trace.stats.shape[1:3], np.nan, dtype=np.float32)
    (known,) = np.nonzero(heads >= 0)
    places[known, heads[known]] = scores[known]
    score = float(np.nanmax(scores)) if np.isfinite(scores).any() else float("nan")
    return SignalValues(by_place={"layer_score": places}, of_request={"score": score, "tokens": float(tokens)})
