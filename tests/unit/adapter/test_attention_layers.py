"""Which of the layers that vLLM knows are attention of the model: others are neither observed nor bypassed."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from glassbox.adapter.layers import attention_layers

base = pytest.importorskip("vllm.model_executor.layers.attention_layer_base", reason="needs vLLM")


class Layer(nn.Module, base.AttentionLayerBase):  # type: ignore[misc, name-defined]
    """As vLLM has them, with some attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        vars(self).update(attributes)

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError


class MambaBase(Layer):
    """vLLM tells state-space models and linear attention by this name."""


def found(drafter: nn.Module | None = None, **layers: Any) -> list[str]:
    model = nn.ModuleList(layer for layer in layers.values() if isinstance(layer, nn.Module))
    drafted = {f"draft.{i}": module for i, module in enumerate(drafter or ())}  # type: ignore[arg-type]
    context = SimpleNamespace(static_forward_context={**layers, **drafted})
    config: Any = SimpleNamespace(compilation_config=context)
    return list(attention_layers(config, model, drafter))


class TestAttentionLayers:
    def test_those_with_an_impl_or_heads(self) -> None:
        """A model may compute attention in a class of its own, with heads by whatever name."""
        layers = {"impl": Layer(impl=object()), "own": Layer(num_heads=4), "named": Layer(n_local_heads=4)}
        assert found(**layers) == ["impl", "own", "named"]

    def test_what_only_keeps_a_cache_or_a_state(self) -> None:
        """An indexer's cache has no heads; a state-space layer has some, and no softmax; an operator has neither."""
        others = {
            "cache": Layer(head_dim=128),
            "state": MambaBase(num_heads=8),
            "operator": SimpleNamespace(num_heads=4),
        }
        assert found(attention=Layer(impl=object()), **others) == ["attention"]

    def test_drafters(self) -> None:
        """Their layers are not the model's, but for those that they share with it; n-grams have none."""
        shared, own = Layer(impl=object()), Layer(impl=object())
        assert found(nn.ModuleList([shared, own]), shared=shared) == ["shared", "draft.0"]
        context = SimpleNamespace(static_forward_context={"shared": shared})
        config: Any = SimpleNamespace(compilation_config=context)
        assert list(attention_layers(config, nn.ModuleList([shared]), object())) == ["shared"]
