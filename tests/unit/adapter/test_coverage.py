"""What is said of the layers that are observed, and of a choice among them."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from glassbox.adapter.coverage import coverage_lines, other_stages, ranges, selection_lines, turn_lines, untraceable
from glassbox.adapter.layers import Bypass, ObservedLayers, ServerInfo
from glassbox.config.load import GlassboxConfig
from glassbox.config.model import LayerSelection

MLA = Bypass("backend", "their backend X is not wrapped")


def found(*indices: int, heads: tuple[int, ...] = (), bypassed: dict[int, Bypass] | None = None) -> ObservedLayers:
    bypassed = bypassed or {}
    return ObservedLayers(
        names=tuple(f"layers.{index}" for index in indices),
        indices=indices,
        heads=heads or (2,) * len(indices),
        head_size=64,
        num_kv_heads=1,
        latent=False,
        bypassed={f"layers.{index}": why for index, why in bypassed.items()},
        bypassed_indices={f"layers.{index}": index for index in bypassed},
    )


def facts(layers: ObservedLayers, stage: range = range(8), num_ranks: int = 1) -> Any:
    server = ServerInfo("tiny", "0", 0, num_ranks, num_layers=8, num_heads=2, stage=stage)
    return SimpleNamespace(server=server, layers=layers, backend="CPU_ATTN")


def said(layers: ObservedLayers, **where: Any) -> list[str]:
    return [line.text for line in coverage_lines(facts(layers, **where), GlassboxConfig(), "x.yaml")]


class TestCoverage:
    def test_all(self) -> None:
        """A line, which says how it was configured."""
        (line,) = said(found(0, 1))
        assert "Observing 2 of 2 attention layers (CPU_ATTN) of tiny at sample_rate 0.01, configured by x.yaml" == line

    def test_a_part(self) -> None:
        """Each reason is a line."""
        first, second, third = said(found(0, bypassed={1: MLA, 2: Bypass("cross", "cross attention"), 3: MLA}))
        assert "Observing 1 of 4" in first
        assert "2 attention layers bypass glassbox and are not measured (their backend X" in second
        assert second.endswith(": layers.1, layers.3")
        assert "(cross attention): layers.2" in third

    def test_encoders(self) -> None:
        """They are none of the layers that are counted, and that is said."""
        assert "27 attention layers of the model's encoder" in said(replace(found(0, 1), num_encoder_layers=27))[1]

    def test_rows_that_look_ahead(self) -> None:
        """What is left out of layers that are observed, with the metric that counts it."""
        (_, line) = said(replace(found(0, 1), ahead="images"))
        assert line.startswith("Rows of images whose tokens see keys behind their own are not measured, only counted")
        assert "glassbox_dropped_rows_total{reason='mask'}" in line

    def test_nothing(self) -> None:
        """It is said, and how many layers there are."""
        first, second = said(found(bypassed=dict.fromkeys(range(20), MLA)))
        assert "None of the 20 attention layers of tiny is observed" in first
        assert second.endswith("layers.6, layers.7 and 12 more")

    def test_a_model_without_attention(self) -> None:
        """A state-space model is nothing wrong; a stage without attention says which."""
        assert "tiny has no attention layers (state-space" in said(found())[0]
        assert "has no attention layers among layers 4 to 7 (" in said(found(), stage=range(4, 8))[0]


class TestSelection:
    @pytest.mark.parametrize("selection", [LayerSelection(), LayerSelection(every=4), LayerSelection(indices=(2, 5))])
    def test_one_that_fits(self, selection: LayerSelection) -> None:
        assert [] == list(selection_lines(found(2, 5), selection))

    def test_layers_that_are_not_there(self) -> None:
        """Told apart: not observed for a reason, and none of the model."""
        (line,) = selection_lines(found(2, 5, bypassed={3: MLA}), LayerSelection(indices=(2, 3, 4, 9)))
        assert (
            "sampling.layers names layers that are not observed: layer 3 is not observed (their backend X is not "
            "wrapped); the model has no attention layer 4, 9. Observed are 2, 5" == line.text
        )

    def test_a_choice_of_none(self) -> None:
        *_, line = selection_lines(found(2, 5), LayerSelection(indices=(0,)))
        assert "chooses none of the observed layers, so no rows are measured" in line.text

    def test_layers_of_other_stages(self) -> None:
        """They are somebody else's."""
        stage = facts(found(4, 5), stage=range(4, 8))
        assert [] == list(selection_lines(stage.layers, LayerSelection(indices=(0, 1)), other_stages(stage)))

    def test_a_server_of_which_nothing_is_observed(self) -> None:
        """That has been said, with its reasons."""
        assert [] == list(selection_lines(found(bypassed={0: MLA}), LayerSelection(indices=(0,))))


class TestTurns:
    @staticmethod
    def lines(num_layers: int, sample_rate: float, at_once: int | str) -> list[tuple[int, str]]:
        settings = {"sample_rate": sample_rate, "sampling": {"layers_per_step": at_once}}
        return list(turn_lines(num_layers, GlassboxConfig.model_validate(settings)))

    def test_nothing_to_say(self) -> None:
        """All layers at once, and no sampling."""
        assert [] == self.lines(32, 0.01, "all") + self.lines(4, 0.01, 4) + self.lines(32, 0.0, 4)

    def test_the_rate_is_kept(self) -> None:
        """So many more steps are measured, to the last that there are."""
        ((level, text),) = self.lines(32, 0.01, 4)
        assert logging.INFO == level
        assert "4 of 32 layers in turn (sampling.layers_per_step): 8 % of steps are measured, so that each" in text
        assert "100 % of steps" in self.lines(32, 0.125, 4)[0][1]

    def test_the_rate_cannot_be_kept(self) -> None:
        """What it is then, and what helps; both remedies do."""
        ((level, text),) = self.lines(32, 0.3, 4)
        assert logging.WARNING == level
        assert text == (
            "sample_rate 0.3 can't be kept with sampling.layers_per_step 4 of 32 layers: every step is measured, which "
            "gives each layer 0.125 (glassbox_sample_rate). Set layers_per_step to at least 10, or sample_rate to at "
            "most 0.125"
        )
        assert [logging.INFO] * 2 == [lines[0][0] for lines in (self.lines(32, 0.3, 10), self.lines(32, 0.125, 4))]


@pytest.mark.parametrize(
    ("layers", "ranks", "reason"),
    [
        (found(0, 1), 2, ""),
        (found(0, 1, heads=(4, 8)), 1, ""),
        (found(0, 1, heads=(4, 8)), 2, "its layers have different numbers of heads, and"),
        (found(bypassed={0: MLA}), 1, "their backend X is not wrapped"),
        (found(), 1, "it has no attention layers"),
    ],
)
def test_untraceable(layers: ObservedLayers, ranks: int, reason: str) -> None:
    """Why traces of a worker would be empty or wrong."""
    why = untraceable(facts(layers, num_ranks=ranks))
    assert why.startswith(reason)
    assert bool(why) == bool(reason)


def test_ranges() -> None:
    assert ("", "3", "0-3, 5, 7-8") == (ranges(()), ranges((3,)), ranges((0, 1, 2, 3, 5, 7, 8)))
