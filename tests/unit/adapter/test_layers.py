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
    backend = SimpleNamespace(forward_includes_kv_cache_update=late, get_name=lambda: "FLEX_ATTENTION")
    return SimpleNamespace(
        impl=impl, num_heads=heads, head_size=64, head_size_v=64, is_draft_layer=draft, attn_backend=backend
    )


class Finder:
    """Finds a layout in every cache but those of a kind."""

    def find(self, of_layer: Any) -> str:
        if of_layer.impl.kv_cache_dtype == "odd":
            raise CacheLayoutError("odd numbers")
        return "layout"


def find_layers(of_model: dict[str, Any], of_all: Bypass | None = None, **how: Any) -> ObservedLayers:
    """With that finder."""
    finder: Any = Finder()
    return layers.find_layers(of_model, finder, of_all=of_all, **how)


class TestFindLayers:
    def test_observed_layers_come_in_the_order_of_the_model(self) -> None:
        """Whatever the order of vLLM's dictionary; the widest layer gives the number of heads."""
        found = find_layers({f"model.layers.{i}.self_attn.attn": layer(True, heads=i + 1) for i in (10, 2, 0)})
        assert found.indices == (0, 2, 10)
        assert found.names[1] == "model.layers.2.self_attn.attn"
        assert (found.heads, found.num_heads) == ((1, 3, 11), 11)
        assert found.bypassed == {}

    def test_layers_of_other_backends_are_named_as_bypassed(self) -> None:
        """A model may hard-wire a backend that glassbox does not wrap."""
        found = find_layers({"layers.0.attn": layer(True), "layers.1.attn": layer(None)})
        assert found.indices == (0,)
        bypass = found.bypassed["layers.1.attn"]
        assert bypass.slug == "backend"
        assert "their backend FLEX_ATTENTION is not one that glassbox wraps (CPU_ATTN, " in bypass.reason
        assert found.bypassed_indices == {"layers.1.attn": 1}

    def test_attach_custom_without_custom(self) -> None:
        """vLLM's own backend is one that could be observed: the remedy is named."""
        plain = layer(None)
        plain.attn_backend.get_name = lambda: "FLASH_ATTN"
        found = find_layers({"layers.0.attn": plain}, attach="custom")
        assert "start vLLM with --attention-backend CUSTOM" in found.bypassed["layers.0.attn"].reason

    def test_rows_that_look_ahead(self) -> None:
        """Told by vLLM's class of layers, or by what it says of images; of layers that are observed."""
        open_class: Any = type("PrefillPrefixLMAttention", (SimpleNamespace,), {})
        found = find_layers({"layers.0.attn": open_class(**vars(layer(True))), "layers.1.attn": layer(True)})
        assert (found.indices, found.ahead) == ((0, 1), "prompts")
        assert find_layers({"layers.0.attn": layer(True)}, open_images=True).ahead == "images"
        assert find_layers({"layers.0.attn": layer(True)}).ahead == ""
        assert find_layers({"layers.0.attn": layer(None)}, open_images=True).ahead == ""

    @pytest.mark.parametrize(
        ("kind", "slug"), [("encoder", "encoder"), ("encoder_only", "encoder"), ("encoder_decoder", "cross")]
    )
    def test_other_kinds_of_attention(self, kind: str, slug: str) -> None:
        """They are named by what they are, and do not take the numbers of the decoder's layers."""
        other = layer(True)
        other.attn_type = kind
        found = find_layers({"decoder.layers.0.self_attn": layer(True), "decoder.layers.0.other_attn": other})
        assert found.indices == (0,)
        assert {name: bypass.slug for name, bypass in found.bypassed.items()} == {"decoder.layers.0.other_attn": slug}
        assert found.bypassed_indices == {"decoder.layers.0.other_attn": 0}

    def test_encoders_of_images(self) -> None:
        """vLLM doesn't tell of their layers; the model's modules do."""
        kind = type("MMEncoderAttention", (SimpleNamespace,), {})
        model = SimpleNamespace(modules=lambda: [kind(), SimpleNamespace(), kind()], named_modules=lambda **_: [])
        found = find_layers({"layers.0.attn": layer(True)}, model=model)
        assert (found.indices, found.bypassed, found.num_encoder_layers) == ((0,), {}, 2)

    def test_attention_of_a_model_of_its_own(self) -> None:
        """A class without an impl is seen, and named."""
        found = find_layers({"layers.0.attn": SimpleNamespace(num_heads=4)})
        assert "by itself, in SimpleNamespace" in found.bypassed["layers.0.attn"].reason

    def test_drafters_are_neither(self) -> None:
        """A draft model's layers are not the model's, and nobody expects them to be measured."""
        found = find_layers({"layers.0.attn": layer(False), "layers.1.attn": layer(True, draft=True)})
        assert (found.names, found.bypassed) == ((), {})

    def test_late_keys_bypass(self) -> None:
        """K is not there before the attention."""
        found = find_layers({"layers.1.attn": layer(True, late=True)})
        assert found.bypassed["layers.1.attn"] == Bypass(
            "late_keys", "their backend writes keys only while it computes"
        )

    @pytest.mark.parametrize(
        ("name", "said"), [("RSWAAttention", "reference sliding"), ("StaticSinkAttention", "sinks")]
    )
    def test_masks_of_their_own_bypass(self, name: str, said: str) -> None:
        """What their rows see is no run of keys."""
        masked = type(name, (SimpleNamespace,), {})(**vars(layer(True)))
        (bypass,) = find_layers({"layers.0.attn": masked}).bypassed.values()
        assert bypass.slug == "mask"
        assert said in bypass.reason

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


class TestGlobalHeads:
    @pytest.mark.parametrize(
        ("rank", "local", "offsets", "total"),
        [
            (0, (4, 4), (0, 0), 8),
            (1, (4, 4), (4, 4), 8),
            (1, (2, 4, 1), (2, 4, 1), 8),
            (1, (8, 4), (0, 4), 8),  # the first is not split: every rank has all of its heads
            (1, (), (), 8),
        ],
    )
    def test_of_two_ranks(self, rank: int, local: tuple[int, ...], offsets: tuple[int, ...], total: int) -> None:
        """Heads of a layer follow those of the rank before, however many the layer has."""
        server = layers.ServerInfo("m", "0", rank, 2, num_layers=3, num_heads=8, stage=range(3))
        assert layers.GlobalHeads(offsets, total) == layers.global_heads(server, local)


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
