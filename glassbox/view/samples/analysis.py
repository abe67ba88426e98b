"""Which features tell positives from negatives: each for itself, with its interval, and corrected for their number.

Owns what an analysis says and how it is computed from a table; the formulas are `auroc.py`'s. A feature's area may be
the length's merit: long answers spread their attention. So the areas of the lengths are there, too, and each feature's
own among samples of about equal length.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from glassbox.signals.features import Feature
from glassbox.view.samples import auroc as areas
from glassbox.view.samples.feature_table import FeatureTable
from glassbox.view.text import format_interval, format_share

CORRECTION: Final = "max statistic of {permutations} permutations of the labels, over all {features} features"
LENGTHS: Final = ("prompt_tokens", "answer_tokens")


@dataclass(frozen=True)
class Telling:
    """How well one number tells positives from negatives.

    Attributes:
        name: of the feature, or of the length.
        feature: what it is; None of a length.
        auroc, low, high: area, and its interval at 95 % (NaN if one kind has fewer than two samples); above 0.5
            positives have more of it.
        p: corrected for the number of features; None of a length.
        at_equal_length: the area over pairs of about equal length; None if there are none.
        samples: that have a value.
    """

    name: str
    feature: Feature | None
    auroc: float
    low: float
    high: float
    p: float | None
    at_equal_length: float | None
    samples: int

    @property
    def distance(self) -> float:
        """Of the area from telling nothing."""
        return abs(self.auroc - 0.5)

    def cells(self) -> list[str]:
        """In words, for a table: feature, layer, head, AUROC, interval, p, area at equal length, samples."""
        feature = self.feature
        place = ["", ""] if feature is None or feature.layer is None else [str(feature.layer), str(feature.head)]
        return [
            self.name if feature is None else feature.group,
            *place,
            format_share(self.auroc),
            format_interval(self.low, self.high),
            "" if self.p is None else f"{self.p:.3g}",
            "" if self.at_equal_length is None else f"{self.at_equal_length:.3f}",
            f"{self.samples:,}",
        ]


@dataclass(frozen=True, eq=False)
class Analysis:
    """Of one table.

    Attributes:
        table: the samples with a label.
        unlabelled: how many have none.
        features: the most telling first; without those that lack a value for a whole kind of samples.
        lengths: of the prompt and of the answer.
        correction: how the p were corrected.
        bootstrap: number of resamplings.
        silent: features that are left out.
    """

    table: FeatureTable
    unlabelled: int
    features: tuple[Telling, ...]
    lengths: tuple[Telling, ...]
    correction: str
    bootstrap: int
    silent: int

    @property
    def positives(self) -> int:
        """Samples with the label."""
        return int((self.table.labels == 1).sum())

    @property
    def left_out(self) -> str:
        """Which features say nothing, in words; empty if all have values."""
        if not self.silent:
            return ""
        return f"{self.silent:,} features have no value in any sample of one kind, so they can't tell, and are left out"

    @property
    def num_groups(self) -> int | None:
        """None if samples stand for themselves."""
        return None if self.table.groups is None else len(set(self.table.groups))

    def best_of_groups(self) -> list[Telling]:
        """The most telling head of each signal's value, the most telling first."""
        best: dict[str, Telling] = {}
        for one in self.features:
            assert one.feature is not None
            best.setdefault(one.feature.group, one)
        return list(best.values())

    def best_of_layers(self) -> list[Telling]:
        """The most telling feature of each layer, by layer."""
        best: dict[int, Telling] = {}
        for one in self.features:
            if one.feature is not None and one.feature.layer is not None:
                best.setdefault(one.feature.layer, one)
        return [best[layer] for layer in sorted(best)]

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "table": self.table.path.name,
            "model_name": self.table.model_name,
            "samples": len(self.table.labels),
            "positives": self.positives,
            "groups": self.num_groups,
            "unlabelled": self.unlabelled,
            "with_problem": self.table.problems,
            "features_without_values": self.silent,
            "interval": f"95 %, bootstrap percentile, {self.bootstrap} resamplings",
            "correction": self.correction,
            "lengths": [_line(one) for one in self.lengths],
            "features": [_line(one) for one in self.features],
        }


def _line(one: Telling) -> dict[str, Any]:
    place: dict[str, Any] = {}
    if one.feature is not None:
        place = {"signal": one.feature.signal, "value": one.feature.value}
        place |= {"layer": one.feature.layer, "head": one.feature.head}
    return {
        "name": one.name,
        **place,
        "auroc": _rounded(one.auroc),
        "interval": [_rounded(one.low), _rounded(one.high)],
        "p_corrected": one.p,
        "auroc_at_equal_length": None if one.at_equal_length is None else _rounded(one.at_equal_length),
        "samples": one.samples,
    }


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def analyze(table: FeatureTable, *, bootstrap: int = 1000, permutations: int = 1000, seed: int = 0) -> Analysis:
    """Analyse a table.

    Args:
        bootstrap: resamplings; of groups, if there are any.
        permutations: of the labels; the smallest p is one over their number.
        seed: of both.

    Raises:
        ViewError: it has not both kinds of samples.
    """
    known = table.labelled()
    labels, groups, rng = known.labels, known.groups, np.random.default_rng(seed)
    lengths = known.lengths.astype(np.float32)
    strata = areas.length_strata(known.lengths.sum(axis=1))
    weights = areas.bootstrap_weights(labels, groups, bootstrap, rng)
    permuted = areas.permuted_labels(labels, groups, permutations, rng)
    found = areas.auroc(known.values, labels)
    kept = np.flatnonzero(np.isfinite(found))
    values = known.values[:, kept]
    intervals = areas.bootstrap_interval(values, labels, weights)
    p = areas.corrected_p(values, labels, permuted) if len(kept) else np.empty(0)
    equal = areas.within_strata(values, labels, strata)
    counts = np.isfinite(values).sum(axis=0)
    tellings = [
        Telling(
            known.features[f].name,
            known.features[f],
            float(found[f]),
            float(intervals[i, 0]),
            float(intervals[i, 1]),
            float(p[i]),
            float(equal[i]) if np.isfinite(equal[i]) else None,
            int(counts[i]),
        )
        for i, f in enumerate(kept.tolist())
    ]
    of_lengths = zip(areas.auroc(lengths, labels), areas.bootstrap_interval(lengths, labels, weights), strict=True)
    return Analysis(
        table=known,
        unlabelled=int((table.labels < 0).sum()),
        features=tuple(sorted(tellings, key=lambda one: -one.distance)),
        lengths=tuple(
            Telling(name, None, float(area), float(low), float(high), None, None, len(labels))
            for name, (area, (low, high)) in zip(LENGTHS, of_lengths, strict=True)
        ),
        correction=CORRECTION.format(permutations=permutations, features=len(kept)),
        bootstrap=bootstrap,
        silent=len(known.features) - len(kept),
    )
