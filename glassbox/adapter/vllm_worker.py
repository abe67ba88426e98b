"""What the observation of a worker has to know of vLLM's worker object, read once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.adapter.layers import (
    ObservedLayers,
    ServerInfo,
    attention_layers,
    bypass_of_all,
    find_layers,
    has_open_images,
    server_info,
)
from glassbox.adapter.protocols import AttentionLayer, LatentLayer, VllmWorker
from glassbox.adapter.seat import SEAT


@dataclass(frozen=True)
class WorkerFacts:
    """Of one worker whose model is loaded.

    Attributes:
        server: what its metrics are labelled with.
        layers: which are observed.
        backend: names of the observed layers' backends, joined by commas.
        device: it computes on.
        query_dtype: of the layers' queries.
        max_model_len: most tokens of a sequence.
        drafts: a step may verify draft tokens (speculative decoding).
        schedules_ahead: a step is scheduled before the tokens of the one before it are known.
        activation_bytes: of the device's memory, that a forward pass takes at most beside weights and KV cache, as vLLM
            has found it; 0 if it hasn't, as with --kv-cache-memory-bytes.
        tokenizer, tokenizer_revision: folder or name of the model's tokenizer, empty if there is none.
    """

    server: ServerInfo
    layers: ObservedLayers
    backend: str
    device: torch.device
    query_dtype: torch.dtype
    max_model_len: int
    drafts: bool
    schedules_ahead: bool
    activation_bytes: int
    tokenizer: str
    tokenizer_revision: str | None


def layers_of(vllm_worker: VllmWorker, names: Sequence[str]) -> dict[str, AttentionLayer | LatentLayer]:
    """vLLM's layers of these names."""
    context = vllm_worker.vllm_config.compilation_config.static_forward_context
    return {name: context[name] for name in names}


def read_worker(vllm_worker: VllmWorker) -> WorkerFacts:
    """Read them; call it in a worker whose groups are set up and whose model is loaded."""
    vllm_config = vllm_worker.vllm_config
    model = vllm_config.model_config
    built = vllm_worker.get_model()
    model_layers = attention_layers(vllm_config, built, vllm_worker.get_draft_model())
    layers = find_layers(
        model_layers,
        CacheFinder(model.dtype, vllm_config.cache_config.num_gpu_blocks),
        model=built,
        of_all=bypass_of_all(vllm_config),
        attach=SEAT.attach,
        open_images=has_open_images(vllm_config),
    )
    return WorkerFacts(
        server=server_info(vllm_config),
        layers=layers,
        backend=",".join(sorted({model_layers[name].attn_backend.get_name() for name in layers.names})),
        device=vllm_worker.device,
        query_dtype=model.dtype,
        max_model_len=model.max_model_len,
        drafts=vllm_config.speculative_config is not None,
        schedules_ahead=bool(vllm_config.scheduler_config.async_scheduling),
        activation_bytes=int(getattr(vllm_worker, "peak_activation_memory", 0)),
        tokenizer=str(model.tokenizer or ""),
        tokenizer_revision=model.tokenizer_revision,
    )
