"""Which layers with latent attention (MLA) are not observed, and why."""

from typing import Any

from glassbox.adapter.attention.mla_cache import is_latent


def is_compressed(layer: Any) -> bool:
    """Whether a layer is one of DeepSeek V4's, which have no impl and are none of vLLM's attention classes."""
    return any(cls.__name__ == "DeepseekV4Attention" for cls in type(layer).__mro__)


def mla_bypass(layer: Any) -> tuple[str, str] | None:
    """Slug and reason of `layers.Bypass`; None if nothing of MLA's own stands against the layer."""
    if is_compressed(layer):
        return (
            "compressed_latents",
            "they attend over compressed latent vectors that an indexer picks (DeepSeek V4), which glassbox can't tell",
        )
    if not is_latent(layer):
        return None
    kv_cache_dtype = str(layer.impl.kv_cache_dtype)
    reasons = {
        (
            "sparse",
            "their latent attention is sparse (DeepSeek V3.2): a row sees only the keys that an indexer picks, which "
            "glassbox can't tell",
        ): getattr(layer, "use_sparse", False) or getattr(layer.impl, "is_sparse", False),
        (
            "latent_window",
            "their latent attention has a sliding window, whose bounds glassbox can't tell",
        ): getattr(layer, "sliding_window", None) is not None,
        (
            "non_causal",
            "their rows of one step see each other whatever their order",
        ): getattr(layer, "non_causal_multi_token_decode", False),
        (
            "packed_latents",
            f"their latent cache is of type {kv_cache_dtype}, which packs scales and numbers of several types into the "
            "bytes of a token; serve with --kv-cache-dtype auto or fp8 and a backend that takes it",
        ): kv_cache_dtype.endswith("_ds_mla"),
    }
    return next((reason for reason, stands in reasons.items() if stands), None)
