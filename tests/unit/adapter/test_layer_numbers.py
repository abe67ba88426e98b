"""Which layer of its model an attention module is."""

from typing import Any

import pytest
from torch import nn

from glassbox.adapter.layer_numbers import number_layers


class Attention(nn.Module):
    """As vLLM's: a module that the tree has where the model keeps it, whatever it is called."""


class Layer(nn.Module):
    """One that has modules under names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def model_of(*stacked: nn.Module, stack: str = "layers") -> nn.Module:
    return Layer(model=Layer(**{stack: nn.ModuleList(stacked)}))


class TestNumberLayers:
    def test_one_a_layer(self) -> None:
        """Its place, also where layers without attention stand between, as in a hybrid model."""
        first, second = Attention(), Attention()
        model = model_of(Layer(), Layer(attn=first), Layer(), Layer(), Layer(attn=second))
        assert {"a": 1, "b": 4} == number_layers(model, {"a": first, "b": second})

    def test_names_that_count_attention_alone(self) -> None:
        """A block that several layers share has a module for each of them; its names count these."""
        dpa = [Attention() for _ in range(3)]
        shared = Layer(self_attn=Layer(dpa_list=nn.ModuleList(dpa)))
        model = model_of(Layer(), Layer(block=shared), Layer(), Layer(block=shared), Layer(block=shared))
        found = number_layers(model, {f"model.attn.{j}": module for j, module in enumerate(dpa)})
        assert {"model.attn.0": 1, "model.attn.1": 3, "model.attn.2": 4} == found

    def test_two_shared_blocks_in_turn(self) -> None:
        """Not even the order of the names is that of the layers."""
        dpa = [[Attention(), Attention()] for _ in range(2)]
        blocks = [Layer(dpa_list=nn.ModuleList([*of_block, nn.Identity()])) for of_block in dpa]
        model = model_of(*(Layer(block=blocks[n % 2]) for n in range(4)))
        names = {f"attn.{2 * b + n}": module for b, of_block in enumerate(dpa) for n, module in enumerate(of_block)}
        assert {"attn.0": 0, "attn.1": 2, "attn.2": 1, "attn.3": 3} == number_layers(model, names)

    def test_passes_that_vllm_numbers(self) -> None:
        """A layer that runs three times has a module and a number for each pass, in the order in which they run."""
        loops = [[Attention() for _ in range(3)] for _ in range(2)]
        model = model_of(*(Layer(attn=nn.ModuleList(of_layer)) for of_layer in loops))
        names = {
            f"model.layers.{2 * loop + n}.self_attn.attn": module
            for n, of_layer in enumerate(loops)
            for loop, module in enumerate(of_layer)
        }
        assert [0, 2, 4, 1, 3, 5] == list(number_layers(model, names).values())

    def test_two_in_each_layer(self) -> None:
        """Told apart, in the order in which they were built."""
        of_layers = [[Attention(), Attention()] for _ in range(2)]
        model = model_of(*(Layer(self_attn=nn.ModuleList(two)) for two in of_layers))
        names = {f"layers.{n}.attn.{i}": module for n, two in enumerate(of_layers) for i, module in enumerate(two)}
        assert [0, 1, 2, 3] == list(number_layers(model, names).values())

    def test_modules_that_the_tree_has_not(self) -> None:
        """Then the name tells; so it does where there is no model to look at."""
        hidden = {"7.attn": Attention(), "2.attn": Attention()}
        assert {"7.attn": 7, "2.attn": 2} == number_layers(model_of(Layer()), hidden) == number_layers(None, hidden)

    def test_a_stage_of_a_pipeline(self) -> None:
        """Layers of other stages stand in the list, too, without attention."""
        attention = Attention()
        missing: list[Any] = [nn.Identity(), nn.Identity()]
        assert {"a": 2} == number_layers(model_of(*missing, Layer(attn=attention)), {"a": attention})

    def test_no_number_anywhere(self) -> None:
        """It says which layer it can't place."""
        with pytest.raises(ValueError, match=r"'encoder\.attn' has no index"):
            number_layers(None, {"encoder.attn": Attention()})
