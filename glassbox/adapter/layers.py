"""The attention layers of a loaded model: which there are, which can be observed, and whose they are.

Owns the labels of a worker's metrics, too. All imports of vLLM are inside functions: importing this module loads none.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from glassbox.adapter.attention.cache_layout import FP8_DTYPES
from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.adapter.attention.mla_bypass import is_compressed, mla_bypass
from glassbox.adapter.attention.mla_cache import head_sizes, is_latent
from glassbox.adapter.internals import members_of
from glassbox.adapter.protocols import AttentionImpl, AttentionLayer, LatentImpl, VllmConfig


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
        and (hasattr(layer, "impl") or is_compressed(layer))
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
READABLE_KV_CACHES: Final = ("auto", "float16", "bfloat16", "float32", *FP8_DTYPES)


@dataclass(frozen=True)
class Bypass:
    """Why a layer is not observed.

    Attributes:
        slug: in the label of a metric.
        reason: for the log, of several layers.
    """

    slug: str
    reason: str


def find_bypass(layer: AttentionLayer) -> Bypass | None:
    """Why a layer is not observed though vLLM built it; None if nothing stands against it.

    A backend whose `forward` writes the KV cache itself has not got this step's K before it; none that glassbox wraps
    does so since vLLM 0.26.
    """
    if not getattr(layer.impl, "glassbox_observed", False):
        return Bypass("backend", "their backend is not one that glassbox wraps")
    needed = members_of(LatentImpl if is_latent(layer) else AttentionImpl)
    if gone := [name for name in needed if not hasattr(layer.impl, name)]:
        return Bypass(
            "internals",
            f"their backend lacks {', '.join(gone)}, which earlier releases of vLLM have; use a newer glassbox",
        )
    if any(cls.__name__ == "ChunkedLocalAttention" for cls in type(layer).__mro__):
        return Bypass(
            "chunked_local", "chunked local attention splits requests into virtual ones, whose rows can't be found"
        )
    # Latent attention is told by its layer to write the cache first, whatever its backend says.
    if layer.attn_backend.forward_includes_kv_cache_update and not is_latent(layer):
        return Bypass("late_keys", "their backend writes keys only while it computes")
    if layer.impl.kv_cache_dtype not in READABLE_KV_CACHES:
        return Bypass(
            "cache_type",
            f"their KV cache is of type {layer.impl.kv_cache_dtype}, whose keys are no plain numbers; serve with "
            "--kv-cache-dtype auto or fp8 to observe them",
        )
    return None


def bypass_of_all(vllm_config: VllmConfig) -> Bypass | None:
    """Why no layer of this worker can be observed, whatever its backend; None if nothing stands against it."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return Bypass("context_parallel", "context parallelism spreads the keys of a row over ranks")
    if parallel.use_ubatching:
        return Bypass("micro_batching", "micro-batching (--enable-dbo) splits a step's row list")
    return None


def _unreadable(layer: AttentionLayer, finder: CacheFinder) -> Bypass | None:
    """Finds the layout of the layer's cache; returns why it can't be read."""
    try:
        finder.find(layer)
        layer.impl.glassbox_finder = finder  # type: ignore[attr-defined]
        if is_latent(layer):
            layer.impl.glassbox_layer = weakref.ref(layer)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError) as error:  # CacheLayoutError is one
        return Bypass("cache_layout", f"glassbox can't tell where keys and values stand in their KV cache: {error}")
    return None


@dataclass(frozen=True)
class ObservedLayers:
    """The attention layers of a worker.

    Attributes:
        names: of the observed ones, in the order of their global index.
        indices: global index of each.
        num_heads: largest number of local query heads among them.
        head_size, num_kv_heads: the largest of theirs, of K and V.
        latent: some of them have latent attention (MLA).
        bypassed: layers whose attention glassbox does not see, by name, and why. Those of one reason are equal.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    num_heads: int
    head_size: int
    num_kv_heads: int
    latent: bool
    bypassed: Mapping[str, Bypass]


def find_layers(
    layers: Mapping[str, AttentionLayer], finder: CacheFinder, of_all: Bypass | None = None
) -> ObservedLayers:
    """Sort the attention layers of a loaded model into observed and bypassed; drafters' are neither.

    Args:
        layers: by name, their KV caches allocated.
        finder: looks at these.
        of_all: a reason why none of them can be observed.
    """
    observed = []
    bypassed: dict[str, Bypass] = {}
    for name, layer in layers.items():
        if getattr(layer, "is_draft_layer", False):
            continue
        if getattr(getattr(layer, "impl", None), "glassbox_observed", None) is False:  # a drafter's as well
            continue
        of_mla = mla_bypass(layer)
        reason = of_all or (Bypass(*of_mla) if of_mla else find_bypass(layer) or _unreadable(layer, finder))
        if reason is None:
            observed.append((layer_index(name), name, layer))
        else:
            bypassed[name] = reason
    observed.sort(key=lambda one: one[:2])
    of_model = [layer for _, _, layer in observed]
    return ObservedLayers(
        names=tuple(name for _, name, _ in observed),
        indices=tuple(index for index, _, _ in observed),
        num_heads=max((layer.num_heads for layer in of_model), default=0),
        head_size=max((max(head_sizes(layer)) for layer in of_model), default=0),
        num_kv_heads=max((layer.impl.num_kv_heads for layer in of_model), default=0),
        latent=any(is_latent(layer) for layer in of_model),
        bypassed=bypassed,
    )
