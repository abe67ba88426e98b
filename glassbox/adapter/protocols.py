"""What glassbox reads and wraps of vLLM's runners, layers, impls, metadata, caches and configurations, as types.

A docstring's first paragraph names the classes that have the members; `tools/compat_watch.py` looks for them there. An
attribute that isn't named here is read with `getattr` and a default where vLLM's objects may lack it: sinks of an impl,
whether a layer is a drafter's, what kind of attention it is. `internals.py` says what each serves. None of vLLM is
imported; its objects have these attributes without knowing of it.
"""

from __future__ import annotations  # types alone: whoever imports them in an API server loads no torch

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor


class AttentionBackend(Protocol):
    """vllm.v1.attention.backend.AttentionBackend: a class with class methods."""

    forward_includes_kv_cache_update: bool

    @staticmethod
    def get_name() -> str: ...


class AttentionImpl(Protocol):
    """vllm.v1.attention.backends.flash_attn.FlashAttentionImpl, vllm.v1.attention.backends.flashinfer.FlashInferImpl,
    vllm.v1.attention.backends.triton_attn.TritonAttentionImpl,
    vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.

    Of one layer.

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
    num_kv_heads: int

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> Any: ...

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any: ...


class ObservedImpl(AttentionImpl, Protocol):
    """An impl of `attention/observed.py`.

    Attributes:
        glassbox_finder: has found the layout of the layer's cache; see `attention/layer_cache.py`.
        glassbox_view: what its measurer reads it through, once it was seen; see `attention/layer_view.py`.
    """

    glassbox_finder: Any
    glassbox_view: Any


class ScaledLayer(Protocol):
    """vllm.v1.attention.backend.AttentionLayer: scales, which vLLM sets on a layer from outside."""

    _q_scale: Tensor
    _k_scale: Tensor
    _k_scale_float: float
    _v_scale: Tensor
    _v_scale_float: float


class AttentionLayer(ScaledLayer, Protocol):
    """vllm.model_executor.layers.attention.Attention.

    Attributes:
        impl: of the layer's backend; MLA's are others.
        kv_cache: of the layer, as its backend lays it out; empty before it is allocated.
    """

    layer_name: str
    impl: AttentionImpl
    attn_backend: type[AttentionBackend]
    num_heads: int
    head_size: int
    head_size_v: int
    kv_cache: Tensor


class LatentImpl(Protocol):
    """vllm.v1.attention.backends.mla.cutlass_mla.CutlassMLAImpl,
    vllm.v1.attention.backends.mla.flashattn_mla.FlashAttnMLAImpl,
    vllm.v1.attention.backends.mla.flashinfer_mla.FlashInferMLAImpl,
    vllm.v1.attention.backends.mla.flashmla.FlashMLAImpl, vllm.v1.attention.backends.mla.triton_mla.TritonMLAImpl.

    Of one layer with latent attention (MLA).

    Attributes:
        supports_quant_query_input: queries of an FP8 cache are quantised before `forward_mqa` is given them.
    """

    scale: float
    kv_cache_dtype: str
    num_kv_heads: int
    supports_quant_query_input: bool

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> Any: ...

    def forward_mqa(self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: LatentLayer) -> Any: ...

    def forward_mha(
        self,
        q: Tensor,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any: ...


class PackedLatentImpl(Protocol):
    """vllm.v1.attention.backends.mla.amx_mla.AMXMLAImpl: keeps the weights packed."""

    _w_uk_packed: Tensor | None


class ObservedLatentImpl(LatentImpl, Protocol):
    """An impl of `attention/observed_mla.py`.

    Attributes:
        glassbox_finder, glassbox_view: as of ObservedImpl.
    """

    glassbox_finder: Any
    glassbox_view: Any


class LatentLayer(ScaledLayer, Protocol):
    """vllm.model_executor.layers.attention.mla_attention.MLAAttention.

    Attributes:
        kv_lora_rank: Lkv; qk_nope_head_dim: P; qk_rope_head_dim: R.
        kv_cache: [num_blocks, block, Lkv + R]; empty before it is allocated.
    """

    layer_name: str
    impl: LatentImpl
    attn_backend: type[AttentionBackend]
    num_heads: int
    head_size: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    kv_cache: Tensor


class LatentMetadata(Protocol):
    """vllm.model_executor.layers.attention.mla_attention.MLACommonMetadata.

    Attributes:
        num_decode_tokens: tokens of the step, the first ones, that `forward_mqa` is given.
    """

    num_decode_tokens: int


class AttentionMetadata(Protocol):
    """What a backend's builder made; FlashInfer's has neither of these."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor


