"""From a table of features to a probe: which heads, a logistic regression, its calibration, and how good it is.

Owns the procedure. scikit-learn (the extra `analysis`) fits; what it finds is written down as numbers. Everything that
looks at labels happens inside of folds: heads are ranked by their area on the training part alone, how many of them and
how strong the regularisation is chosen by further folds within it, and the part that was held out is scored once. So
the scores that the metrics, the calibration and the threshold come from are those of samples that their model has never
seen. Samples of one group are never divided between parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from glassbox.signals.probe import MAX_FEATURES, MAX_POINTS, Isotonic, Platt, Probe, ProbeFeature, Trained
from glassbox.view.measured import ViewError
from glassbox.view.samples import auroc as areas
from glassbox.view.samples.auroc import Labels
from glassbox.view.samples.feature_table import FeatureTable

Values = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]
Calibration = Literal["platt", "isotonic"]

FOLDS: Final = 5
# Of each training part, to choose how many features and how strong the regularisation.
_INNER_FOLDS: Final = 3
_NUMBERS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_STRENGTHS: Final = (0.01, 0.1, 1.0)
# Of the training samples that must have a value of a feature that is chosen.
_KNOWN: Final = 0.9
# In effect no regularisation; infinity is not taken by every release of scikit-learn.
_FREE: Final = 1e8


@dataclass(frozen=True)
class Wish:
    """What the probe should be.

    Attributes:
        name, label: of the probe.
        max_features: at most so many.
        calibration: two numbers for few samples; isotonic, which may have any rising form, for hundreds of each kind.
        false_alarms: share of negatives that may be above the threshold; None is the threshold that tells best
            (largest recall less false alarms).
        seed: of the folds and of the resamplings.
        shuffled: train on labels that were exchanged by chance: what such a probe is good for is what this procedure
            makes of nothing.
    """

    name: str
    label: str
    max_features: int = 32
    calibration: Calibration = "platt"
    false_alarms: float | None = None
    seed: int = 0
    shuffled: bool = False


@dataclass(frozen=True, eq=False)
class Training:
    """A probe, and what it was on samples that were held out.

    Attributes:
        probe: trained on all samples; its `trained.metrics` lack what has no value (of what is nowhere above the
            threshold there is no precision).
        table: of the samples with a label.
        scores: calibrated, of each sample by models and calibrations that have not seen it.
        strength: of the regularisation (C of scikit-learn).
        folds: how many parts there were.
        bootstrap: resamplings of the interval.
    """

    probe: Probe
    table: FeatureTable
    scores: Doubles
    strength: float
    folds: int
    bootstrap: int


@dataclass(frozen=True, eq=False)
class _Fit:
    """A standardised logistic regression on the columns [k] of a table."""

    columns: Rows
    mean: Doubles
    scale: Doubles
    coefficients: Doubles
    intercept: float

    def scores(self, values: Values) -> Doubles:
        """z of each row of values [n, F]; what is missing counts as its mean."""
        return self.intercept + _standardised(values[:, self.columns], self.mean, self.scale) @ self.coefficients


def train(table: FeatureTable, wish: Wish, *, bootstrap: int = 2000) -> Training:
    """Train a probe.

    Args:
        table: of features; samples without a label are left out.
        bootstrap: resamplings of the metrics' interval.

    Raises:
        ViewError: too few samples of one kind, or no feature that has values.
    """
    known = table.labelled()
    rng = np.random.default_rng(wish.seed)
    labels = known.labels
    if wish.shuffled:
        labels = areas.permuted_labels(labels, known.groups, 1, rng)[0].astype(np.int8)
        known = replace(known, labels=labels)
    folds = _num_folds(known)
    most = min(wish.max_features, MAX_FEATURES)
    z, part_of = np.empty(len(labels)), np.empty(len(labels), dtype=np.intp)
    parts = list(divide(known, np.arange(len(labels)), folds, wish.seed))
    for number, (fitted, held) in enumerate(parts):
        part_of[held] = number
        z[held] = _chosen(known, fitted, most, wish.seed)[0].scores(known.values[held])
    final, strength = _chosen(known, np.arange(len(labels)), most, wish.seed)
    calibrated = np.empty(len(labels))
    for fitted, held in parts:
        calibration = _calibration(z[fitted], labels[fitted], wish.calibration)
        calibrated[held] = [calibration.probability(value) for value in z[held]]
    calibration = _calibration(z, labels, wish.calibration)
    threshold = _threshold(calibrated, labels, wish.false_alarms)
    weights = areas.bootstrap_weights(labels, known.groups, bootstrap, rng)
    # Over pairs of one part: scores of different models are not compared. Not of the calibrated ones, either: where a
    # probe knows nothing, what the other parts say of it is the opposite of what this one does, and a calibration
    # that turned the scores round would seem to know something.
    column = z.astype(np.float32)
    low, high = areas.interval_within_strata(column, labels, part_of, weights)
    held_out = {
        "auroc": float(areas.within_strata(column[:, None], labels, part_of)[0]),
        "auroc_low": float(low),
        "auroc_high": float(high),
        **threshold_metrics(calibrated, labels, threshold),
    }
    probe = Probe(
        name=wish.name,
        label=wish.label,
        features=tuple(
            ProbeFeature(known.features[f].name, float(mean), float(scale), float(coefficient))
            for f, mean, scale, coefficient in zip(
                final.columns.tolist(), final.mean, final.scale, final.coefficients, strict=True
            )
        ),
        intercept=final.intercept,
        calibration=calibration,
        threshold=threshold,
        trained=Trained(
            model_name=known.model_name,
            samples=len(labels),
            positives=int((labels == 1).sum()),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            data=known.path.name,
            metrics={name: value for name, value in held_out.items() if np.isfinite(value)},
        ),
    )
    return Training(probe, known, calibrated, strength, folds, bootstrap)


def divide(table: FeatureTable, rows: Rows, count: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """`count` times some rows as a part to be fitted and one to be held out; groups are not divided."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels = table.labels[rows]
    if table.groups is None:
        splits = StratifiedKFold(count, shuffle=True, random_state=seed).split(rows, labels)
    else:
        groups = [table.groups[i] for i in rows]
        splits = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(rows, labels, groups)
    for fitted, held in splits:
        if len(set(labels[fitted].tolist())) > 1:
            yield rows[fitted], rows[held]


