"""THE table of vLLM's internals that glassbox touches: where each one is, what it serves, and what stands in for it.

Owns the declaration, and the look at what of it this process's vLLM has. vLLM promises none of these: a release may
rename any. So they are looked up once, before anything is changed: what is missing switches off what needs it, with one
line that names it, and only a missing one of the core leaves the server unobserved. `tools/compat_watch.py` asks the
same of releases that aren't installed, and that nothing else is touched.

Nothing is imported here that the process has not imported: a module that is not loaded is not used in it, and only
whether there is one is asked.
"""

import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Final

from glassbox.adapter import protocols
from glassbox.config.model import CPU_BACKENDS, MLA_BACKENDS, SUPPORTED_INNER_BACKENDS


class Feature(Enum):
    """What needs internals; the value says it in the log."""

    ATTACHING = "attaching to vLLM"
    OBSERVATION = "observing attention"
    LAYERS = "observing the layers of a backend"
    LATENT = "observing latent attention (MLA)"
    LATENT_ON_CPU = "observing latent attention (MLA) on a CPU"
    DRAFTERS = "telling a drafter's layers from the model's"
    PIECEWISE = "telling pieces of CUDA graphs from whole ones"
    PROGRESS = "telling draft tokens, and tokens that are computed again, from others"
    TRACES = "traced requests"
    ADAPTERS = "telling the LoRA adapters of requests"
    TOKENS = "the tokens of traced requests"
    OPTIONS = "options of requests"
    BEAMS = "telling what a beam search has generated from its prompt"
    MESSAGE_SPANS = "spans by message"
    MESSAGES_API = "spans by message at /v1/messages"
    RUST_FRONT_END = "telling vLLM's Rust front end"
    LOGPROBS = "log-probabilities of the tokens of traced requests"
    ANSWERS = "summaries of traced requests in their responses"
    LLM_SPANS = "attention spans beside vLLM's own"
    CAPTURE = "glassbox.capture"
    INSPECTION = "glassbox check --model"
    ABORTS = "ending requests by rules (actions)"
    ENGINES = "telling the engines of an API server from those of others on its node"
    METRICS_PAGE = "handing out its metrics at vLLM's port as bytes (they are rendered there instead)"
    RAY = "GLASSBOX_* variables in Ray's workers"


# Without these nothing is observed.
CORE: Final = frozenset({Feature.ATTACHING, Feature.OBSERVATION})

_OF_WORKERS: Final = (
    Feature.LAYERS,
    Feature.LATENT,
    Feature.DRAFTERS,
    Feature.PIECEWISE,
    Feature.PROGRESS,
    Feature.TRACES,
    Feature.ADAPTERS,
    Feature.TOKENS,
)


@dataclass(frozen=True)
class Internal:
    """One of vLLM's internals.

    Attributes:
        path: dotted, of the module and what is in it.
        module: of it.
        serves: what needs it.
        instead: module that does the same in a release that has this one no more.
        since: the first supported release that has it; "" is the oldest. Older ones do without what it serves.
    """

    path: str
    module: str
    serves: Feature
    instead: str = ""
    since: str = ""

    @property
    def alternatives(self) -> tuple[str, ...]:
        """What will do where its module is gone."""
        return (self.instead,) if self.instead else ()

    @property
    def required(self) -> bool:
        """Whether nothing is observed without it."""
        return self.serves in CORE


def _names(module: str, serves: Feature, *names: str, instead: str = "", since: str = "") -> list[Internal]:
    """Things of a module."""
    return [Internal(f"{module}.{name}", module, serves, instead, since) for name in names]


def _members(
    module: str,
    cls: str,
    protocol: type,
    serves: Feature,
    less: Mapping[str, Feature] | None = None,
    instead: str = "",
    since: str = "",
) -> list[Internal]:
    """A class, and what its protocol names of its objects.

    Args:
        serves: what the class and its members serve.
        less: members that serve something else.
    """
    less = less or {}
    return [
        Internal(f"{module}.{cls}", module, serves, instead, since),
        *(
            Internal(f"{module}.{cls}.{name}", module, less.get(name, serves), instead, since)
            for name in members_of(protocol)
        ),
    ]


def members_of(protocol: type) -> list[str]:
    """Names that a protocol of `protocols.py` declares itself."""
    methods = (
        name
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) or isinstance(value, staticmethod | classmethod)
    )
    return [*inspect.get_annotations(protocol), *(name for name in methods if not name.startswith("__"))]


