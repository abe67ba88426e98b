"""The attention layers of a loaded model: which there are, which can be observed, and whose they are.

Owns the labels of a worker's metrics, too. Which number a layer has is `layer_numbers.py`'s. All imports of vLLM are
inside functions: importing this module loads none.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from glassbox.adapter.attention.cache_layout import FP8_DTYPES
from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.adapter.attention.mla_bypass import mla_bypass
from glassbox.adapter.attention.mla_cache import head_sizes, is_latent
from glassbox.adapter.internals import members_of
from glassbox.adapter.layer_numbers import number_layers
from glassbox.adapter.protocols import AttentionImpl, AttentionLayer, LatentImpl, VllmConfig
from glassbox.config.model import SUPPORTED_INNER_BACKENDS


@dataclass(frozen=True)
class ServerInfo:
    """What the metrics of one worker are labelled with.

    Attributes:
        model_name: first served model name, as in vLLM's own metrics.
        engine: data-parallel index, as in vLLM's own `engine` label.
        rank, num_ranks: in the tensor-parallel group.
        num_layers, num_heads: of the whole model by its configuration (layers of any kind; query heads).
        stage: layers of the worker's pipeline stage.
    """

    model_name: str
    engine: str
    rank: int
    num_ranks: int
    num_layers: int
    num_heads: int
    stage: range


def server_info(vllm_config: VllmConfig) -> ServerInfo:
    """Read the labels from the worker's VllmConfig; call it in a worker whose groups are set up."""
    from vllm.distributed import get_tp_group

    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    served = model_config.served_model_name
    num_layers = model_config.get_total_num_hidden_layers()
    return ServerInfo(
        model_name=served if isinstance(served, str) else served[0],
        engine=str(parallel.data_parallel_index),
        rank=get_tp_group().rank_in_group,
        num_ranks=parallel.tensor_parallel_size,
        num_layers=num_layers,
        num_heads=model_config.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
        stage=(
            range(*model_config.get_layers_start_end_indices(parallel))
            if parallel.pipeline_parallel_size > 1
            else range(num_layers)
        ),
    )