class CommonMetadata(Protocol):
    """vllm.v1.attention.backend.CommonAttentionMetadata."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    block_table_tensor: Tensor
    causal: bool | Tensor
    mm_req_doc_ranges: Mapping[int, Sequence[tuple[int, int]]] | None


class MetadataBuilder(Protocol):
    """vllm.v1.attention.backend.AttentionMetadataBuilder: of the layers that share their metadata."""

    layer_names: Sequence[str]

    def build(self, common_prefix_len: int, common_attn_metadata: CommonMetadata, *args: Any, **kwargs: Any) -> Any: ...


class SamplingParams(Protocol):
    """vllm.SamplingParams."""

    extra_args: Mapping[str, Any] | None
    eos_token_id: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    max_tokens: int | None


class LoRARequest(Protocol):
    """vllm.lora.request.LoRARequest."""

    lora_name: str


class NewRequest(Protocol):
    """vllm.v1.core.sched.output.NewRequestData."""

    req_id: str
    prompt_token_ids: Sequence[int] | None
    prompt_embeds: Any
    prefill_token_ids: Sequence[int] | None
    sampling_params: SamplingParams | None
    num_computed_tokens: int
    lora_request: LoRARequest | None


class CachedRequests(Protocol):
    """vllm.v1.core.sched.output.CachedRequestData: requests that the runner knows; lists are in the same order.

    Attributes:
        resumed_req_ids: those that were preempted.
        num_output_tokens: that they have generated.
    """

    req_ids: Sequence[str]
    resumed_req_ids: set[str]
    num_computed_tokens: Sequence[int]
    num_output_tokens: Sequence[int]


class SchedulerOutput(Protocol):
    """vllm.v1.core.sched.output.SchedulerOutput.

    Attributes:
        scheduled_spec_decode_tokens: of each request that has some its draft tokens in the step, the last ones of it.
    """

    scheduled_new_reqs: Sequence[NewRequest]
    scheduled_cached_reqs: CachedRequests
    scheduled_spec_decode_tokens: Mapping[str, Sequence[int]]
    num_scheduled_tokens: Mapping[str, int]
    total_num_scheduled_tokens: int
    finished_req_ids: set[str]


class InputBatch(Protocol):
    """vllm.v1.worker.gpu_input_batch.InputBatch of the V1 runner; arrays are longer than the batch.

    Attributes:
        num_computed_tokens_cpu, num_prompt_tokens: int32 [max_num_reqs].
    """

    num_reqs: int
    num_computed_tokens_cpu: npt.NDArray[np.int32]
    num_prompt_tokens: npt.NDArray[np.int32]
    req_ids: Sequence[str]


class CachedRequest(Protocol):
    """vllm.v1.worker.gpu_input_batch.CachedRequestState."""

    prompt_token_ids: list[int] | None
    output_token_ids: list[int]
    sampling_params: SamplingParams | None


class V1Runner(Protocol):
    """vllm.v1.worker.gpu_model_runner.GPUModelRunner; the CPU's inherits from it."""

    input_batch: InputBatch
    requests: Mapping[str, CachedRequest]

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any: ...


class HostArray(Protocol):
    """A tensor of the V2 runner's states that the host has, too."""

    np: npt.NDArray[Any]


class DeviceArray(Protocol):
    """A tensor of the V2 runner's states that lives on the device."""

    gpu: Tensor


class RequestStates(Protocol):
    """vllm.v1.worker.gpu.states.RequestState; all arrays are by the request's index."""

    num_computed_tokens_np: npt.NDArray[np.int32]
    prompt_len: HostArray
    index_to_req_id: Mapping[int, str]
    req_id_to_index: Mapping[str, int]
    all_token_ids: DeviceArray
    total_len: DeviceArray


class PreparedBatch(Protocol):
    """vllm.v1.worker.gpu.input_batch.InputBatch of the V2 runner; arrays may be longer than the batch.

    Attributes:
        idx_mapping_np: int32 [num_reqs], index of each request into `RequestStates`.
        query_start_loc_np: int32 [num_reqs + 1].
    """

    req_ids: Sequence[str]
    num_reqs: int
    idx_mapping_np: npt.NDArray[np.int32]
    query_start_loc_np: npt.NDArray[np.int32]


class V2Runner(Protocol):
    """vllm.v1.worker.gpu.model_runner.GPUModelRunner."""

    req_states: RequestStates

    def prepare_inputs(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> PreparedBatch: ...

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any: ...


Runner = V1Runner | V2Runner


class ModelConfig(Protocol):
    """vllm.config.ModelConfig."""

    served_model_name: str | Sequence[str]
    dtype: torch.dtype
    max_model_len: int
    tokenizer: str | None
    tokenizer_revision: str | None

    def get_total_num_hidden_layers(self) -> int: ...

    def get_num_attention_heads(self, parallel_config: ParallelConfig) -> int: ...

    def get_layers_start_end_indices(self, parallel_config: ParallelConfig) -> tuple[int, int]: ...


class ParallelConfig(Protocol):
    """vllm.config.ParallelConfig."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_index: int
    decode_context_parallel_size: int
    prefill_context_parallel_size: int
    use_ubatching: bool


class SchedulerConfig(Protocol):
    """vllm.config.SchedulerConfig.

    Attributes:
        async_scheduling: a step is scheduled before the tokens of the one before it are known.
    """

    async_scheduling: bool | None


class CompilationConfig(Protocol):
    """vllm.config.CompilationConfig.

    Attributes:
        static_forward_context: the layers that keep something between steps, by name.
    """

    static_forward_context: Mapping[str, Any]


class CacheConfig(Protocol):
    """vllm.config.CacheConfig.

    Attributes:
        num_gpu_blocks: blocks of the KV cache, on a CPU, too; None before it is allocated.
    """

    num_gpu_blocks: int | None


class VllmConfig(Protocol):
    """vllm.config.VllmConfig."""

    model_config: ModelConfig
    cache_config: CacheConfig
    parallel_config: ParallelConfig
    compilation_config: CompilationConfig
    scheduler_config: SchedulerConfig
    speculative_config: object | None


class VllmWorker(Protocol):
    """vllm.v1.worker.gpu_worker.Worker; the CPU's inherits from it."""

    vllm_config: VllmConfig
    device: torch.device
    model_runner: Runner

    def compile_or_warm_up_model(self) -> Any: ...

    def get_model(self) -> Any: ...

    def get_draft_model(self) -> Any: ...
