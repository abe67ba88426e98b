"""The truth from vLLM's own q and k, in float64: for models that transformers hasn't, or computes otherwise.

q and k are taken where a model calls vLLM's attention layer, before any backend; of the layer only its parameters are
believed: scale, window, chunk, soft cap, slopes, sinks. Requests must be served one after the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.families.softmax_truth import Scores


class QueryRecorder:
    """q and k of each attention layer of a served model, of one request at a time."""

    def __init__(self, model: Any) -> None:
        from vllm.model_executor.layers.attention import Attention

        self._layers = [module for module in model.modules() if isinstance(module, Attention)]
        self._calls: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it lasts, calls are kept."""

        def keep(layer: Any, args: Any) -> None:
            query, key = args[:2]
            call = (query.clone().view(-1, layer.num_heads, layer.head_size), key.clone())
            self._calls.setdefault(id(layer), []).append(call)

        handles = [layer.register_forward_pre_hook(keep) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> list[Scores]:
        """Scores of the request that was served since the last call, of each layer in the model's order."""
        found = [_scores(layer, self._calls[id(layer)]) for layer in self._layers]
        self._calls = {}
        return found


def _scores(layer: Any, calls: list[tuple[Tensor, Tensor]]) -> Scores:
    query = torch.cat([q for q, _ in calls]).cpu().double().transpose(0, 1)  # [H, T, D]
    key = torch.cat([k.view(k.shape[0], layer.num_kv_heads, -1) for _, k in calls]).cpu().double().transpose(0, 1)
    key = key.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=0)
    impl = layer.impl
    scores = impl.scale * (query @ key.transpose(1, 2))
    if impl.logits_soft_cap:
        scores = impl.logits_soft_cap * torch.tanh(scores / impl.logits_soft_cap)
    position = torch.arange(scores.shape[-1])
    distance = position[:, None] - position[None, :]
    if impl.alibi_slopes is not None:
        scores = scores - impl.alibi_slopes.cpu().double()[:, None, None] * distance
    hidden = distance < 0
    if layer.sliding_window is not None:
        hidden |= distance >= layer.sliding_window
    if (chunk := getattr(layer, "attention_chunk_size", None)) is not None:
        hidden |= position[:, None] // chunk != position[None, :] // chunk
    sinks = getattr(impl, "sinks", None)
    return Scores(scores.masked_fill(hidden, -torch.inf), None if sinks is None else sinks.detach().cpu().double())
