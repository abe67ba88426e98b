"""Latent attention (MLA): where its cache has what, how queries are absorbed, and which of its layers are bypassed."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from glassbox.adapter.attention.cache_layout import CacheLayout, CacheLayoutError
from glassbox.adapter.attention.layer_cache import CacheFinder
from glassbox.adapter.attention.mla_forward import absorb_queries, latent_forward
from glassbox.adapter.attention.mla_view import LatentStridedView
from glassbox.adapter.internals import members_of
from glassbox.adapter.layers import find_layers
from glassbox.adapter.protocols import LatentImpl

BLOCKS, BLOCK, LATENT, ROTARY, NOPE, HEADS = 5, 4, 16, 8, 6, 3
FP8 = torch.float8_e4m3fn


class Layer(SimpleNamespace):
    """Can be held weakly, as vLLM's can."""


def latent_layer(kv_cache: Tensor | None = None, kv_cache_dtype: str = "auto", **changes: Any) -> Any:
    """A layer as vLLM's MLAAttention, whose impl is observed."""
    impl = SimpleNamespace(**dict.fromkeys(members_of(LatentImpl)))
    impl.kv_cache_dtype, impl.num_kv_heads, impl.supports_quant_query_input = kv_cache_dtype, 1, False
    impl.glassbox_observed, impl.glassbox_finder = True, None
    impl.do_kv_cache_update = write_latents
    weights = torch.randn(HEADS, NOPE, LATENT, generator=torch.Generator().manual_seed(0))
    layer = Layer(
        layer_name="model.layers.3.self_attn.attn", impl=impl, kv_cache=kv_cache, num_heads=HEADS,
        head_size=LATENT + ROTARY, kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROTARY, W_UK_T=weights,
        attn_backend=SimpleNamespace(forward_includes_kv_cache_update=True), _k_scale=torch.tensor(0.5),
        _q_scale=torch.tensor(0.25),
    )  # fmt: skip
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def write_latents(
    latent: Tensor, rotary: Tensor, cache: Tensor, slots: Tensor, kv_cache_dtype: str, scale: Tensor
) -> None:
    """As vLLM's backends of MLA do it: a latent vector and its rotary part side by side."""
    numbers = torch.cat([latent, rotary.squeeze(1)], dim=-1) / scale
    stored = cache if kv_cache_dtype == "auto" else cache.view(FP8)
    stored[slots // BLOCK, slots % BLOCK] = numbers.to(stored.dtype)


def write_rotary_first(latent: Tensor, rotary: Tensor, cache: Tensor, slots: Tensor, *_: Any) -> None:
    numbers = torch.cat([rotary.squeeze(1), latent], dim=-1)
    cache[slots // BLOCK, slots % BLOCK] = numbers.to(cache.dtype)


def found(layer: Any, num_blocks: int = BLOCKS) -> CacheLayout:
    return CacheFinder(torch.bfloat16, num_blocks).find(layer)


class TestLayout:
    @pytest.mark.parametrize("write", [write_latents, write_rotary_first])
    @pytest.mark.parametrize("padding", [0, 40])
    def test_key_and_value_of_a_token(self, write: Callable[..., None], padding: int) -> None:
        """All of a token's vector is its key, its latent part is its value; in whatever order they are written."""
        memory = torch.zeros(BLOCKS * (BLOCK * (LATENT + ROTARY) + padding))
        strides = (BLOCK * (LATENT + ROTARY) + padding, LATENT + ROTARY, 1)
        cache = memory.as_strided((BLOCKS, BLOCK, LATENT + ROTARY), strides)
        layer = latent_layer(cache)
        layer.impl.do_kv_cache_update = write
        layout = found(layer)
        assert (layout.block_size, layout.num_kv_heads) == (BLOCK, 1)
        latent, rotary = torch.randn(BLOCKS * BLOCK, LATENT), torch.randn(BLOCKS * BLOCK, ROTARY)
        write(latent, rotary.unsqueeze(1), cache, torch.arange(BLOCKS * BLOCK), "auto", torch.ones(()))
        starts = torch.arange(BLOCKS)[:, None, None] * layout.key.block_stride
        key = memory[starts + layout.key.offsets].view(-1, LATENT + ROTARY)
        assert torch.equal(key, torch.cat([latent, rotary], dim=-1))
        assert torch.equal(memory[starts + layout.value.offsets].view(-1, LATENT), latent)

    def test_fp8(self) -> None:
        """Bytes, read as numbers of one factor; that of the layer is not mistaken for another layout."""
        layer = latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY, dtype=torch.uint8), "fp8")
        layout = found(layer)
        assert layout.dtype == FP8
        latent = torch.randn(BLOCKS * BLOCK, LATENT)
        write_latents(
            latent, torch.zeros(BLOCKS * BLOCK, 1, ROTARY), layer.kv_cache, torch.arange(20), "fp8", layer._k_scale
        )
        read = layout.view(layer.kv_cache, layout.value).float() * layer._k_scale
        assert torch.equal(read.view(-1, LATENT), (latent / 0.5).to(FP8).float() * 0.5)

    def test_a_token_that_is_more_than_its_vector(self) -> None:
        """Scales among the numbers, as in packed types."""
        with pytest.raises(CacheLayoutError, match="holds more than K and V"):
            found(latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY + 4, dtype=torch.uint8), "fp8"))

    def test_no_rotary_part(self) -> None:
        """Not supported, and says so."""
        with pytest.raises(CacheLayoutError, match="without a rotary part"):
            found(latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT), qk_rope_head_dim=0))


