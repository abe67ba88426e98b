"""The truth from outside: the scores that transformers' eager attention gives to its softmax, and what follows of them.

Eager attention of every family ends in one softmax a layer over [1, H, T, T] scores with everything in them: scale,
soft cap, bias and mask. So no family needs code of its own, and nothing is assumed of masks, windows or caps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.families.models import audio_features

# Masks are -inf, or the least number of a type, or that with a score added.
_MASKED: Final = -1e9
_SOFTMAX: Final = (nn.functional.softmax, torch.softmax, Tensor.softmax)
# Two ways to the same softmax in float32.
_ROUNDING: Final = 1e-6


@dataclass(frozen=True)
class Scores:
    """Of one layer over one sequence.

    Attributes:
        scores: float64 [H, T, T], -inf where a row doesn't see a key.
        sinks: float64 [H], score of the learned sink; None if there is none.
    """

    scores: Tensor
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Forward:
    """One sequence of T tokens in transformers.

    Attributes:
        layers: scores of each attention layer, in the order of the calls.
        output: float32, logits [T, V], or vectors [T, hidden size] of a model that has no head.
    """

    layers: Sequence[Scores]
    output: Tensor


class _Softmaxes(TorchFunctionMode):
    """Keeps the inputs of every softmax that is an attention's, and compares its output with them."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.found: list[Scores] = []
        self._length = length
        self._with_sink: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.cat and self._is_attention(out, 1):
            # Before the largest score of each row is subtracted, which would lose it.
            self._with_sink = out
        elif func in _SOFTMAX and self._is_attention(args[0], 0):
            self._add(args[0], None, out)
        elif func in _SOFTMAX and self._is_attention(args[0], 1):
            assert self._with_sink is not None
            self._add(self._with_sink[..., :-1], self._with_sink[0, :, 0, -1], out[..., :-1])
            self._with_sink = None
        return out

    def _is_attention(self, tensor: Any, sinks: int) -> bool:
        return (
            isinstance(tensor, Tensor)
            and tensor.ndim == 4
            and tensor.shape[-2:]
            == (
                self._length,
                self._length + sinks,
            )
        )

    def _add(self, scores: Tensor, sinks: Tensor | None, given: Tensor) -> None:
        found = Scores(
            scores[0].double().masked_fill(scores[0] < _MASKED, -torch.inf),
            None if sinks is None else sinks.double(),
        )
        probabilities = (found.scores - log_partition(found)[..., None]).exp()
        torch.testing.assert_close(probabilities, given[0].double(), rtol=0, atol=_ROUNDING)
        self.found.append(found)


def log_partition(layer: Scores) -> Tensor:
    """ln of the sum of e^score over keys and sink, [H, T]."""
    log_z = layer.scores.logsumexp(-1)
    return log_z if layer.sinks is None else torch.logaddexp(log_z, layer.sinks[:, None])


def run_eager(model: nn.Module, tokens: Sequence[int]) -> Forward:
    """Run one sequence through a model of transformers whose attention is eager."""
    with torch.inference_mode(), _Softmaxes(len(tokens)) as mode:
        output = model(**_inputs(model, tokens))
    return Forward(mode.found, getattr(output, "logits", output[0])[0].float())


def _inputs(model: Any, tokens: Sequence[int]) -> dict[str, Tensor]:
    ids = torch.tensor([tokens])
    if model.config.is_encoder_decoder:
        return {"input_features": audio_features(), "decoder_input_ids": ids}
    return {"input_ids": ids}


def statistics_of(layer: Scores, prompt_len: int, sink_tokens: int, local_window: int) -> dict[str, np.ndarray]:
    """Statistics of all rows of a sequence by name, [H, T] float64 each; see glassbox.core.statistics.

    Args:
        layer: of which.
        prompt_len: tokens of the prompt; `lookback_ratio` is meant of rows after them alone.
        sink_tokens, local_window: as in the YAML.
    """
    scores = layer.scores
    length = scores.shape[-1]
    position = torch.arange(length)
    visible = scores > -torch.inf
    num_visible = visible.sum(-1).double()
    # p is a key's share of everything, share that of all keys without the sink.
    log_p = scores - log_partition(layer)[..., None]
    p, log_share = log_p.exp(), scores - scores.logsumexp(-1, keepdim=True)
    share = log_share.exp()
    entropy = -(share * log_share.masked_fill(~visible, 0)).sum(-1)
    distance = position[:, None] - position[None, :]
    context, generated = (
        (share * part).sum(-1) / (visible & part).sum(-1).clamp_min(1)
        for part in (position < prompt_len, position >= prompt_len)
    )
    values = {
        "entropy_ratio": torch.where(num_visible > 1, entropy / num_visible.log().clamp_min(1e-30), 0.0),
        "effective_keys": 1 / (share * share).sum(-1),
        "max_logit": scores.amax(-1),
        "top1_ratio": p.amax(-1),
        "sink_ratio": p[..., :sink_tokens].sum(-1),
        "local_ratio": (p * (distance < local_window)).sum(-1),
        "distance_tokens": (share * distance).sum(-1),
        "self_logprob": log_p.diagonal(dim1=-2, dim2=-1),
        "lookback_ratio": context / (context + generated),
    }
    return {name: value.numpy() for name, value in values.items()}
