"""Layers of a worker as the native CPU kernel knows them, and which of them are measured together."""

import weakref
from dataclasses import dataclass
from typing import NamedTuple, Self

from torch import Tensor

from glassbox.kernels.row_stats_native import NativeLayer
from glassbox.measure.contract import PackedLayer


class LayerKind(NamedTuple):
    """What layers must have in common to be measured together; reach as of `LayerParams`."""

    reach: int | None
    num_heads: int
    head_size: int


@dataclass(frozen=True)
class CachedLayer:
    """A layer for the native kernel, as long as it has the same cache.

    Attributes:
        cache: held weakly: it must not stay alive when vLLM has freed it.
        layer: of the kernel.
        kind: of layer.
    """

    cache: weakref.ref[Tensor]
    layer: NativeLayer
    kind: LayerKind

    @classmethod
    def of(cls, view: PackedLayer, query: Tensor, kv_cache: Tensor) -> Self:
        """Look at a layer.

        Raises:
            RuntimeError: the cache can't be read; the message says why.
        """
        num_heads, head_size = query.shape[1:]
        native = NativeLayer(view.params, view.pages(kv_cache), query.dtype, num_heads=num_heads, head_size=head_size)
        return cls(weakref.ref(kv_cache), native, LayerKind(view.params.reach, num_heads, head_size))
