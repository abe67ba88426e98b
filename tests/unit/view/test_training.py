"""Probes that are trained, judged and written: on made data of which the best possible result is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, precision_score, recall_score, roc_auc_score

from glassbox.signals.features import Feature
from glassbox.signals.probe import Isotonic, ProbeError, read_probe, write_probe
from glassbox.view.measured import ViewError
from glassbox.view.samples.evaluation import evaluate
from glassbox.view.samples.feature_table import read_table
from glassbox.view.samples.training import Wish, divide, threshold_metrics, train
from tests.sample_tables import HEADS, TELLING, make_rows, make_table, write_table

WISH = Wish("made", "yes", max_features=8)


class TestTraining:
    def test_finds_what_tells(self, tmp_path: Path) -> None:
        """The held-out area is that of two normal distributions two deviations apart: Phi(sqrt 2)."""
        trained = train(make_table(tmp_path, samples=400), WISH)
        metrics = trained.probe.trained.metrics
        best = norm.cdf(2 / np.sqrt(2))
        assert metrics["auroc_low"] < best < metrics["auroc_high"] + 0.01
        heaviest = max(trained.probe.features, key=lambda feature: abs(feature.coefficient))
        assert heaviest.name == TELLING
        assert heaviest.coefficient > 0
        assert (400, 200, "tiny/model") == (
            trained.probe.trained.samples,
            trained.probe.trained.positives,
            trained.probe.trained.model_name,
        )

    def test_a_probe_that_knows_nothing_has_a_half(self, tmp_path: Path) -> None:
        """Labels exchanged by chance, many more heads than samples: choosing them outside of the folds would tell."""
        areas = []
        for seed in range(16):
            table = make_table(tmp_path, samples=60, seed=seed)
            noise = np.random.default_rng(seed).normal(size=(60, 120)).astype(np.float32)
            features = tuple(Feature("prompt", "entropy_ratio", 100 + i // HEADS, i % HEADS) for i in range(120))
            wish = replace(WISH, shuffled=True, seed=seed, max_features=2)
            trained = train(replace(table, features=features, values=noise), wish, bootstrap=100)
            areas.append(trained.probe.trained.metrics["auroc"])
        # An area over five parts of 6 against 6 samples deviates by 0.13 by chance, as 24 such trainings have shown.
        assert np.mean(areas) == pytest.approx(0.5, abs=3 * 0.13 / np.sqrt(16))

    def test_groups_are_never_divided(self, tmp_path: Path) -> None:
        """All samples of one are fitted or held out; each sample is held out once."""
        table = make_table(tmp_path, samples=120, groups=30)
        assert table.groups is not None
        held_out: list[int] = []
        for fitted, held in divide(table, np.arange(120), 5, seed=0):
            assert not {table.groups[i] for i in fitted} & {table.groups[i] for i in held}
            assert set(table.labels[held].tolist()) == {0, 1}
            held_out += held.tolist()
        assert sorted(held_out) == list(range(120))

    def test_probabilities_are_probabilities(self, tmp_path: Path) -> None:
        """Of those that get a score about 0.8 some 80 % are positives, on other samples; with either calibration."""
        other = make_table(tmp_path, samples=2000, seed=9)
        table = make_table(tmp_path, samples=400)
        for kind in ("platt", "isotonic"):
            probe = train(table, replace(WISH, calibration=kind)).probe
            assert (kind == "isotonic") == isinstance(probe.calibration, Isotonic)
            found = evaluate(probe, other)
            assert max(abs(one.mean_score - one.share) for one in found.bins) < 0.08
            assert found.metrics["brier"] < 0.14 < found.metrics["brier_of_share"] == 0.25

    def test_false_alarms_are_kept_down(self, tmp_path: Path) -> None:
        """At most the wanted share of negatives is above the threshold; the default tells best."""
        table = make_table(tmp_path, samples=400)
        few = train(table, replace(WISH, false_alarms=0.02)).probe
        best = train(table, WISH).probe
        assert few.trained.metrics["false_alarms"] <= 0.02
        assert few.threshold > best.threshold
        gain = best.trained.metrics["recall"] - best.trained.metrics["false_alarms"]
        assert gain > few.trained.metrics["recall"] - few.trained.metrics["false_alarms"]

    def test_what_never_varies_or_is_seldom_there_is_not_chosen(self, tmp_path: Path) -> None:
        """Nor can it break the training."""
        rows = make_rows(80, distance=4.0, also={"answer_top1_ratio_L0_H0": 0.5})
        rows[3] = replace(rows[3], features=rows[3].features | {"answer_top1_ratio_L0_H1": 1.0})
        probe = train(read_table(write_table(tmp_path / "a.parquet", rows)), WISH).probe
        assert not [feature.name for feature in probe.features if "top1" in feature.name]

    def test_too_few_samples(self, tmp_path: Path) -> None:
        """How many of each are needed, and how many there are."""
        with pytest.raises(ViewError, match="at least 6 samples with label true and 6 with false, got 3 and 3"):
            train(make_table(tmp_path, samples=6), WISH)
        with pytest.raises(ViewError, match="at least 6 groups"):
            train(make_table(tmp_path, samples=60, groups=3), WISH)
        rows = [replace(row, label=True) for row in make_rows(20)]
        with pytest.raises(ViewError, match="got 20 and 0"):
            train(read_table(write_table(tmp_path / "a.parquet", rows)), WISH)


class TestEvaluation:
    def test_numbers_are_those_of_sklearn(self, tmp_path: Path) -> None:
        """Area, Brier score, recall and precision, of the scores that the probe's file gives."""
        write_probe(tmp_path / "a.json", train(make_table(tmp_path), WISH).probe)
        table = make_table(tmp_path, seed=5)
        probe = read_probe(tmp_path / "a.json")
        found = evaluate(probe, table)
        labels, above = table.labels, found.scores >= probe.threshold
        assert roc_auc_score(labels, found.scores) == pytest.approx(found.metrics["auroc"], abs=1e-6)
        assert brier_score_loss(labels, found.scores) == pytest.approx(found.metrics["brier"])
        assert recall_score(labels, above) == pytest.approx(found.metrics["recall"])
        assert precision_score(labels, above) == pytest.approx(found.metrics["precision"])
        assert len(labels) == sum(one.samples for one in found.bins)
        assert found.same_model

    def test_a_threshold_that_nothing_reaches(self) -> None:
        """0 of 0 is no precision, and not the worst one."""
        metrics = threshold_metrics(np.array([0.1, 0.2]), np.array([0, 1], np.int8), 0.9)
        assert (0.0, 0.0) == (metrics["recall"], metrics["false_alarms"])
        assert np.isnan(metrics["precision"])

    def test_what_has_no_value(self, tmp_path: Path) -> None:
        """Null in JSON, with the reason; and no interval is no area that is surely large enough."""
        probe = replace(train(make_table(tmp_path), WISH).probe, threshold=1.0)
        rows = make_rows(9)
        rows = [rows[1], *(row for row in rows if not row.label)]
        found = evaluate(probe, read_table(write_table(tmp_path / "b.parquet", rows)))
        document = found.document()
        assert [None] * 3 == [document[name] for name in ("precision", "auroc_low", "auroc_high")]
        assert {"precision", "auroc_low", "auroc_high"} == document["no_value"].keys()
        assert "no score reaches the threshold" == document["no_value"]["precision"]
        assert not found.reaches(0.0)
        json.dumps(document, allow_nan=False)
        assert {} == evaluate(replace(probe, threshold=0.0), make_table(tmp_path, seed=5)).document()["no_value"]

    def test_a_probe_that_says_nothing_at_all(self, tmp_path: Path) -> None:
        """Of a threshold that no held-out score reaches the file has no precision; it is read all the same."""
        # As many of either kind have the feature, so that each score is one of a false alarm, too.
        rows = [replace(row, features={TELLING: float(row.sample % 4 < 2)}) for row in make_rows()]
        table = read_table(write_table(tmp_path / "a.parquet", rows))
        probe = train(table, replace(WISH, false_alarms=0.0)).probe
        assert "precision" not in probe.trained.metrics
        write_probe(tmp_path / "a.json", probe)
        assert probe.trained.metrics == read_probe(tmp_path / "a.json").trained.metrics

    def test_a_table_of_another_model(self, tmp_path: Path) -> None:
        """A layer that it lacks, or a feature, by name; another name is said, and no error."""
        probe = train(make_table(tmp_path), WISH).probe
        rows = [
            replace(row, features={name: v for name, v in row.features.items() if "_L0_" in name})
            for row in make_rows()
        ]
        with pytest.raises(ProbeError, match=r"must be of layers that tiny/model measures \(0 to 0\), got layer 1"):
            evaluate(probe, read_table(write_table(tmp_path / "b.parquet", rows)))
        rows = [
            replace(row, features={name: v for name, v in row.features.items() if name != TELLING})
            for row in make_rows()
        ]
        with pytest.raises(ProbeError, match=rf"which lacks {TELLING}; extract with the spans and signals"):
            evaluate(probe, read_table(write_table(tmp_path / "b.parquet", rows)))
        table = read_table(tmp_path / "features.parquet")
        assert table.origin is not None
        other = replace(table, origin=replace(table.origin, model_name="other"))
        assert not evaluate(probe, other).same_model
