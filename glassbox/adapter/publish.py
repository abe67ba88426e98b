"""The configuration in vLLM's backend registry: published there, and read from nowhere else by the backend.

`register_backend(CUSTOM, ..., backend_config=...)` and `get_backend_config(CUSTOM)`, see `backend_registry.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from glassbox.config.load import GlassboxConfig

CUSTOM_BACKEND_PATH: Final = "glassbox.adapter.attention.router.GlassboxBackend"


def publish(config: GlassboxConfig) -> None:
    """Put a configuration where `reader` finds it, and CUSTOM under the router's path."""
    from vllm.v1.attention.backends import registry

    registry.register_backend(
        registry.AttentionBackendEnum.CUSTOM, CUSTOM_BACKEND_PATH, backend_config=config.model_dump()
    )


def reader() -> Callable[[], dict[str, Any] | None]:
    """Reads what is published. Imported once: a step asks each time, and an import statement takes 15 us."""
    from vllm.v1.attention.backends import registry

    return partial(registry.get_backend_config, registry.AttentionBackendEnum.CUSTOM)
