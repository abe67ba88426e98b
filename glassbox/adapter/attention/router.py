"""The CUSTOM backend: stands for whatever vLLM would run, or for the `inner_backend` of the YAML, observed.

vLLM resolves `--attention-backend CUSTOM` to this class, asks it to validate the layer's configuration, and then for
the path of the class to use. The router answers with the path of the observed subclass of the inner backend.
"""

from typing import Any

from glassbox.adapter import members
from glassbox.adapter.attention.observed import inner_class, observed_path
from glassbox.adapter.seat import SEAT
from glassbox.config.load import SUPPORTED_INNER_BACKENDS


class GlassboxBackend:
    """Router behind `AttentionBackendEnum.CUSTOM`; never instantiated, never a layer's backend itself."""

    @classmethod
    def validate_configuration(cls, device_capability: Any = None, **selector: Any) -> list[str]:
        """Reasons why the inner backend can't serve this configuration; empty if it can.

        Args:
            device_capability: of the GPU, as vLLM passes it.
            selector: fields of vLLM's AttentionSelectorConfig; new releases add some.
        """
        wanted = SEAT.inner_backend
        name = cls._platform_choice(selector) if wanted == "auto" else wanted
        if name not in SUPPORTED_INNER_BACKENDS:
            supported = ", ".join(SUPPORTED_INNER_BACKENDS)
            return [
                f"glassbox can't observe {name}, which vLLM picks for this layer; it observes {supported}. "
                "Leave out --attention-backend CUSTOM, or name one of these as inner_backend"
            ]
        reasons: list[str] = []
        if wanted != "auto":
            inner: Any = inner_class(name)
            reasons = list(inner.validate_configuration(device_capability=device_capability, **selector))
        SEAT.inner_name = name
        return reasons

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        """Module and qualified name of the class chosen by the last `validate_configuration`.

        That is the observed subclass; with `enabled: false` vLLM's own, as CUSTOM must stand for something.
        """
        if SEAT.inner_name is None:
            raise RuntimeError("the CUSTOM backend was resolved before its configuration was validated")
        if not SEAT.enabled:
            unobserved = inner_class(SEAT.inner_name)
            return unobserved.__module__, unobserved.__qualname__
        module, _, qualname = observed_path(SEAT.inner_name).rpartition(".")
        return module, qualname

    @staticmethod
    def _platform_choice(selector: dict[str, Any]) -> str:
        """Name of the backend that vLLM picks for this configuration when none is asked for."""
        from vllm.platforms import current_platform
        from vllm.v1.attention.selector import AttentionSelectorConfig

        path = current_platform.get_attn_backend_cls(
            None, attn_selector_config=AttentionSelectorConfig(**selector), num_heads=None
        )
        backend: Any = members.resolve_class(path)
        name: str = backend.get_name()
        return name
