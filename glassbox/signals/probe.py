"""Probes: small logistic regressions over features of a request, from labelled data to a score.

Owns what a probe is, how it scores a trace, whom it fits, and its file. How one is trained is known to nobody in this
room: a probe is numbers, and scoring is arithmetic.

With the features x_i, their means m_i and scales s_i over the data it was trained on, and coefficients w_i:

    z = intercept + sum of w_i (x_i - m_i) / s_i        score = calibration(z), the probability of the probe's label

A feature that a trace has no value of counts as its mean, and is named in the score.

The file is JSON, a mapping of `format` ("glassbox-probe"), `version` (1), and what `Probe` has; `calibration` is
{"kind": "platt", "slope", "offset"} or {"kind": "isotonic", "points": [[z, probability], ...]}. It is data, never code,
and nothing of it is believed: what isn't as this module writes it is refused, with the field that isn't.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from glassbox.core.files import ForeignFileError, open_own, open_regular, write_atomically
from glassbox.core.json_fields import MAX_NUMBER, FieldError, JsonFields, parse_json
from glassbox.core.printable import printable
from glassbox.core.signal_table import signal_row
from glassbox.signals.features import ANSWER, PROMPT, Feature, features, parse_feature
from glassbox.signals.values import SignalValues
from glassbox.store.trace_record import RequestTrace

FORMAT: Final = "glassbox-probe"
FORMAT_VERSION: Final = 1
MAX_BYTES: Final = 4 << 20
MAX_FEATURES: Final = 4096
MAX_POINTS: Final = 1000
_KIND: Final[Mapping[str, str | int]] = {"format": FORMAT, "version": FORMAT_VERSION}
_PLATT: Final = "platt"
_ISOTONIC: Final = "isotonic"
_MAX_METRICS: Final = 64
_MAX_SAMPLES: Final = 10**12
_SHOWN: Final = 3
_REMEDY: Final = "make the file with `glassbox train`"


class ProbeError(ValueError):
    """A probe can't be read, written or used; `str()` is one line: file, field, rule, value, remedy."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(printable(" ".join(f"{path}: {problem}".split())))


@dataclass(frozen=True)
class ProbeFeature:
    """One feature that a probe reads: its mean and scale (standard deviation, above 0) in the data, and coefficient."""

    name: str
    mean: float
    scale: float
    coefficient: float

    @cached_property
    def parsed(self) -> Feature:
        """What its name says."""
        return parse_feature(self.name)


@dataclass(frozen=True)
class Platt:
    """Calibration by two numbers: 1 / (1 + e^-(slope z + offset))."""

    slope: float
    offset: float

    def probability(self, z: float) -> float:
        """Of the label."""
        return 1 / (1 + math.exp(-min(max(self.slope * z + self.offset, -700.0), 700.0)))


@dataclass(frozen=True)
class Isotonic:
    """Calibration by points (z, probability), both rising: straight lines between them, and level outside."""

    points: tuple[tuple[float, float], ...]

    def probability(self, z: float) -> float:
        """Of the label."""
        x, y = zip(*self.points, strict=True)
        return float(np.interp(z, x, y))


