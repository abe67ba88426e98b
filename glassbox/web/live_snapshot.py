"""GET /glassbox/v1/snapshot: everything measured since the server counts, as JSON.

Owns the layout of the answer, which the frames of the stream share. The numbers are `matrices.py`'s.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, cast

from glassbox import __version__
from glassbox.config.load import GlassboxConfig
from glassbox.core.counters import ENGINE_NUMBERS
from glassbox.core.output_checks import LayerState
from glassbox.core.statistics import PHASES, STATISTICS, Statistic
from glassbox.export.family_source import FamilySource
from glassbox.store.merge import MergedEngine
from glassbox.web.answers import encode
from glassbox.web.matrices import head_answer, phase_answer
from glassbox.web.selection import Selection

# Names of the engine numbers that an answer has, in its order.
_PLACES: Final = {entry.name: entry.page for entry in ENGINE_NUMBERS if entry.page is not None}
_NUMBERS: Final = tuple(sorted(_PLACES, key=lambda name: _PLACES[name]))


def statistic_answer(statistic: Statistic) -> dict[str, Any]:
    """A row of the table of statistics."""
    return {
        "name": statistic.name,
        "unit": statistic.unit,
        "meaning": statistic.meaning,
        "formula": statistic.formula,
        "lower": statistic.lower,
        "upper": statistic.upper,
        "bounds": list(statistic.buckets),
        "phases": [phase.value for phase in PHASES if not statistic.decode_only or phase.value == "decode"],
    }


def about_answer(config: GlassboxConfig, statistics: Sequence[Statistic] = STATISTICS) -> dict[str, Any]:
    """What the numbers mean and how often there are new ones."""
    return {
        "version": __version__,
        "now_s": time.time(),
        "enabled": config.enabled,
        "interval_s": config.export.interval_s,
        "statistics": [statistic_answer(statistic) for statistic in statistics],
        "phases": [phase.value for phase in PHASES],
    }


def engine_answer(engine: MergedEngine, selection: Selection, config: GlassboxConfig) -> dict[str, Any]:
    """An engine over the time that its arrays cover: what is known of it, and the selected matrices."""
    answer: dict[str, Any] = {
        "model": engine.model_name,
        "engine": engine.engine,
        "start_time_s": engine.start_time_s,
        "time_s": engine.time_s,
        "layers": list(engine.layers),
        "heads": engine.num_heads,
        # Layers that the configuration leaves out have no new rows, although they are observed.
        "unsampled_layers": sorted(set(engine.layers) - set(engine.sampled_layers)),
        **{name: engine.numbers[name] for name in _NUMBERS},
        **_bypassed(engine),
        **_checked(engine),
        "phases": {phase.value: phase_answer(engine, selection.statistics, phase) for phase in selection.phases},
    }
    if selection.head is not None:
        layer, head = selection.head
        at = engine.layers.index(layer)
        answer["head"] = {
            "layer": layer,
            "head": head,
            "phases": {
                phase.value: head_answer(engine, selection.statistics, phase, at, head) for phase in selection.phases
            },
        }
    return answer


def _bypassed(engine: MergedEngine) -> dict[str, Any]:
    """How many layers are not observed, and for which reasons."""
    reasons = cast(Mapping[str, int], engine.numbers["layers_bypassed"])
    found = {reason: layers for reason, layers in reasons.items() if layers}
    return {"layers_bypassed": sum(found.values()), "layers_bypassed_by_reason": found}


def _checked(engine: MergedEngine) -> dict[str, Any]:
    """How many layers were reproduced, and which workers are wrong; a ratio that is not finite is null."""
    wrong = [asdict(one) | {"ratio": one.ratio if math.isfinite(one.ratio) else None} for one in engine.wrong]
    return {
        "layers_certified": int((engine.checks.state == LayerState.CERTIFIED).sum()),
        "wrong_layers": wrong,
        "nonfinite_origins": [asdict(one) for one in engine.nonfinite_origins],
    }


def snapshot_answer(source: FamilySource, selection: Selection) -> bytes:
    """The answer in JSON. Takes up to some hundred milliseconds of CPU for all of a large model: not in an event loop.

    Raises:
        RequestError: the server has no such engine, layer or head.
        OSError: the run directory may not be read.
    """
    config = source.config
    engines = selection.of(source.merged().engines)
    return encode(
        {
            **about_answer(config, selection.statistics),
            "engines": [engine_answer(engine, selection, config) for engine in engines],
        }
    )
