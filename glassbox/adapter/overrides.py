"""Naming the observed backends in vLLM's registry."""

import sys
from collections.abc import Callable
from contextlib import ExitStack

from glassbox.adapter.attention.observed import observed_path
from glassbox.config.load import CPU_BACKENDS, MLA_BACKENDS, SUPPORTED_INNER_BACKENDS, GlassboxConfig
from glassbox.core.logs import get_logger

logger = get_logger(__name__)


def override(config: GlassboxConfig) -> Callable[[], None]:
    """Override vLLM's members by their observed subclasses as `attach` says.

    With `attach: custom` only the CPU's are overridden: vLLM's CPU platform ignores `--attention-backend CUSTOM` and
    would never ask the router.

    Returns:
        The undo: vLLM selects its own classes again. If it raises instead, nothing is overridden.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    with ExitStack() as undo:
        undo.callback(_forget_selection)
        names = SUPPORTED_INNER_BACKENDS if config.attach == "auto" else CPU_BACKENDS
        for name in names if config.enabled else ():
            if name in MLA_BACKENDS and not hasattr(AttentionBackendEnum, name):
                continue  # of later releases
            member = AttentionBackendEnum[name]
            if member.is_overridden():
                # Deriving from vLLM's class would change what is served, from theirs may change it as well.
                logger.warning(
                    "%s is overridden by %s already; glassbox leaves it alone and does not observe it",
                    name,
                    member.get_path(),
                )
                continue
            undo.callback(member.clear_override)
            register_backend(member, observed_path(name))
        _forget_selection()
        return undo.pop_all().close


def free_custom() -> None:
    """Take the router out of CUSTOM, where `publish.py` has put it."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum.CUSTOM.clear_override()
    _forget_selection()


def _forget_selection() -> None:
    """vLLM caches which class a configuration resolves to."""
    selector = sys.modules.get("vllm.v1.attention.selector")
    if selector is not None:
        selector._cached_get_attn_backend.cache_clear()