# Modules whose classes' sources are read.
_OWNERS: tuple[str, ...] = ("vllm.",)
_REGISTRY: Final = "vllm.v1.attention.backends.registry"
_BACKENDS: Final = "vllm.v1.attention.backends"
_V1: Final = "vllm.v1.worker.gpu_model_runner"
_V2: Final = "vllm.v1.worker.gpu.model_runner"
_LATENT_LAYER: Final = "vllm.model_executor.layers.attention"
_LATENT_IMPLS: Final = (
    ("cutlass_mla", "CutlassMLAImpl"),
    ("flashattn_mla", "FlashAttnMLAImpl"),
    ("flashinfer_mla", "FlashInferMLAImpl"),
    ("flashmla", "FlashMLAImpl"),
    ("triton_mla", "TritonMLAImpl"),
)
_IMPLS: Final = (
    ("flash_attn", "FlashAttentionImpl"),
    ("flashinfer", "FlashInferImpl"),
    ("triton_attn", "TritonAttentionImpl"),
    ("cpu_attn", "CPUAttentionBackendImpl"),
)

INTERNALS: Final[tuple[Internal, ...]] = (
    # The registry, in every process.
    *_names(
        _REGISTRY,
        Feature.ATTACHING,
        "register_backend",
        "AttentionBackendEnum",
        *(f"AttentionBackendEnum.{name}" for name in ("CUSTOM", *SUPPORTED_INNER_BACKENDS) if name not in MLA_BACKENDS),
        "AttentionBackendEnum.clear_override",
        "AttentionBackendEnum.is_overridden",
    ),
    *_names("vllm.v1.attention.selector", Feature.ATTACHING, "AttentionSelectorConfig", "_cached_get_attn_backend"),
    *_names("vllm.platforms", Feature.ATTACHING, "current_platform"),
    *_names("vllm.utils.import_utils", Feature.ATTACHING, "resolve_obj_by_qualname"),
    *_names("vllm.config", Feature.ATTACHING, "get_current_vllm_config"),
    # Layers and what they compute.
    *_members("vllm.v1.attention.backend", "AttentionBackend", protocols.AttentionBackend, Feature.OBSERVATION),
    *_members("vllm.v1.attention.backend", "AttentionLayer", protocols.ScaledLayer, Feature.OBSERVATION),
    *_members("vllm.v1.attention.backend", "CommonAttentionMetadata", protocols.CommonMetadata, Feature.OBSERVATION),
    *_members("vllm.v1.attention.backend", "AttentionMetadataBuilder", protocols.MetadataBuilder, Feature.OBSERVATION),
    *_names("vllm.v1.attention.backend", Feature.OBSERVATION, "AttentionType", "AttentionType.DECODER"),
    *_members("vllm.model_executor.layers.attention", "Attention", protocols.AttentionLayer, Feature.OBSERVATION),
    *_names("vllm.model_executor.layers.attention_layer_base", Feature.OBSERVATION, "AttentionLayerBase"),
    *(
        entry
        for module, cls in _IMPLS
        for entry in _members(f"{_BACKENDS}.{module}", cls, protocols.AttentionImpl, Feature.LAYERS)
    ),
    # Likewise with latent attention.
    *(
        Internal(
            f"{_REGISTRY}.AttentionBackendEnum.{name}",
            _REGISTRY,
            Feature.LATENT_ON_CPU if name in CPU_BACKENDS else Feature.LATENT,
            since=since,
        )
        for name, since in MLA_BACKENDS.items()
    ),
    *_members(f"{_LATENT_LAYER}.mla_attention", "MLAAttention", protocols.LatentLayer, Feature.LATENT),
    *_members(f"{_LATENT_LAYER}.mla_attention", "MLACommonMetadata", protocols.LatentMetadata, Feature.LATENT),
    *(
        entry
        for module, cls in _LATENT_IMPLS
        for entry in _members(f"{_BACKENDS}.mla.{module}", cls, protocols.LatentImpl, Feature.LATENT)
    ),
    *_members(
        f"{_BACKENDS}.mla.amx_mla", "AMXMLAImpl", protocols.PackedLatentImpl, Feature.LATENT_ON_CPU, since="0.29"
    ),
    *_names("vllm", Feature.LATENT_ON_CPU, "_custom_ops", "_custom_ops.bmm_cpu", since="0.29"),
    *_names("vllm.compilation.backends", Feature.DRAFTERS, "model_tag"),
    # Runners and workers: of each kind the process has one.
    *_members(
        _V1,
        "GPUModelRunner",
        protocols.V1Runner,
        Feature.OBSERVATION,
        {"requests": Feature.TOKENS},
        instead=_V2,
    ),
    *_members(_V2, "GPUModelRunner", protocols.V2Runner, Feature.OBSERVATION),
    *_members("vllm.v1.worker.gpu_worker", "Worker", protocols.VllmWorker, Feature.OBSERVATION),
    *_names("vllm.v1.worker.cpu_worker", Feature.OBSERVATION, "CPUWorker", instead="vllm.v1.worker.gpu_worker"),
    *_members("vllm.v1.worker.gpu_input_batch", "InputBatch", protocols.InputBatch, Feature.OBSERVATION, instead=_V2),
    *_members(
        "vllm.v1.worker.gpu_input_batch", "CachedRequestState", protocols.CachedRequest, Feature.TOKENS, instead=_V2
    ),
    *_members("vllm.v1.worker.gpu.input_batch", "InputBatch", protocols.PreparedBatch, Feature.OBSERVATION),
    *_members(
        "vllm.v1.worker.gpu.states",
        "RequestState",
        protocols.RequestStates,
        Feature.OBSERVATION,
        dict.fromkeys(("req_id_to_index", "all_token_ids", "total_len"), Feature.TOKENS),
    ),
    *_names("vllm.forward_context", Feature.PIECEWISE, "get_forward_context", "is_forward_context_available"),
    *_names("vllm.config", Feature.PIECEWISE, "CUDAGraphMode", "CUDAGraphMode.PIECEWISE"),
    # The scheduler's output.
    *_members(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        protocols.SchedulerOutput,
        Feature.OBSERVATION,
        dict.fromkeys(("scheduled_new_reqs", "finished_req_ids"), Feature.TRACES)
        | dict.fromkeys(("scheduled_cached_reqs", "scheduled_spec_decode_tokens"), Feature.PROGRESS),
    ),
    *_members("vllm.v1.core.sched.output", "CachedRequestData", protocols.CachedRequests, Feature.PROGRESS),
    *_members(
        "vllm.v1.core.sched.output",
        "NewRequestData",
        protocols.NewRequest,
        Feature.TRACES,
        {"num_computed_tokens": Feature.PROGRESS, "lora_request": Feature.ADAPTERS},
    ),
    *_members("vllm.lora.request", "LoRARequest", protocols.LoRARequest, Feature.ADAPTERS),
    *_members("vllm", "SamplingParams", protocols.SamplingParams, Feature.TRACES),
    # Configuration.
    *_members("vllm.config", "VllmConfig", protocols.VllmConfig, Feature.OBSERVATION),
    *_members("vllm.config", "ModelConfig", protocols.ModelConfig, Feature.OBSERVATION),
    *_members("vllm.config", "ParallelConfig", protocols.ParallelConfig, Feature.OBSERVATION),
    *_members("vllm.config", "CacheConfig", protocols.CacheConfig, Feature.OBSERVATION),
    *_members("vllm.config", "SchedulerConfig", protocols.SchedulerConfig, Feature.OBSERVATION),
    *_members("vllm.config", "CompilationConfig", protocols.CompilationConfig, Feature.OBSERVATION),
    *_names("vllm.distributed", Feature.OBSERVATION, "get_tp_group"),
    # Whoever starts workers with Ray.
    *_names("vllm.ray.ray_env", Feature.RAY, "DEFAULT_ENV_VAR_PREFIXES"),
    # `vllm.LLM`, in the process of whoever calls it.
    *_names(
        "vllm",
        Feature.CAPTURE,
        "LLM",
        "LLM.llm_engine",
        "LLM.get_default_sampling_params",
        "LLM.get_tokenizer",
        "LLM.generate",
    ),
    *_names("vllm", Feature.CAPTURE, "RequestOutput", "RequestOutput.request_id", "RequestOutput.outputs"),
    *_names("vllm", Feature.CAPTURE, "SamplingParams.n"),
    *_names("vllm.outputs", Feature.CAPTURE, "CompletionOutput", "CompletionOutput.text"),
    # A process that builds a model and ends.
    *_names("vllm.config", Feature.INSPECTION, "set_current_vllm_config"),
    *_names(
        "vllm.distributed", Feature.INSPECTION, "init_distributed_environment", "ensure_model_parallel_initialized"
    ),
    *_names("vllm.engine.arg_utils", Feature.INSPECTION, "EngineArgs", "EngineArgs.create_engine_config"),
    *_names("vllm.model_executor.model_loader.utils", Feature.INSPECTION, "initialize_model"),
    # The API server.
    *_names("vllm.entrypoints.serve.engine.serving", Feature.OPTIONS, "BaseServing._check_model"),
    *_names(
        "vllm.entrypoints.generate.beam_search.utils",
        Feature.BEAMS,
        "BeamSearchSequence",
        "BeamSearchSequence.get_prompt",
        "BeamSearchSequence.orig_prompt",
        "BeamSearchSequence.tokens",
    ),
    *_names("vllm.v1.engine.async_llm", Feature.OPTIONS, "AsyncLLM.add_request"),
    *_names("vllm.v1.engine.input_processor", Feature.OPTIONS, "InputProcessor.process_inputs"),
    *_names("vllm.exceptions", Feature.OPTIONS, "VLLMValidationError"),
    *_names(
        "vllm.entrypoints.openai.chat_completion.serving",
        Feature.MESSAGE_SPANS,
        "OpenAIServingChat.render_chat_request",
    ),
    *_names(
        "vllm.entrypoints.anthropic.serving",
        Feature.MESSAGES_API,
        "AnthropicServingMessages",
        "AnthropicServingMessages.create_messages",
        "AnthropicServingMessages._convert_messages",
        "AnthropicServingMessages._convert_system_message",
        "AnthropicServingMessages._merge_inline_system",
    ),
    *_names(
        "vllm.v1.utils", Feature.RUST_FRONT_END, "RustFrontendProcessManager", "RustFrontendProcessManager.__init__"
    ),
    *_names(
        "vllm.v1.engine.output_processor",
        Feature.LOGPROBS,
        "OutputProcessor",
        "OutputProcessor.add_request",
        "OutputProcessor.process_outputs",
        "OutputProcessor.request_states",
        "RequestState.logprobs_processor",
    ),
    *_names("vllm.v1.engine.logprobs", Feature.LOGPROBS, "LogprobsProcessor.num_logprobs"),
    *_names("vllm.v1.engine", Feature.LOGPROBS, "EngineCoreOutput.new_logprobs", "EngineCoreRequest.cache_salt"),
    *_names("vllm.v1.outputs", Feature.LOGPROBS, "LogprobsLists", "LogprobsLists.logprobs"),
    *_names("vllm.v1.engine", Feature.ANSWERS, "EngineCoreRequest.request_id"),
    *_names("vllm.v1.engine.async_llm", Feature.LLM_SPANS, "AsyncLLM.__init__"),
    *_names("vllm.v1.engine.llm_engine", Feature.LLM_SPANS, "LLMEngine.__init__"),
    *_names("vllm.entrypoints.serve.instrumentator.metrics", Feature.METRICS_PAGE, "attach_router"),
    *_names(
        "vllm.v1.engine.async_llm",
        Feature.ABORTS,
        "AsyncLLM.abort",
        "AsyncLLM.output_handler",
        "AsyncLLM.output_processor",
    ),
    *_names("vllm.v1.engine.core_client", Feature.ENGINES, "MPClient", "MPClient.engine_ranks_managed"),
)


