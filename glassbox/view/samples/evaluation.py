"""A probe on a table that it was not trained on: how well it tells, how far its probabilities can be trusted.

Owns what an evaluation says. That a probe fits the table's model is checked first: a probe of another model reads other
heads.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.signals.probe import Probe, ProbeError
from glassbox.view.measured import ViewError
from glassbox.view.samples import auroc as areas
from glassbox.view.samples.feature_table import FeatureTable
from glassbox.view.samples.training import threshold_metrics

_BINS: Final = 5
_SHOWN: Final = 3


@dataclass(frozen=True)
class Bin:
    """Samples of about the same score.

    Attributes:
        low, high: of their scores.
        mean_score: what the probe says of them, on average.
        share: of positives among them.
        samples: how many they are.
    """

    low: float
    high: float
    mean_score: float
    share: float
    samples: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Of one probe on one table.

    Attributes:
        probe: that was evaluated.
        table: the samples with a label that have a score.
        scores: float64 [n].
        metrics: area with its interval, those of `training.threshold_metrics`, and `brier_of_share`: that of always
            saying the share of positives.
        bins: a calibration table, scores rising.
        without_score: samples that have none of the probe's features.
        same_model: whether the table's model has the name of the probe's.
    """

    probe: Probe
    table: FeatureTable
    scores: npt.NDArray[np.float64]
    metrics: dict[str, float]
    bins: tuple[Bin, ...]
    without_score: int
    same_model: bool

    @property
    def no_value(self) -> dict[str, str]:
        """Why a metric has none, by its name."""
        reasons = {
            "precision": "no score reaches the threshold",
            "auroc_low": "fewer than two samples of a kind, or all of one kind in one group",
        }
        reasons["auroc_high"] = reasons["auroc_low"]
        return {name: reasons[name] for name, value in self.metrics.items() if not np.isfinite(value)}

    def reaches(self, area: float) -> bool:
        """Whether the area is surely that large: the low end of its interval, if it has one."""
        return self.metrics["auroc_low"] >= area

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "probe": self.probe.name,
            "label": self.probe.label,
            "table": self.table.path.name,
            "model_name": self.table.model_name,
            "trained_on": self.probe.trained.model_name,
            "same_model": self.same_model,
            "samples": len(self.scores),
            "positives": int((self.table.labels == 1).sum()),
            "without_score": self.without_score,
            "with_problem": self.table.problems,
            "threshold": self.probe.threshold,
            **{name: round(value, 4) if np.isfinite(value) else None for name, value in self.metrics.items()},
            "no_value": self.no_value,
            "calibration": [
                {
                    "scores": [round(one.low, 4), round(one.high, 4)],
                    "mean_score": round(one.mean_score, 4),
                    "share_of_positives": round(one.share, 4),
                    "samples": one.samples,
                }
                for one in self.bins
            ],
        }


def evaluate(probe: Probe, table: FeatureTable, *, bootstrap: int = 2000, seed: int = 0) -> Evaluation:
    """Evaluate a probe.

    Raises:
        ProbeError: the table's model lacks what the probe reads, or the table does.
        ViewError: it has not both kinds of samples.
    """
    _check(probe, table)
    known = table.labelled()
    at = {feature.name: i for i, feature in enumerate(known.features)}
    scores = np.full(len(known.labels), np.nan)
    for i, row in enumerate(known.values[:, [at[feature.name] for feature in probe.features]].tolist()):
        pairs = zip(probe.features, row, strict=True)
        score = probe.score_features({feature.name: value for feature, value in pairs if np.isfinite(value)})
        if score is not None:
            scores[i] = score.value
    scored = np.flatnonzero(np.isfinite(scores))
    if not len(scored):
        raise ViewError(f"{table.path} must have values of the probe's features; no sample has any")
    left = known.of(scored).labelled()
    scores = scores[scored]
    weights = areas.bootstrap_weights(left.labels, left.groups, bootstrap, np.random.default_rng(seed))
    share = float((left.labels == 1).mean())
    column = scores[:, None].astype(np.float32)
    low, high = areas.bootstrap_interval(column, left.labels, weights)[0]
    return Evaluation(
        probe=probe,
        table=left,
        scores=scores,
        metrics={
            "auroc": float(areas.auroc(column, left.labels)[0]),
            "auroc_low": float(low),
            "auroc_high": float(high),
            **threshold_metrics(scores, left.labels, probe.threshold),
            "brier_of_share": share * (1 - share),
        },
        bins=_bins(scores, left.labels),
        without_score=len(known.labels) - len(scored),
        same_model=probe.trained.model_name == table.model_name,
    )


def _check(probe: Probe, table: FeatureTable) -> None:
    layers = {feature.layer for feature in table.features if feature.layer is not None}
    heads = {feature.head for feature in table.features if feature.head is not None}
    probe.check_fits(table.model_name, layers, heads)
    there = {feature.name for feature in table.features}
    lacking = [feature.name for feature in probe.features if feature.name not in there]
    if lacking:
        listed = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
        raise ProbeError(
            probe.source or probe.name,
            f"features must be columns of {table.path}, which lacks {listed}; extract with the spans and signals that "
            "the probe was trained with",
        )


def _bins(scores: npt.NDArray[np.float64], labels: areas.Labels) -> tuple[Bin, ...]:
    """About as many samples in each."""
    order = np.argsort(scores, kind="stable")
    return tuple(
        Bin(
            low=float(scores[part[0]]),
            high=float(scores[part[-1]]),
            mean_score=float(scores[part].mean()),
            share=float((labels[part] == 1).mean()),
            samples=len(part),
        )
        for part in np.array_split(order, min(_BINS, len(order)))
    )
