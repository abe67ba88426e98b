"""The attention layers of a loaded model: which there are, which can be observed, and whose they are.

Owns the labels of a worker's metrics, too. All imports of vLLM are inside functions: importing this module loads none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from glassbox.adapter.protocols import AttentionLayer, VllmConfig


def is_draft_model() -> bool:
    """True while vLLM builds the layers of a draft model (speculative decoding)."""
    from vllm.compilation import backends

    return bool(backends.model_tag != "backbone")


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


def server_info(vllm_config: VllmConfig) -> ServerInfo:
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


def attention_layers(vllm_config: VllmConfig) -> dict[str, AttentionLayer]:
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


# Types of a KV cache whose K is plain numbers, with one factor for all if they are FP8. Others keep scales of their own
# beside the numbers, pack or rotate them: read as plain numbers they would give wrong statistics without an error.
READABLE_KV_CACHES: Final = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")


def bypass_reason(layer: AttentionLayer) -> str | None:
    """Why a layer is not observed though vLLM built it; None if nothing stands against it.

    A backend whose `forward` writes the KV cache itself has not got this step's K before it; none that glassbox wraps
    does so in vLLM 0.32.
    """
    if not getattr(layer.impl, "glassbox_observed", False):
        return "their backend is not one that glassbox wraps"
    if any(cls.__name__ == "ChunkedLocalAttention" for cls in type(layer).__mro__):
        return "chunked local attention splits requests into virtual ones, whose rows can't be found"
    if layer.attn_backend.forward_includes_kv_cache_update:
        return "their backend writes keys only while it computes"
    if layer.impl.kv_cache_dtype not in READABLE_KV_CACHES:
        return (
            f"their KV cache is of type {layer.impl.kv_cache_dtype}, whose keys are no plain numbers; serve with "
            "--kv-cache-dtype auto or fp8 to observe them"
        )
    return None


def unobservable_reason(vllm_config: VllmConfig) -> str | None:
    """Why no layer of this worker can be observed, whatever its backend; None if nothing stands against it."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism spreads the keys of a row over ranks"
    if parallel.use_ubatching:
        return "micro-batching (--enable-dbo) splits a step's row list"
    return None


@dataclass(frozen=True)
class ObservedLayers:
    """The attention layers of a worker.

    Attributes:
        names: of the observed ones, in the order of their global index.
        indices: global index of each.
        num_heads: largest number of local query heads among them.
        head_size: the largest of theirs.
        bypassed: layers whose attention glassbox does not see, by name, and why.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    num_heads: int
    head_size: int
    bypassed: Mapping[str, str]


def find_layers(layers: Mapping[str, AttentionLayer], unobservable: str | None = None) -> ObservedLayers:
    """Sort the attention layers of a loaded model into observed and bypassed; drafters' are neither.

    Args:
        layers: by name.
        unobservable: a reason why none of them can be observed.
    """
    observed, bypassed = [], {}
    for name, layer in layers.items():
        if getattr(layer, "is_draft_layer", False):
            continue
        if getattr(layer.impl, "glassbox_observed", None) is False:  # a drafter's as well
            continue
        reason = unobservable or bypass_reason(layer)
        if reason is None:
            observed.append((layer_index(name), name, layer.num_heads, layer.head_size))
        else:
            bypassed[name] = reason
    observed.sort()
    return ObservedLayers(
        names=tuple(name for _, name, _, _ in observed),
        indices=tuple(index for index, _, _, _ in observed),
        num_heads=max((heads for _, _, heads, _ in observed), default=0),
        head_size=max((size for _, _, _, size in observed), default=0),
        bypassed=bypassed,
    )
