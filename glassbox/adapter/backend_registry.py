"""The registry config API: a backend's configuration travels with its registration.

Owns the API that vLLM pull request 40065 proposed, on `vllm.v1.attention.backends.registry`, for a vLLM that
lacks it:

    register_backend(backend, class_path=None, is_mamba=False, backend_config=None)
    get_backend_config(backend), member.get_config(), member.clear_config()

for attention and mamba members. If vLLM has it, vLLM's is used and nothing is changed.

A module that has done `from ...registry import register_backend` before `install` keeps vLLM's original and
can't pass `backend_config`; look the function up on the module, or import it later. Configurations are per
process: every process of a server loads the plugins and registers for itself.
"""

import functools
import inspect
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any, Final

_ENUMS: Final = ("AttentionBackendEnum", "MambaAttentionBackendEnum")
_MARK: Final = "__glassbox_handle__"


class Handle:
    """What `install` changed; `remove` undoes it."""

    def __init__(self, registry: ModuleType) -> None:
        self._registry = registry
        # (owner, attribute, what is there now, what was there before or None if nothing)
        self._changes: list[tuple[Any, str, object, object]] = []

    @property
    def installed(self) -> bool:
        """True if the API on vLLM's registry is glassbox's, False if it is vLLM's own or was removed."""
        return bool(self._changes)

    def remove(self) -> None:
        """Restore vLLM's registry exactly and forget the configurations. Does nothing the second time.

        Registrations stay: they are vLLM's. What someone else has put over an attribute since stays theirs.
        """
        while self._changes:
            owner, name, ours, before = self._changes.pop()
            if vars(owner).get(name) is not ours:
                continue
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def _set(self, owner: Any, name: str, value: object) -> None:
        self._changes.append((owner, name, value, vars(owner).get(name)))
        setattr(owner, name, value)


def load() -> ModuleType:
    """vLLM's registry module, imported."""
    from vllm.v1.attention.backends import registry

    return registry


def install(registry: ModuleType | None = None) -> Handle:
    """Give vLLM's registry the config API unless it has it. Calling it again returns the same handle.

    Args:
        registry: the module to work on; default is vLLM's.

    Raises:
        ImportError: vLLM, or its registry module, is not there.
        AttributeError: the registry is not as in vLLM 0.26 to 0.33.
    """
    if registry is None:
        registry = load()
    original = registry.register_backend
    existing = getattr(original, _MARK, None)
    if existing is not None:
        return existing
    handle = Handle(registry)
    if "backend_config" in inspect.signature(original).parameters:
        return handle
    enums = [getattr(registry, name) for name in _ENUMS]
    # Members of the two enums with the same name (CUSTOM) are different keys: an Enum is equal only to
    # itself.
    configs: dict[Enum, Any] = {}
    for enum in enums:
        handle._set(enum, "get_config", _get_config_method(configs))
        handle._set(enum, "clear_config", _clear_config_method(configs))
    handle._set(registry, "get_backend_config", _get_backend_config_function())
    register_backend = _register_backend_function(registry, original, configs)
    setattr(register_backend, _MARK, handle)
    handle._set(registry, "register_backend", register_backend)
    return handle


def _get_config_method(configs: dict[Enum, Any]) -> Callable[[Enum], Any]:
    def get_config(self: Enum) -> Any:
        """Configuration given when this backend was registered; None if there is none."""
        return configs.get(self)

    return get_config


def _clear_config_method(configs: dict[Enum, Any]) -> Callable[[Enum], None]:
    def clear_config(self: Enum) -> None:
        """Forget this backend's configuration; its registration stays."""
        configs.pop(self, None)

    return clear_config


def _get_backend_config_function() -> Callable[[Any], Any]:
    def get_backend_config(backend: Any) -> Any:
        """Configuration of `backend`, an attention or mamba member; None if there is none."""
        return backend.get_config()

    return get_backend_config


def _register_backend_function(
    registry: ModuleType, original: Callable[..., Callable[[type], type]], configs: dict[Enum, Any]
) -> Callable[..., Callable[[type], type]]:
    def register_backend(
        backend: Any, class_path: str | None = None, is_mamba: bool = False, backend_config: Any = None
    ) -> Callable[[type], type]:
        """As vLLM's `register_backend`; see it for the other arguments.

        Args:
            backend_config: any object, handed out by `member.get_config()`. None keeps what an earlier
                registration stored.

        Returns:
            the decorator that registers a class; after a direct registration one that does nothing.
        """
        result = original(backend, class_path, is_mamba)
        if backend_config is None:
            return result
        if isinstance(backend, str):
            backend = getattr(registry, _ENUMS[is_mamba]).__members__[backend]
        if class_path is not None:
            configs[backend] = backend_config
            return result

        @functools.wraps(result)
        def decorator(cls: type) -> type:
            registered = result(cls)
            # Not before: a failed registration must leave no configuration behind.
            configs[backend] = backend_config
            return registered

        return decorator

    return register_backend