def feature_of(path: str) -> Feature | None:
    """What an internal serves, by its path; None if it isn't declared."""
    return next((entry.serves for entry in INTERNALS if entry.path == path), None)


@cache
def lacks(feature: Feature) -> tuple[str, ...]:
    """Which internals that this feature needs this process's vLLM lacks; looked up once.

    Call it where the modules that the feature uses are loaded.
    """
    paths = [entry.path for entry in INTERNALS if entry.serves is feature and not _is_there(entry)]
    # All but what is in something that is missing itself.
    return tuple(path for path in paths if not any(path.startswith(f"{other}.") for other in paths))


def switched_off(version: str | None) -> list[str]:
    """A line for each feature of a worker that this process's vLLM, of that version, has to do without."""
    return [line(feature, version) for feature in _OF_WORKERS if lacks(feature)]


def line(feature: Feature, version: str | None) -> str:
    """What is off, why, and what helps, in a line."""
    off = "the server runs unobserved" if feature in CORE else "it is off"
    return (
        f"vLLM {version} lacks what glassbox needs for {feature.value}: {', '.join(lacks(feature))}; {off}. "
        "Use a glassbox that knows this vLLM, or a tested vLLM (docs/releases.md)"
    )


def _is_there(entry: Internal) -> bool:
    module = sys.modules.get(entry.module)
    if module is None:
        return _exists(entry.module) or (bool(entry.instead) and _exists(entry.instead))
    node: Any = module
    for name in entry.path.removeprefix(entry.module).split(".")[1:]:
        if inspect.isclass(node) and not hasattr(node, name):
            return _sets(node, name)
        try:
            node = getattr(node, name)
        except AttributeError:
            return False
    return True


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _sets(cls: type, name: str) -> bool:
    """Whether objects of a class have an attribute that the class hasn't: annotated, or set by its methods."""
    if any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__):
        return True
    if name in getattr(cls, "__struct_fields__", ()) or name in getattr(cls, "__dataclass_fields__", ()):
        return True
    return any(re.search(rf"\bself\.{re.escape(name)}\s*(:[^=\n]+)?(=|,)", _source(base)) for base in cls.__mro__)


@cache
def _source(cls: type) -> str:
    """Of a class of vLLM; empty of others', and where it can't be told."""
    if not cls.__module__.startswith(_OWNERS):
        return ""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