def attention_layers(vllm_config: VllmConfig, model: Any, drafter: Any) -> dict[str, AttentionLayer]:
    """Attention layers of a model by name, of whatever kind; no drafter's, and none that only keeps a cache.

    Layers of state-space models and linear attention are none: they have no softmax, so no rows.

    Args:
        vllm_config: with which it was built.
        model: vLLM's.
        drafter: its draft model, None if it has none.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    context = vllm_config.compilation_config.static_forward_context
    drafted = _modules(drafter) - _modules(model)
    return {
        name: layer
        for name, layer in context.items()
        if isinstance(layer, AttentionLayerBase) and _computes_attention(layer) and id(layer) not in drafted
    }


def _modules(model: Any) -> set[int]:
    """Of a model; none if there is none, or what drafts is no module (n-grams)."""
    return {id(module) for module in model.modules()} if hasattr(model, "modules") else set()


def _computes_attention(layer: Any) -> bool:
    if hasattr(layer, "impl"):
        return True
    # Models that compute attention in a class of their own; what has a KV cache and no heads is a cache, or a state.
    names = {cls.__name__ for cls in type(layer).__mro__}
    return "MambaBase" not in names and any(hasattr(layer, name) for name in ("num_heads", "n_local_heads"))


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


# Kinds of attention (vLLM's AttentionType) whose rows are others than a decoder's.
_OTHER_KINDS: Final = {
    "encoder": Bypass("encoder", "encoder attention, which sees the keys on both sides and keeps none of them"),
    "encoder_only": Bypass("encoder", "encoder attention, which sees the keys on both sides and keeps none of them"),
    "encoder_decoder": Bypass("cross", "cross attention, whose keys are those of the encoder"),
}


# Classes of vLLM's layers whose rows see others than a run of keys that ends with their own.
_MASKED: Final = {
    "RSWAAttention": Bypass("mask", "reference sliding windows leave a gap between the prefix and the window"),
    "StaticSinkAttention": Bypass("mask", "static sinks are keys that no token of the sequence has"),
}


def find_bypass(layer: AttentionLayer, attach: str = "auto") -> Bypass | None:
    """Why a layer is not observed though vLLM built it; None if nothing stands against it.

    A backend whose `forward` writes the KV cache itself has not got this step's K before it; none that glassbox wraps
    does so since vLLM 0.26.

    Args:
        attach: of the YAML, as the server started with it.
    """
    kind = getattr(layer, "attn_type", "decoder")
    other = _OTHER_KINDS.get(str(getattr(kind, "value", kind)))
    if other is not None or not getattr(getattr(layer, "impl", None), "glassbox_observed", False):
        return other or _other_backend(layer, attach)
    needed = members_of(LatentImpl if is_latent(layer) else AttentionImpl)
    if gone := [name for name in needed if not hasattr(layer.impl, name)]:
        return Bypass(
            "internals",
            f"their backend lacks {', '.join(gone)}, which earlier releases of vLLM have; use a newer glassbox",
        )
    if masked := next((_MASKED[cls.__name__] for cls in type(layer).__mro__ if cls.__name__ in _MASKED), None):
        return masked
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


def _other_backend(layer: AttentionLayer, attach: str) -> Bypass:
    if not hasattr(layer, "impl"):
        return Bypass("backend", f"their model computes attention by itself, in {type(layer).__name__}")
    name = layer.attn_backend.get_name()
    if attach == "custom" and name in SUPPORTED_INNER_BACKENDS:
        return Bypass(
            "backend",
            f"attach: custom observes --attention-backend CUSTOM alone, and theirs is {name}; use attach: auto, or "
            "start vLLM with --attention-backend CUSTOM",
        )
    wrapped = ", ".join(SUPPORTED_INNER_BACKENDS)
    return Bypass("backend", f"their backend {name} is not one that glassbox wraps ({wrapped})")


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
        heads: local query heads of each.
        head_size, num_kv_heads: the largest of theirs, of K and V.
        latent: some of them have latent attention (MLA).
        bypassed: layers whose attention glassbox does not see, by name, and why. Those of one reason are equal.
        bypassed_indices: global index of each of these, by name.
        num_encoder_layers: attention layers of encoders of images or audio, which are no layers of the language model
            and have no KV cache; they are in neither.
        ahead: which tokens' rows in observed layers see keys behind their own, so that they are dropped; or empty.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    heads: tuple[int, ...]
    head_size: int
    num_kv_heads: int
    latent: bool
    bypassed: Mapping[str, Bypass]
    bypassed_indices: Mapping[str, int]
    num_encoder_layers: int = 0
    ahead: str = ""

    @property
    def num_heads(self) -> int:
        """The largest number of local query heads."""
        return max(self.heads, default=0)


def find_layers(
    layers: Mapping[str, AttentionLayer],
    finder: CacheFinder,
    *,
    model: Any = None,
    of_all: Bypass | None = None,
    attach: str = "auto",
    open_images: bool = False,
) -> ObservedLayers:
    """Sort the attention layers of a loaded model into observed and bypassed; drafters' are neither.

    Args:
        layers: by name, in the order in which they were built, their KV caches allocated.
        finder: looks at these.
        model: vLLM's, which they are modules of.
        of_all: a reason why none of them can be observed.
        attach: as `find_bypass` takes it.
        open_images: see `has_open_images`.
    """
    theirs: dict[str, AttentionLayer] = {}
    bypassed: dict[str, Bypass] = {}
    kinds: dict[str, dict[str, AttentionLayer]] = {}
    for name, layer in layers.items():
        if getattr(layer, "is_draft_layer", False):
            continue
        if getattr(getattr(layer, "impl", None), "glassbox_observed", None) is False:  # a drafter's as well
            continue
        of_mla = mla_bypass(layer)
        reason = Bypass(*of_mla) if of_mla else find_bypass(layer, attach)
        # An encoder's layers, and those of cross attention, have the decoder's numbers again.
        kind = reason.slug if reason is not None and reason in _OTHER_KINDS.values() else ""
        kinds.setdefault(kind, {})[name] = layer
        reason = of_all or reason or _unreadable(layer, finder)
        if reason is None:
            theirs[name] = layer
        else:
            bypassed[name] = reason
    index = {name: number for alike in kinds.values() for name, number in number_layers(model, alike).items()}
    names = sorted(theirs, key=lambda name: (index[name], name))
    of_model = [theirs[name] for name in names]
    return ObservedLayers(
        names=tuple(names),
        indices=tuple(index[name] for name in names),
        heads=tuple(layer.num_heads for layer in of_model),
        head_size=max((max(head_sizes(layer)) for layer in of_model), default=0),
        num_kv_heads=max((layer.impl.num_kv_heads for layer in of_model), default=0),
        latent=any(is_latent(layer) for layer in of_model),
        bypassed=bypassed,
        bypassed_indices={name: index[name] for name in bypassed},
        num_encoder_layers=_num_encoder_layers(model),
        ahead=_looking_ahead(of_model, open_images),
    )


def has_open_images(vllm_config: VllmConfig) -> bool:
    """Whether the tokens of an image see each other in the language model (Gemma 3, PaliGemma)."""
    return bool(getattr(vllm_config.model_config, "is_mm_prefix_lm", False))


def _looking_ahead(layers: Sequence[AttentionLayer], open_images: bool) -> str:
    if any(cls.__name__ == "PrefillPrefixLMAttention" for layer in layers for cls in type(layer).__mro__):
        return "prompts"
    return "images" if layers and open_images else ""


def _num_encoder_layers(model: Any) -> int:
    """vLLM keeps those of encoders out of what it knows of a model's layers."""
    modules = () if model is None else model.modules()
    return sum(any(cls.__name__ == "MMEncoderAttention" for cls in type(module).__mro__) for module in modules)


@dataclass(frozen=True)
class GlobalHeads:
    """Which of the model's query heads a worker's layers have.

    Attributes:
        offsets: global index of the first local head of each layer.
        total: the largest number of heads of a layer of the model.
    """

    offsets: tuple[int, ...]
    total: int


def global_heads(server: ServerInfo, local: tuple[int, ...]) -> GlobalHeads:
    """Of layers with so many local heads each."""
    # A layer that is not split over ranks has all heads on each of them.
    whole = [server.num_ranks > 1 and heads == server.num_heads for heads in local]
    totals = [heads if all_here else heads * server.num_ranks for heads, all_here in zip(local, whole, strict=True)]
    offsets = tuple(0 if all_here else heads * server.rank for heads, all_here in zip(local, whole, strict=True))
    return GlobalHeads(offsets, max(totals, default=server.num_heads))