class TestAbsorbing:
    plain = torch.randn(7, HEADS, NOPE + ROTARY, generator=torch.Generator().manual_seed(1))

    def test_scores_are_those_of_the_heads(self) -> None:
        """Absorbed queries over latent vectors score what plain ones score over the keys that are made of them."""
        layer = latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY))
        latent, rotary = torch.randn(11, LATENT), torch.randn(11, ROTARY)
        keys = torch.einsum("nl,hpl->nhp", latent, layer.W_UK_T)
        expected = torch.einsum("thp,nhp->thn", self.plain[..., :NOPE], keys)
        expected += torch.einsum("thr,nr->thn", self.plain[..., NOPE:], rotary)
        of_latent, of_rotary = absorb_queries(layer, self.plain)
        scores = torch.einsum("thl,nl->thn", of_latent, latent) + torch.einsum("thr,nr->thn", of_rotary, rotary)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)

    def test_keys_of_some_heads(self) -> None:
        """Those that plain queries score, in the type of what they are made of."""
        layer = latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY))
        vectors = torch.randn(11, LATENT + ROTARY)
        found = latent_forward(layer, None, None, self.plain).head_keys(vectors, torch.tensor([2, 0]))
        nope = torch.einsum("nl,hpl->hnp", vectors[:, :LATENT], layer.W_UK_T[[2, 0]])
        expected = torch.cat([nope, vectors[:, LATENT:].expand(2, -1, -1)], dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert found.is_contiguous(), "its pages are views"

    def test_where_vllm_quantises_its_own(self) -> None:
        """They are divided by the scale by which all are multiplied; a backend that takes them as they are has none."""
        cache = torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY, dtype=torch.uint8)
        plain = absorb_queries(latent_layer(cache, "fp8"), self.plain)
        layer = latent_layer(cache, "fp8")
        layer.impl.supports_quant_query_input = True
        for part, quantised in zip(plain, absorb_queries(layer, self.plain), strict=True):
            torch.testing.assert_close(quantised * 0.25, part)

    def test_weights_that_are_missing(self) -> None:
        """It says which layer lacks what."""
        layer = latent_layer(torch.zeros(1), W_UK_T=None)
        with pytest.raises(RuntimeError, match=r"model\.layers\.3\.self_attn\.attn must have W_UK_T"):
            absorb_queries(layer, self.plain)

    @pytest.mark.parametrize("whole", [True, False])
    def test_one_forward_of_two_parts(self, whole: bool) -> None:
        """Of the tokens that are asked for the queries are set, whichever part they are of."""
        layer = latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY))
        absorbed: Any = torch.randn(4, HEADS, LATENT + ROTARY)
        parts = absorbed if whole else absorbed.split([LATENT, ROTARY], dim=-1)
        output = torch.randn(4, HEADS, LATENT)
        forward = latent_forward(layer, parts, output, self.plain).at(torch.tensor([0, 3, 4, 9]))
        assert forward.query.shape == (4 + 7, HEADS, LATENT + ROTARY)
        assert forward.output is output
        assert torch.equal(forward.query[[0, 3]], absorbed[[0, 3]])
        assert torch.equal(forward.query[[4, 9]], torch.cat(absorb_queries(layer, self.plain[[0, 5]]), dim=-1))

    def test_one_part_alone(self) -> None:
        """Steps that only prefill, or only decode."""
        layer = latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY))
        prompt = latent_forward(layer, None, None, self.plain)
        assert (prompt.num_absorbed, prompt.query_dtype, len(prompt.at(torch.tensor([6])).query)) == (
            0,
            torch.float32,
            7,
        )
        decode = latent_forward(layer, torch.randn(4, HEADS, LATENT + ROTARY).bfloat16(), None, None)
        assert (decode.num_absorbed, decode.query_dtype, len(decode.at(torch.tensor([1])).query)) == (
            4,
            torch.bfloat16,
            4,
        )


