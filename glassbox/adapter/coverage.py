"""What of a worker's model is observed and what is measured of it, in words for the log.

Owns the sentences; which layers are observed is `layers.py`'s, the choice among them `config`'s. A server of
which nothing, or only a part, is observed says so once, with the reason of each group of layers and what helps.
"""

import logging
import math
from collections.abc import Container, Iterator
from typing import NamedTuple

from glassbox.adapter.layers import ObservedLayers
from glassbox.adapter.vllm_worker import WorkerFacts
from glassbox.config.load import GlassboxConfig
from glassbox.config.model import LayerSelection
from glassbox.measure.sampling import rate_of_steps

_NAMED = 8  # layers of a group that are named one by one


class Line(NamedTuple):
    """One for the log."""

    level: int
    text: str


def coverage_lines(facts: WorkerFacts, config: GlassboxConfig, path: object) -> Iterator[Line]:
    """Which attention layers are observed, and why the others are not.

    Args:
        facts: of the worker.
        config: in force; path: where it comes from.
    """
    found, model = facts.layers, facts.server.model_name
    observed, bypassed = len(found.names), len(found.bypassed)
    if observed:
        yield Line(
            logging.INFO,
            f"Observing {observed} of {observed + bypassed} attention layers ({facts.backend}) of {model} at "
            f"sample_rate {config.sample_rate:g}, configured by {path}",
        )
    elif bypassed:
        yield Line(
            logging.WARNING,
            f"None of the {bypassed} attention layers of {model} is observed: the server runs, and glassbox has no "
            "numbers of its attention (glassbox_layers_observed is 0). Why:",
        )
    else:
        yield Line(
            logging.WARNING,
            f"{model} has no attention layers{_on_stage(facts)} (state-space models and linear attention have no "
            "softmax): the server runs, and glassbox has nothing to observe (glassbox_layers_observed is 0)",
        )
    yield from bypass_lines(found)


def bypass_lines(found: ObservedLayers) -> Iterator[Line]:
    """A line for each reason why layers are not observed, encoders of images and audio included, or rows of theirs."""
    for bypass in dict.fromkeys(found.bypassed.values()):
        names = [name for name, why in found.bypassed.items() if why == bypass]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield Line(
            logging.WARNING,
            f"{len(names)} attention layers bypass glassbox and are not measured ({bypass.reason}): "
            f"{', '.join(names[:_NAMED])}{more}",
        )
    if found.num_encoder_layers:
        yield Line(
            logging.INFO,
            f"{found.num_encoder_layers} attention layers of the model's encoder (images, audio) are not among these: "
            "they have no KV cache, and are not observed",
        )
    if found.ahead:
        yield Line(
            logging.INFO,
            f"Rows of {found.ahead} whose tokens see keys behind their own are not measured, only counted "
            "(glassbox_dropped_rows_total{reason='mask'}): they are no rows of causal attention",
        )


def other_stages(facts: WorkerFacts) -> frozenset[int]:
    """Layers of the model that are on other pipeline stages."""
    return frozenset(range(facts.server.num_layers)) - frozenset(facts.server.stage)


def _on_stage(facts: WorkerFacts) -> str:
    stage = facts.server.stage
    return f" among layers {stage.start} to {stage.stop - 1}" if len(stage) < facts.server.num_layers else ""


def untraceable(facts: WorkerFacts) -> str:
    """Why no request can be traced on this worker; empty if requests can."""
    found = facts.layers
    if not found.names:
        reasons = sorted({bypass.reason for bypass in found.bypassed.values()})
        return "; ".join(reasons) or "it has no attention layers"
    if len(set(found.heads)) > 1 and facts.server.num_ranks > 1:
        return "its layers have different numbers of heads, and tensor parallelism spreads each over the ranks"
    return ""


def selection_lines(found: ObservedLayers, selection: LayerSelection, elsewhere: Container[int] = ()) -> Iterator[Line]:
    """What is wrong with a choice of layers: indices that no observed layer has, or a choice of none.

    Args:
        found: the layers of a model, or of a pipeline stage.
        selection: `sampling.layers`.
        elsewhere: layers of other stages.
    """
    theirs = {index: found.bypassed[name].reason for name, index in found.bypassed_indices.items()}
    missing = [index for index in selection.missing(found.indices) if index not in elsewhere]
    chosen = selection.select(found.indices)
    if missing and found.names:
        why = {f"layer {index} is not observed ({theirs[index]})" for index in missing if index in theirs}
        others = [str(index) for index in missing if index not in theirs]
        if others:
            why.add(f"the model has no attention layer {', '.join(others)}")
        yield Line(
            logging.WARNING,
            f"sampling.layers names layers that are not observed: {'; '.join(sorted(why))}. Observed are "
            f"{ranges(found.indices)}",
        )
    if found.names and not chosen and not any(index in elsewhere for index in selection.indices or ()):
        yield Line(
            logging.WARNING,
            f"sampling.layers chooses none of the observed layers, so no rows are measured: use all, {{every: k}}, or "
            f"some of {ranges(found.indices)}",
        )


def turn_lines(num_layers: int, config: GlassboxConfig) -> Iterator[Line]:
    """What it means that layers take turns, and whether they keep the sample rate; nothing if they don't take turns.

    Args:
        num_layers: that are measured, of a model or of a pipeline stage.
        config: in force.
    """
    rate, at_once = config.sample_rate, config.sampling.layers_at_once(num_layers)
    if not rate or at_once >= num_layers:
        return
    steps = rate_of_steps(rate, num_layers, at_once)
    kept = steps * at_once / num_layers
    if kept < rate * (1 - 1e-9):
        yield Line(
            logging.WARNING,
            f"sample_rate {rate:g} can't be kept with sampling.layers_per_step {at_once} of {num_layers} layers: every "
            f"step is measured, which gives each layer {kept:.3g} (glassbox_sample_rate). Set layers_per_step to at "
            f"least {math.ceil(rate * num_layers)}, or sample_rate to at most {kept:.3g}",
        )
    else:
        yield Line(
            logging.INFO,
            f"A measured step measures {at_once} of {num_layers} layers in turn (sampling.layers_per_step): "
            f"{100 * steps:.3g} % of steps are measured, so that each layer keeps sample_rate {rate:g}",
        )


def ranges(indices: tuple[int, ...]) -> str:
    """Ascending numbers, runs joined: 0-3, 5, 7-9."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
