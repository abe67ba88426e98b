"""The observed impls of multi-head latent attention (MLA): DeepSeek V2 and V3, Kimi, GLM-4.7 and the like.

Such an impl has no `forward`. Its layer orders a step's tokens so that those of decoding requests come first and hands
them, their queries absorbed, to `forward_mqa`, which attends over the latent cache; the others go to `forward_mha`, for
which K and V of each head are made. Both belong to one forward pass of the layer, and the listener is told of them
together, as soon as the last of them has returned.
"""

from typing import Any

from glassbox.adapter import members
from glassbox.adapter.seat import SEAT


def observe_latent_impl(inner: Any) -> type:
    """An observed subclass of an MLA impl."""

    class ObservedLatentImpl(inner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # A drafter's attention is not the model's: it would mix into the same layer numbers.
            self.glassbox_observed = not members.is_draft_model()
            self.glassbox_finder = None  # see layer_cache.py
            self.glassbox_view = None  # see mla_view.py
            self.glassbox_layer = None  # weakly; what prefills isn't told whose impl it is
            self.glassbox_plain = None  # queries that wait for those of the same step that are absorbed

    def forward_mha(
        self: Any,
        q: Any,
        kv_c_normed: Any,
        k_pe: Any,
        kv_c_and_k_pe_cache: Any,
        attn_metadata: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        result = inner.forward_mha(self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, *args, **kw)
        if SEAT.listener is not None and self.glassbox_layer is not None:
            if attn_metadata.num_decode_tokens:
                self.glassbox_plain = q
            else:
                _tell(self, self.glassbox_layer(), kv_c_and_k_pe_cache, None, None, q)
        return result

    def forward_mqa(self: Any, q: Any, kv_c_and_k_pe_cache: Any, attn_metadata: Any, layer: Any) -> Any:
        result = inner.forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer)
        plain, self.glassbox_plain = self.glassbox_plain, None
        _tell(self, layer, kv_c_and_k_pe_cache, q, result, plain)
        return result

    SEAT.listening.add(ObservedLatentImpl, forward_mha=forward_mha, forward_mqa=forward_mqa)
    return ObservedLatentImpl


def _tell(impl: Any, layer: Any, kv_cache: Any, absorbed: Any, output: Any, plain: Any) -> None:
    listener = SEAT.listener
    if listener is not None and layer is not None and impl.glassbox_observed:
        listener.after_latent_attention(impl, layer, kv_cache, absorbed, output, plain)


def observe_latent_builder(inner: Any) -> type:
    """An observed subclass of a metadata builder of MLA, which does not keep the names of its layers."""

    class ObservedLatentBuilder(inner):
        def __init__(self, kv_cache_spec: Any, layer_names: list[str], *args: Any, **kw: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, *args, **kw)
            self.glassbox_layer_names = layer_names

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kw)
            listener = SEAT.listener
            if listener is not None:
                listener.on_build(self.glassbox_layer_names, common_attn_metadata, metadata.num_decode_tokens)
            return metadata

    return ObservedLatentBuilder