@dataclass(frozen=True)
class Trained:
    """What a probe was trained on.

    Attributes:
        model_name: as the data says.
        samples, positives: with a label, and of these with the probe's.
        date: ISO 8601, UTC.
        data: name of the file of features.
        metrics: on folds that were held out, by name.
    """

    model_name: str
    samples: int
    positives: int
    date: str
    data: str
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What must be measured of a request so that a probe can score it.

    Attributes:
        signals: names of core/signal_table.py.
        layers, heads: global indices, ascending.
        spans: names of the spans that the request must give.
        prompt: whether every row of the prompt is needed.
    """

    signals: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    spans: tuple[str, ...]
    prompt: bool


@dataclass(frozen=True)
class ProbeScore:
    """A probe's score of one request.

    Attributes:
        value: calibrated probability of `label`, 0 to 1.
        label: of what it is the probability.
        threshold: from which on the probe says that it is so.
        missing: names of features that the trace has no value of; their means stood for them.
    """

    value: float
    label: str
    threshold: float
    missing: tuple[str, ...] = ()

    @property
    def above(self) -> bool:
        """Whether the probe says that it is so."""
        return self.value >= self.threshold


@dataclass(frozen=True)
class Probe:
    """A probe.

    Attributes:
        name: its own, in metrics and configurations.
        label: of what its score is the probability.
        features: that it reads; at least one, each once.
        intercept: of the regression.
        calibration: from the regression's number to a probability.
        threshold: 0 to 1.
        trained: on what.
        source: file it was read from, for messages; empty if it is from none.
    """

    name: str
    label: str
    features: tuple[ProbeFeature, ...]
    intercept: float
    calibration: Platt | Isotonic
    threshold: float
    trained: Trained
    source: str = field(default="", compare=False)

    @cached_property
    def needs(self) -> Needs:
        """What must be measured of a request so that it can be scored."""
        parsed = [feature.parsed for feature in self.features]
        signals = tuple(sorted({one.signal for one in parsed} - {ANSWER, PROMPT}))
        return Needs(
            signals=signals,
            layers=tuple(sorted({one.layer for one in parsed if one.layer is not None})),
            heads=tuple(sorted({one.head for one in parsed if one.head is not None})),
            spans=tuple(sorted({one.span for one in parsed if one.span is not None})),
            prompt=any(signal_row(signal).prompt for signal in signals),
        )

    def score(self, trace: RequestTrace, computed: Mapping[str, SignalValues] | None = None) -> ProbeScore | None:
        """The score of a request, as far as its rows go; None if it has none of the features (so far).

        Args:
            trace: of the request.
            computed: signals of the trace that are not computed again.
        """
        return self.score_features(features(trace, [feature.name for feature in self.features], computed))

    def score_features(self, values: Mapping[str, float]) -> ProbeScore | None:
        """The same of its features, by name; those without a value are missing."""
        missing = tuple(feature.name for feature in self.features if feature.name not in values)
        if len(missing) == len(self.features):
            return None
        z = self.intercept + sum(
            feature.coefficient * (values[feature.name] - feature.mean) / feature.scale
            for feature in self.features
            if feature.name in values
        )
        return ProbeScore(self.calibration.probability(z), self.label, self.threshold, missing)

    def check_fits(self, model_name: str, layers: Collection[int], heads: Collection[int]) -> None:
        """See that a model has the places that this probe reads.

        Args:
            model_name: for the message.
            layers, heads: global indices that are measured there.

        Raises:
            ProbeError: it lacks one.
        """
        for what, needed, found in (("layer", self.needs.layers, layers), ("head", self.needs.heads, heads)):
            lacking = [index for index in needed if index not in found]
            if lacking:
                listed = ", ".join(map(str, lacking[:_SHOWN])) + (", ..." if len(lacking) > _SHOWN else "")
                have = f"{min(found)} to {max(found)}" if found else "none"
                raise ProbeError(
                    self.source or self.name,
                    f"features must be of {what}s that {model_name} measures ({have}), got {what} {listed}; the probe "
                    f"was trained on {self.trained.model_name}: train one on this model, or let sampling.layers "
                    "measure what it needs",
                )


def write_probe(path: Path, probe: Probe) -> None:
    """Write the file; it replaces an older one at once or not at all.

    Raises:
        ProbeError: the probe is not one that `read_probe` would take.
        OSError: it can't be written.
    """
    document = {**_KIND, **asdict(probe)}
    del document["source"]
    kind = _PLATT if isinstance(probe.calibration, Platt) else _ISOTONIC
    document["calibration"] = {"kind": kind, **document["calibration"]}
    text = json.dumps(document, indent=1) + "\n"
    _parse(path, text.encode())
    write_atomically(Path(path), text.encode())


def read_probe(path: Path, *, own: bool = False) -> Probe:
    """Read a file of `write_probe`.

    Args:
        own: no other user may have written it: rules end requests by its scores.

    Raises:
        ProbeError: it is missing, can't be read, or is not as it must be.
    """
    path = Path(path)
    try:
        with (open_own if own else open_regular)(path, MAX_BYTES) as file:
            data = file.read(MAX_BYTES + 1)
    except ForeignFileError as error:
        raise ProbeError(path, str(error)) from None
    except OSError as error:
        raise ProbeError(path, f"can't be read ({error.strerror}); name a file of `glassbox train`") from None
    if len(data) > MAX_BYTES:
        raise ProbeError(path, f"must have at most {MAX_BYTES} bytes, got more; {_REMEDY}")
    return _parse(path, data)


def _parse(path: Path, data: bytes) -> Probe:
    try:
        return _of_document(parse_json(data), str(path))
    except FieldError as error:
        raise ProbeError(path, f"{error}; {_REMEDY}") from None


def _of_document(document: Any, source: str) -> Probe:
    if isinstance(document, dict):  # before its fields: those of a later version may be others
        kind = JsonFields({name: document.get(name) for name in _KIND}, tuple(_KIND))
        for name, value in _KIND.items():
            kind.choice(name, value)
    own = [name for name in Probe.__dataclass_fields__ if name != "source"]
    whole = JsonFields(document, [*_KIND, *own])
    return Probe(
        name=whole.name("name"),
        label=whole.text("label"),
        features=_features(whole),
        intercept=whole.number("intercept"),
        calibration=_calibration(whole, document["calibration"]),
        threshold=whole.number("threshold", 0, 1),
        trained=_trained(whole),
        source=source,
    )


def _features(whole: JsonFields) -> tuple[ProbeFeature, ...]:
    found: dict[str, ProbeFeature] = {}
    for part in whole.parts("features", list(ProbeFeature.__dataclass_fields__), MAX_FEATURES):
        name = part.text("name")
        try:
            parse_feature(name)
        except ValueError:
            raise part.error("name", "must be a feature that this release knows") from None
        if name in found:
            raise part.error("name", "must be there once, but is there twice")
        # A scale is not 0: it divides.
        scale = part.number("scale", 1 / MAX_NUMBER)
        found[name] = ProbeFeature(name, part.number("mean"), scale, part.number("coefficient"))
    return tuple(found.values())


def _calibration(whole: JsonFields, value: Any) -> Platt | Isotonic:
    if isinstance(value, dict) and value.get("kind") == _ISOTONIC:
        part = whole.part("calibration", ("kind", "points"))
        points = tuple(part.pairs("points", MAX_POINTS))
        x, y = np.array(points).T
        if (np.diff(x) <= 0).any() or (np.diff(y) < 0).any() or y[0] < 0 or y[-1] > 1:
            raise part.error("points", "must rise, with probabilities from 0 to 1")
        return Isotonic(points)
    part = whole.part("calibration", ("kind", "slope", "offset"))
    part.choice("kind", _PLATT, _ISOTONIC)
    return Platt(part.number("slope"), part.number("offset"))


def _trained(whole: JsonFields) -> Trained:
    part = whole.part("trained", list(Trained.__dataclass_fields__))
    return Trained(
        model_name=part.text("model_name"),
        samples=part.whole("samples", _MAX_SAMPLES),
        positives=part.whole("positives", _MAX_SAMPLES),
        date=part.text("date"),
        data=part.text("data"),
        metrics=part.numbers("metrics", _MAX_METRICS),
    )