class TestView:
    """On a GPU; nothing of it needs one."""

    @pytest.mark.parametrize("quantised", [False, True])
    def test_fp8_numbers_of_a_cache_of_bytes(self, quantised: bool) -> None:
        """vLLM's impls get them as FP8: they are the same cache, so nothing is written to find out."""
        layer = latent_layer(torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY, dtype=torch.uint8), "fp8")
        layer.impl.scale, layer.impl.supports_quant_query_input = 0.2, quantised
        latent, rotary = torch.randn(BLOCKS * BLOCK, LATENT), torch.randn(BLOCKS * BLOCK, 1, ROTARY)
        write_latents(latent, rotary, layer.kv_cache, torch.arange(BLOCKS * BLOCK), "fp8", layer._k_scale)
        finder = CacheFinder(torch.bfloat16, BLOCKS)
        assert find_layers({"layers.3.attn": layer}, finder).names == ("layers.3.attn",)
        layer.impl.do_kv_cache_update = None
        given = layer.kv_cache.view(FP8)
        forward = latent_forward(layer, torch.randn(4, HEADS, LATENT + ROTARY), None, None)
        view = LatentStridedView(layer.impl, layer, forward, given)
        assert (view.num_heads, view.head_size, view.gave_kv) == (HEADS, LATENT + ROTARY, False)
        assert view.query_dtype == (FP8 if quantised else torch.float32)
        assert view.params.k_scale is view.params.v_scale is layer._k_scale
        assert (view.params.q_scale is None) != quantised
        for cache in (given, None):
            assert view.keys(cache).shape == (BLOCKS, 1, BLOCK, LATENT + ROTARY)
            assert torch.equal(view.values(cache).float().view(-1, LATENT), (latent / 0.5).to(FP8).float())


class DeepseekV4Attention(SimpleNamespace):
    """Named as vLLM's class is; it has no impl."""


class TestBypass:
    @pytest.mark.parametrize(
        ("changes", "slug", "reason"),
        [
            ({"use_sparse": True}, "sparse", "an indexer picks"),
            ({"sliding_window": 128}, "latent_window", "sliding window"),
            ({"non_causal_multi_token_decode": True}, "non_causal", "see each other"),
            ({"kv_cache_dtype": "fp8_ds_mla"}, "packed_latents", "of type fp8_ds_mla, .* --kv-cache-dtype auto or fp8"),
            ({"kv_cache_dtype": "nvfp4"}, "cache_type", "no plain numbers"),
        ],
    )
    def test_each_has_its_reason(self, changes: dict[str, Any], slug: str, reason: str) -> None:
        """What a row sees, or what its keys are, can't be told."""
        cache = torch.zeros(BLOCKS, BLOCK, LATENT + ROTARY)
        plain, changed = latent_layer(cache), latent_layer(cache, **changes)
        finder = CacheFinder(torch.float32, BLOCKS)
        observed = find_layers({"layers.0.attn": plain, "layers.1.attn": changed}, finder)
        assert observed.names == ("layers.0.attn",)
        assert (observed.latent, observed.head_size, observed.num_kv_heads) == (True, LATENT + ROTARY, 1)
        assert plain.impl.glassbox_layer() is plain
        assert observed.bypassed["layers.1.attn"].slug == slug
        assert re.search(reason, observed.bypassed["layers.1.attn"].reason)

    def test_sparse_by_its_impl(self) -> None:
        """A backend that is sparse, whatever the layer says."""
        layer = latent_layer()
        layer.impl.is_sparse = True
        assert (
            find_layers({"layers.0.attn": layer}, CacheFinder(torch.float32)).bypassed["layers.0.attn"].slug == "sparse"
        )

    def test_compressed_latents(self) -> None:
        """DeepSeek V4's layers have no impl; they are bypassed all the same."""
        bypassed = find_layers({"layers.0.attn": DeepseekV4Attention()}, CacheFinder(torch.float32)).bypassed  # type: ignore[dict-item]
        assert bypassed["layers.0.attn"].slug == "compressed_latents"

    def test_an_impl_that_lacks_something(self) -> None:
        """Of a later release: what it lacks is named."""
        layer = latent_layer()
        del layer.impl.supports_quant_query_input
        (bypass,) = find_layers({"layers.0.attn": layer}, CacheFinder(torch.float32)).bypassed.values()
        assert bypass.slug == "internals"
        assert "lacks supports_quant_query_input" in bypass.reason
