"""The observed builder of chunked local attention (Llama 4), whose metadata is of virtual requests.

vLLM cuts each request into its chunks and gives the inner builder one virtual request for each. What rows see is told
by the real ones: by their positions and the chunk's size. So the listener is told of the real batch, not of the virtual
one that the inner builder gets.
"""

from functools import wraps
from typing import Any

from glassbox.adapter.seat import SEAT

# vLLM's class, which it derives from the builder of whatever backend it wraps.
_BUILDER = "ChunkedLocalAttentionBuilder"


def observe_chunks(builder: Any) -> None:
    """Wrap a subclass of an observed builder, if it is that one."""
    if builder.__name__ == _BUILDER:
        builder.build = _wrap_build(builder.build)
        if "update_block_table" in vars(builder):
            builder.update_block_table = _wrap_update(builder.update_block_table)


def is_building_chunks(builder: Any) -> bool:
    """Whether an inner builder is given virtual requests."""
    return getattr(builder, "glassbox_chunks", False)


def _wrap_build(original: Any) -> Any:
    @wraps(original)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any) -> Any:
        self.glassbox_chunks = True
        try:
            metadata = original(self, common_prefix_len, common_attn_metadata, *args, **kw)
        finally:
            self.glassbox_chunks = False
        listener = SEAT.listener
        if listener is not None:
            listener.on_build(self.layer_names, common_attn_metadata)
        return metadata

    return build


def _wrap_update(original: Any) -> Any:
    """Layers of the same kind in another KV-cache group are given the metadata of the first with their block table."""

    @wraps(original)
    def update_block_table(self: Any, metadata: Any, block_table: Any, slot_mapping: Any) -> Any:
        updated = original(self, metadata, block_table, slot_mapping)
        listener = SEAT.listener
        if listener is not None:
            listener.on_block_table(self.layer_names, block_table)
        return updated

    return update_block_table
