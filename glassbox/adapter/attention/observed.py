"""Observed subclasses of vLLM's attention backends, made on demand, one stable class per inner backend.

This module's `ObservedFLASH_ATTN` is a true subclass of vLLM's FlashAttentionBackend whose impl and metadata builder
tell the listener what they are given and change nothing. Everything else is inherited, `get_name()` included: vLLM
compares it with enum members and hashes it. The classes are found by attribute access on this module, because vLLM
imports a backend by `module.qualname`, more than once.
"""

import logging
from functools import cache
from typing import Any, Final

from glassbox.adapter import members
from glassbox.adapter.attention.observed_chunks import is_building_chunks, observe_chunks
from glassbox.adapter.attention.observed_mla import observe_latent_builder, observe_latent_impl
from glassbox.adapter.seat import SEAT
from glassbox.config.load import CPU_BACKENDS, MLA_BACKENDS, SUPPORTED_INNER_BACKENDS
from glassbox.core.logs import get_logger, log_once

logger = get_logger(__name__)

_PREFIX: Final = "Observed"


def observed_path(name: str) -> str:
    """Class path under which `name`'s observed subclass is registered and imported."""
    return f"{__name__}.{_PREFIX}{name}"


def __getattr__(attribute: str) -> type:
    name = attribute.removeprefix(_PREFIX)
    if name == attribute or name not in SUPPORTED_INNER_BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    # vLLM's CPU platform ignores `--attention-backend CUSTOM` and takes the class of a CPU's member, so these are
    # overridden for both values of `attach`, and it is decided here whether anything is observed.
    if name in CPU_BACKENDS:
        _say_what_cpu_ignores(name)
        if SEAT.attach == "custom" and not members.custom_is_selected():
            return inner_class(name)  # the worker says that, and why
    return observed_class(name)


def _say_what_cpu_ignores(runs: str) -> None:
    wanted = SEAT.inner_backend
    if wanted not in {"auto", runs}:
        log_once(
            logger,
            logging.WARNING,
            "inner_backend",
            "inner_backend %s is not used: on a CPU vLLM always runs %s here; use inner_backend: auto",
            wanted,
            runs,
        )


def inner_class(name: str) -> type:
    """vLLM's own backend class of that name, whatever overrides it."""
    return members.resolve_class(members.backend_member(name).value)


@cache
def observed_class(name: str) -> type:
    """The observed subclass of the backend `name`, with its impl and builder.

    Raises:
        ImportError: as the inner backend's module does where its kernels are missing.
    """
    inner: Any = inner_class(name)
    of_impl, of_builder = _observe_impl, _observe_builder
    if name in MLA_BACKENDS:
        of_impl, of_builder = observe_latent_impl, observe_latent_builder
    impl = _named(of_impl(inner.get_impl_cls()), f"{_PREFIX}{name}Impl")
    builder = _named(of_builder(inner.get_builder_cls()), f"{_PREFIX}{name}Builder")
    return type(
        f"{_PREFIX}{name}",
        (inner,),
        {
            "__module__": __name__,
            "__qualname__": f"{_PREFIX}{name}",
            "__doc__": f"{inner.__name__}, its attention observed by glassbox.",
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
        },
    )


def _observe_impl(inner: Any) -> type:
    class ObservedImpl(inner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # A drafter's attention is not the model's: it would mix into the same layer numbers.
            self.glassbox_observed = not members.is_draft_model()
            self.glassbox_finder = None  # see layer_cache.py
            self.glassbox_view = None  # see layer_view.py

    def forward(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        output = inner.forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kw)
        listener = SEAT.listener
        if listener is not None and attn_metadata is not None and self.glassbox_observed:
            listener.after_attention(self, layer, query, key, value, kv_cache, attn_metadata, output)
        return output

    SEAT.listening.add(ObservedImpl, forward=forward)
    return ObservedImpl


def _observe_builder(inner: Any) -> type:
    class ObservedBuilder(inner):
        def __init_subclass__(cls, **kw: Any) -> None:
            super().__init_subclass__(**kw)
            observe_chunks(cls)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kw)
            listener = SEAT.listener
            if listener is not None and not is_building_chunks(self):
                listener.on_build(self.layer_names, common_attn_metadata)
            return metadata

    return ObservedBuilder


def _named(cls: type, name: str) -> type:
    """Give a generated class its own name: vLLM groups builders by type and logs impls by name."""
    cls.__name__ = cls.__qualname__ = name
    return cls
