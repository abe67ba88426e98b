"""Which layers of a model are observed."""

from types import SimpleNamespace
from typing import Any

import pytest

from glassbox.adapter import layers
from glassbox.adapter.attention.cache_layout import CacheLayoutError
from glassbox.adapter.internals import members_of
from glassbox.adapter.layers import Bypass, ObservedLayers
from glassbox.adapter.protocols import AttentionImpl


def layer(
    marker: bool | None, heads: int = 4, *, draft: bool = False, late: bool = False, kv_cache: str = "auto"
) -> Any:
    """An attention layer whose impl is observed (True), a drafter's (False) or vLLM's own (None)."""
    impl = SimpleNamespace(**dict.fromkeys(members_of(AttentionImpl)), glassbox_finder=None)
    impl.kv_cache_dtype, impl.num_kv_heads = kv_cache, 2
    if marker is not None:
        impl.glassbox_observed = marker
    backend = SimpleNamespace(forward_includes_kv_cache_update=late)
    return SimpleNamespace(
        impl=impl, num_heads=heads, head_size=64, head_size_v=64, is_draft_layer=draft, attn_backend=backend
    )


class Finder:
    """Finds a layout in every cache but those of a kind."""

    def find(self, of_layer: Any) -> str:
        if of_layer.impl.kv_cache_dtype == "odd":
            raise CacheLayoutError("odd numbers")
        return "layout"


def find_layers(of_model: dict[str, Any], of_all: Bypass | None = None) -> ObservedLayers:
    """With that finder."""
    finder: Any = Finder()
    return layers.find_layers(of_model, finder, of_all)


class ChunkedLocalAttention(SimpleNamespace):
    """Named as vLLM's class is."""


class TestFindLayers:
    def test_observed_layers_come_in_the_order_of_the_model(self) -> None:
        """Whatever the order of vLLM's dictionary; the widest layer gives the number of heads."""
        found = find_layers({f"model.layers.{i}.self_attn.attn": layer(True, heads=i + 1) for i in (10, 2, 0)})
        assert found.indices == (0, 2, 10)
        assert found.names[1] == "model.layers.2.self_attn.attn"
        assert found.num_heads == 11
        assert found.bypassed == {}

    def test_layers_of_other_backends_are_named_as_bypassed(self) -> None:
        """A model may hard-wire a backend that glassbox does not wrap."""
        found = find_layers({"layers.0.attn": layer(True), "layers.1.attn": layer(None)})
        assert found.indices == (0,)
        assert found.bypassed == {"layers.1.attn": Bypass("backend", "their backend is not one that glassbox wraps")}

    def test_drafters_are_neither(self) -> None:
        """A draft model's layers are not the model's, and nobody expects them to be measured."""
        found = find_layers({"layers.0.attn": layer(False), "layers.1.attn": layer(True, draft=True)})
        assert (found.names, found.bypassed) == ((), {})

    def test_virtual_batches_and_late_keys_bypass(self) -> None:
        """Their rows can't be found, or K is not there before the attention."""
        chunked = ChunkedLocalAttention(**vars(layer(True)))
        found = find_layers({"layers.0.attn": chunked, "layers.1.attn": layer(True, late=True)})
        assert "virtual" in found.bypassed["layers.0.attn"].reason
        assert found.bypassed["layers.0.attn"].slug == "chunked_local"
        assert found.bypassed["layers.1.attn"] == Bypass(
            "late_keys", "their backend writes keys only while it computes"
        )

    def test_a_cache_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was written did not come back; the layers beside it are observed, and know their layout."""
        monkeypatch.setattr(layers, "READABLE_KV_CACHES", ("auto", "odd"))
        readable = layer(True)
        found = find_layers({"layers.0.attn": layer(True, kv_cache="odd"), "layers.1.attn": readable})
        assert found.names == ("layers.1.attn",)
        assert isinstance(readable.impl.glassbox_finder, Finder)
        bypass = found.bypassed["layers.0.attn"]
        assert bypass.slug == "cache_layout"
        assert bypass.reason.endswith("where keys and values stand in their KV cache: odd numbers")

    def test_an_impl_that_lacks_something(self) -> None:
        """Of a later release: it is named, and only its own layers bypass."""
        changed = layer(True)
        del changed.impl.logits_soft_cap
        found = find_layers({"layers.0.attn": changed, "layers.1.attn": layer(True)})
        assert found.names == ("layers.1.attn",)
        assert "lacks logits_soft_cap" in found.bypassed["layers.0.attn"].reason

    @pytest.mark.parametrize(
        "kv_cache",
        [
            "int8_per_token_head",
            "int4_per_token_head",
            "fp8_per_token_head",
            "nvfp4",
            "turboquant_4bit_nc",
            "of_a_plugin",
        ],
    )
    def test_caches_that_are_no_plain_numbers_bypass(self, kv_cache: str) -> None:
        """Read as numbers they would give wrong statistics; the reason names the type and what to serve with."""
        found = find_layers({"layers.0.attn": layer(True, kv_cache=kv_cache), "layers.1.attn": layer(True)})
        assert found.names == ("layers.1.attn",)
        assert f"of type {kv_cache}, " in found.bypassed["layers.0.attn"].reason
        assert "--kv-cache-dtype auto or fp8" in found.bypassed["layers.0.attn"].reason

    @pytest.mark.parametrize("kv_cache", ["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"])
    def test_caches_that_are_read(self, kv_cache: str) -> None:
        """Plain numbers, of FP8 with one factor for all."""
        assert find_layers({"layers.0.attn": layer(True, kv_cache=kv_cache)}).indices == (0,)

    def test_a_reason_against_all(self) -> None:
        """With context parallelism every layer bypasses."""
        assert find_layers({"layers.0.attn": layer(True)}, Bypass("all", "a reason")).bypassed == {
            "layers.0.attn": Bypass("all", "a reason")
        }

    def test_a_name_without_a_number(self) -> None:
        """It says which layer it can't place."""
        with pytest.raises(ValueError, match=r"'encoder\.attn' has no index"):
            find_layers({"encoder.attn": layer(True)})


class TestBypassOfAll:
    @pytest.mark.parametrize(
        ("setting", "reason"),
        [
            ({}, None),
            ({"decode_context_parallel_size": 2}, "context parallelism"),
            ({"prefill_context_parallel_size": 2}, "context parallelism"),
            ({"use_ubatching": True}, "micro-batching"),
        ],
    )
    def test_reasons(self, setting: dict[str, Any], reason: str | None) -> None:
        """What spreads a row's keys, or splits a step, can't be observed."""
        default = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "use_ubatching": False}
        config = SimpleNamespace(parallel_config=SimpleNamespace(**{**default, **setting}))
        found = layers.bypass_of_all(config)
        assert (found is None) if reason is None else (found is not None and reason in found.reason)
