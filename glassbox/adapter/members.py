"""vLLM's attention backends by name: the members of its registry, their classes, and for whom they are chosen."""

from typing import Any

from glassbox.adapter.internals import Feature, lacks


def custom_is_selected() -> bool:
    """True if the user asked for `--attention-backend CUSTOM` (for any kind of KV cache)."""
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = get_current_vllm_config().attention_config
    per_kind = (getattr(attention, "backend_per_kind", None) or {}).values()
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


def is_draft_model() -> bool:
    """True while vLLM builds the layers of a draft model (speculative decoding)."""
    if lacks(Feature.DRAFTERS):
        return False
    from vllm.compilation import backends

    return bool(backends.model_tag != "backbone")
