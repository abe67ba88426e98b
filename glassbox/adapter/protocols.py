"""What glassbox reads of vLLM's objects, as types: an attribute that isn't named here is read nowhere.

Written from vLLM 0.32's sources. None of vLLM is imported; its objects have these attributes without knowing of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor


class AttentionImpl(Protocol):
    """vllm.v1.attention.backend.AttentionImpl, of one layer.

    Attributes:
        sliding_window: keys to the left; on a GPU (keys to the left without the own one, keys to the right), -1 is all.
        logits_soft_cap: 0 or None is none.
        alibi_slopes: [Hq] or None.
        kv_cache_dtype: "auto", an FP8 type, ...
    """

    scale: float
    head_size: int
    sliding_window: int | tuple[int, int] | None
    logits_soft_cap: float | None
    alibi_slopes: Tensor | None
    kv_cache_dtype: str


class AttentionLayer(Protocol):
    """vllm.model_executor.layers.attention.Attention.

    Attributes:
        kv_cache: of the layer, as its backend lays it out; empty before it is allocated.
        isa: on a CPU, the instructions in use ("vec", "vec16", "amx", ...), which decide how a page is laid out.
    """

    layer_name: str
    kv_cache: Tensor
    isa: str
    _q_scale: Tensor
    _k_scale: Tensor
    _k_scale_float: float


class AttentionMetadata(Protocol):
    """What a backend's builder made; FlashInfer's has neither of these."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor


class CommonMetadata(Protocol):
    """vllm.v1.attention.backend.CommonAttentionMetadata.

    Attributes:
        req_idx: of the V2 runner, index into its request states.
    """

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    block_table_tensor: Tensor
    req_idx: Any


class SamplingParams(Protocol):
    """vllm.SamplingParams."""

    extra_args: Mapping[str, Any] | None
    eos_token_id: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    max_tokens: int | None


class NewRequest(Protocol):
    """vllm.v1.core.sched.output.NewRequestData."""

    req_id: str
    prompt_len: int
    prefill_token_ids: Sequence[int] | None
    sampling_params: SamplingParams | None


class SchedulerOutput(Protocol):
    """vllm.v1.core.sched.output.SchedulerOutput."""

    scheduled_new_reqs: Sequence[NewRequest]
    num_scheduled_tokens: Mapping[str, int]
    total_num_scheduled_tokens: int
    finished_req_ids: set[str]