def threshold_metrics(scores: Doubles, labels: Labels, threshold: float) -> dict[str, float]:
    """Brier score of probabilities, and what the threshold does.

    Args:
        labels: of both kinds.

    Returns:
        by name; `precision` is NaN where no score reaches the threshold: 0 of 0.
    """
    above, positive = scores >= threshold, labels == 1
    return {
        "brier": float(((scores - positive) ** 2).mean()),
        "recall": float(above[positive].mean()),
        "false_alarms": float(above[~positive].mean()),
        "precision": float(positive[above].mean()) if above.any() else float("nan"),
    }


def _num_folds(table: FeatureTable) -> int:
    """FOLDS, or fewer if there are not as many samples (groups) of each kind."""
    kinds = []
    for label in (0, 1):
        rows = np.flatnonzero(table.labels == label)
        kinds.append(len(rows) if table.groups is None else len({table.groups[i] for i in rows}))
    # Each part is divided again.
    least = 2 * _INNER_FOLDS
    if min(kinds) < least:
        what = "samples" if table.groups is None else "groups"
        raise ViewError(
            f"{table.path} must have at least {least} {what} with label true and {least} with false, got {kinds[1]} "
            f"and {kinds[0]}; give more"
        )
    return min(FOLDS, min(kinds) // 2)


def _chosen(table: FeatureTable, rows: Rows, most: int, seed: int) -> tuple[_Fit, float]:
    """Fitted to these rows, with the number of features and the strength that do best on parts held out of them."""
    numbers = [number for number in _NUMBERS if number < most] + [most]
    found: dict[tuple[int, float], list[float]] = {}
    for fitted, held in divide(table, rows, _INNER_FOLDS, seed + 1):
        if len(set(table.labels[held].tolist())) < 2:
            continue
        order = _ranking(table, fitted)
        scores = []
        for number in numbers:
            for strength in _STRENGTHS:
                fit = _fit(table, fitted, order[:number], strength)
                scores.append(fit.scores(table.values[held]))
        of_fold = areas.auroc(np.stack(scores, axis=1).astype(np.float32), table.labels[held])
        for at, area in zip(((n, c) for n in numbers for c in _STRENGTHS), of_fold.tolist(), strict=True):
            found.setdefault(at, []).append(area)
    # The first of the best: of equals the one with fewer features.
    number, strength = max(found, key=lambda at: (round(float(np.mean(found[at])), 3), -at[0], -at[1]))
    return _fit(table, rows, _ranking(table, rows)[:number], strength), strength


def _ranking(table: FeatureTable, rows: Rows) -> Rows:
    """Columns by how well each tells the labels of these rows, the best first."""
    values = table.values[rows]
    # One that never varies tells nothing, and can't be standardised.
    varying = np.nanmax(values, axis=0, initial=-np.inf) > np.nanmin(values, axis=0, initial=np.inf)
    usable = np.flatnonzero((np.isfinite(values).mean(axis=0) >= _KNOWN) & varying)
    if not len(usable):
        raise ViewError(f"{table.path} has no feature with values in {_KNOWN:.0%} of its samples; extract others")
    distance = np.nan_to_num(np.abs(areas.auroc(values[:, usable], table.labels[rows]) - 0.5))
    return usable[np.argsort(-distance, kind="stable")]


def _fit(table: FeatureTable, rows: Rows, columns: Rows, strength: float) -> _Fit:
    from sklearn.linear_model import LogisticRegression

    values = table.values[np.ix_(rows, columns)].astype(np.float64)
    mean, scale = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    model = LogisticRegression(C=strength, max_iter=2000)
    model.fit(_standardised(values, mean, scale), table.labels[rows])
    return _Fit(columns, mean, scale, model.coef_[0].astype(np.float64), float(model.intercept_[0]))


def _standardised(values: npt.NDArray[Any], mean: Doubles, scale: Doubles) -> Doubles:
    return np.nan_to_num((values.astype(np.float64) - mean) / scale, nan=0.0)


def _calibration(z: Doubles, labels: Labels, kind: Calibration) -> Platt | Isotonic:
    if kind == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(z, labels)
        points = list(zip(fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist(), strict=True))
        rising = [point for i, point in enumerate(points) if i == 0 or point[0] > points[i - 1][0]]
        return Isotonic(tuple(rising[:: -(-len(rising) // MAX_POINTS)]))
    from sklearn.linear_model import LogisticRegression

    # Platt's targets, a little away from 0 and 1: else what is told perfectly would be told with certainty.
    positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
    target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    model = LogisticRegression(C=_FREE, max_iter=2000)
    both = np.concatenate([z, z])[:, None]
    model.fit(both, np.repeat([1, 0], len(z)), sample_weight=np.concatenate([target, 1 - target]))
    if model.coef_[0, 0] <= 0:  # it knows nothing: the share of positives, whatever it says
        share = (positives + 1) / (positives + negatives + 2)
        return Platt(0.0, float(np.log(share / (1 - share))))
    return Platt(float(model.coef_[0, 0]), float(model.intercept_[0]))


def _threshold(scores: Doubles, labels: Labels, false_alarms: float | None) -> float:
    """The score from which on the label is said to be there."""
    negatives, positives = np.sort(scores[labels == 0]), np.sort(scores[labels == 1])
    candidates = np.unique(scores)
    alarms = 1 - np.searchsorted(negatives, candidates, side="left") / len(negatives)
    recall = 1 - np.searchsorted(positives, candidates, side="left") / len(positives)
    if false_alarms is None:
        return float(candidates[np.argmax(recall - alarms)])
    allowed = candidates[alarms <= false_alarms]
    # Above all scores that were seen, if not even the highest may be.
    return float(allowed[0]) if len(allowed) else float(min(1.0, np.nextafter(candidates[-1], 2.0)))
