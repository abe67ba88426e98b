"""The truth from outside: statistics of every attention row, from transformers' eager attention.

The probabilities are what `output_attentions=True` returns; the largest logit, which it does not return, is taken from
the query and key that the same eager function was called with.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class SequenceTruth:
    """Statistics of all rows of one sequence of T tokens; every array is [L, H, T] float64."""

    values: dict[str, np.ndarray]


class EagerModel:
    """A model run by transformers, one sequence at a time, whose module has an `eager_attention_forward`."""

    def __init__(self, path: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
        self._device = device
        self.model = model.to(device).eval()
        self._module: Any = sys.modules[type(model).__module__]
        self._max_logits: list[torch.Tensor] = []

    def truth(self, token_ids: list[int], prompt_len: int, sink_tokens: int, local_window: int) -> SequenceTruth:
        """Run the sequence and reduce its attention."""
        attention, max_logits = self._run(token_ids)
        values = _reduce(attention.double(), prompt_len, sink_tokens, local_window)
        values["max_logit"] = max_logits
        return SequenceTruth(values)

    def attention(self, token_ids: list[int]) -> np.ndarray:
        """Attention of every row to every position, [L, H, T, T] in the model's precision or float32."""
        return self._run(token_ids)[0].float().numpy()

    def _run(self, token_ids: list[int]) -> tuple[torch.Tensor, np.ndarray]:
        """Attention [L, H, T, T], and the largest logits [L, H, T] float64, on the CPU."""
        original = self._module.eager_attention_forward
        self._max_logits.clear()

        def recording(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
            self._max_logits.append(_max_logit(query, key, scaling))
            return original(module, query, key, value, attention_mask, scaling, **kwargs)

        self._module.eager_attention_forward = recording
        try:
            with torch.inference_mode():
                output = self.model(
                    torch.tensor([token_ids], device=self._device), output_attentions=True, use_cache=False
                )
        finally:
            self._module.eager_attention_forward = original
        attention = torch.stack([a[0] for a in output.attentions]).cpu()
        return attention, torch.stack(self._max_logits).double().cpu().numpy()


def _max_logit(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """[H, T] largest causal score per row, from query [1, H, T, D] and key [1, Hkv, T, D]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (query[0].float() @ key[0].float().transpose(1, 2)) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).amax(dim=-1)


def _reduce(p: torch.Tensor, prompt_len: int, sink_tokens: int, local_window: int) -> dict[str, np.ndarray]:
    """Statistics of probabilities p [L, H, T, T] (rows sum to 1)."""
    length = p.shape[-1]
    position = torch.arange(length)
    n = (position + 1).double()
    entropy = torch.special.entr(p).sum(-1)
    ratio = torch.where(n > 1, entropy / n.log().clamp_min(1e-30), torch.zeros(()).double())
    distance = position[:, None] - position[None, :]
    local = ((distance >= 0) & (distance < local_window)).double()
    context_keys = torch.minimum(n, torch.tensor(float(prompt_len)).double())
    context = p[..., :prompt_len].sum(-1) / context_keys
    generated = p[..., prompt_len:].sum(-1) / (n - context_keys).clamp_min(1)
    return {
        "entropy": entropy.numpy(),
        "entropy_ratio": ratio.numpy(),
        "effective_keys": (1 / (p * p).sum(-1)).numpy(),
        "top1_ratio": p.amax(-1).numpy(),
        "sink_ratio": p[..., :sink_tokens].sum(-1).numpy(),
        "local_ratio": (p * local).sum(-1).numpy(),
        "distance_tokens": (p * distance.clamp_min(0)).sum(-1).numpy(),
        "self_logprob": p.diagonal(dim1=-2, dim2=-1).log().numpy(),
        "lookback_ratio": (context / (context + generated)).numpy(),
    }


@dataclass(frozen=True)
class WholeTruth:
    """What rows of one sequence add up to; T rows, all but the last token's.

    Attributes:
        previous, self_logprob: [L, H, T] of each row; previous is NaN in the first.
        received: float64 [L, H, T], column sums of the attention.
        queries, keys: float32 [L, H, T, D] after RoPE, keys repeated for the heads that share them.
        logprobs: [T] of each token that follows, by the model.
    """

    previous: np.ndarray
    self_logprob: np.ndarray
    received: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    logprobs: np.ndarray

    def singular_values(self, layer: int, head: int, first_row: int = 0) -> np.ndarray:
        """Of Q K^T, falling, by QR: no matrix of tokens by tokens is made. Rows before `first_row` are left out."""
        q, k = (x[layer, head].astype(np.float64) for x in (self.queries, self.keys))
        return np.linalg.svd(np.linalg.qr(q[first_row:])[1] @ np.linalg.qr(k)[1].T, compute_uv=False)


def whole_truth(eager: EagerModel, token_ids: list[int], first_row: int = 0) -> WholeTruth:
    """Run a sequence, reducing each layer's attention when it is there; rows before `first_row` receive nothing.

    Args:
        eager: the model.
        token_ids: of prompt and answer.
        first_row: position of the first row that counts.
    """
    module, original = eager._module, eager._module.eager_attention_forward
    rows = len(token_ids) - 1
    found: list[tuple[np.ndarray, ...]] = []

    def reducing(layer, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
        output, weights = original(layer, query, key, value, attention_mask, scaling, **kwargs)
        p = weights[0, :, :rows, :rows]
        before = torch.cat([torch.full((p.shape[0], 1), torch.nan), p.diagonal(-1, 1, 2)], 1)
        q, k = query[0, :, :rows], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)[:, :rows]
        own, sums = p.diagonal(0, 1, 2).double().log(), p[:, first_row:].double().sum(1)
        found.append(tuple(x.clone().numpy() for x in (before, own, sums, q, k)))
        return output, weights

    module.eager_attention_forward = reducing
    try:
        with torch.inference_mode():
            logits = eager.model(torch.tensor([token_ids]), use_cache=False).logits[0].double()
    finally:
        module.eager_attention_forward = original
    logprobs = torch.log_softmax(logits, -1)[torch.arange(rows), torch.tensor(token_ids[1:])]
    return WholeTruth(*(np.stack(parts) for parts in zip(*found, strict=True)), logprobs.numpy())
