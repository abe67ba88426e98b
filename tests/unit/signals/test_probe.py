"""Probes: what they score, whom they fit, and a file of which nothing is believed."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glassbox.signals.features import features
from glassbox.signals.probe import (
    MAX_BYTES,
    Isotonic,
    Platt,
    Probe,
    ProbeError,
    ProbeFeature,
    ProbeScore,
    Trained,
    read_probe,
    write_probe,
)
from tests.trace_samples import make_trace

ANSWER, PROMPT = "answer_entropy_ratio_L0_H2", "prompt_span.user_L3_H1"
PROBE = Probe(
    name="injection",
    label="injected",
    features=(ProbeFeature(ANSWER, 0.5, 0.25, 2.0), ProbeFeature(PROMPT, 0.1, 0.05, -1.0)),
    intercept=0.5,
    calibration=Platt(2.0, -1.0),
    threshold=0.6,
    trained=Trained("tiny/model", 40, 19, "2026-11-30T19:00:00Z", "features.parquet", {"auroc": 0.9}),
)


class TestScore:
    def test_is_the_calibrated_regression(self) -> None:
        """z = 0.5 + 2 (0.75 - 0.5) / 0.25 - (0.2 - 0.1) / 0.05 = 0.5, of which Platt makes 1 / (1 + e^0)."""
        score = PROBE.score_features({ANSWER: 0.75, PROMPT: 0.2})
        assert score == ProbeScore(0.5, "injected", 0.6)
        assert not score.above
        assert ProbeScore(0.6, "injected", 0.6).above

    def test_of_a_trace_is_that_of_its_features(self) -> None:
        """Only the probe's own are looked at."""
        trace = make_trace()
        found = features(trace)
        z = 0.5 + 2 * (found[ANSWER] - 0.5) / 0.25 - (found[PROMPT] - 0.1) / 0.05
        score = PROBE.score(trace)
        assert score is not None
        assert score.value == pytest.approx(1 / (1 + math.exp(1 - 2 * z)))
        assert score.missing == ()

    def test_what_is_missing_counts_as_its_mean(self) -> None:
        """And is named; with nothing at all there is no score."""
        score = PROBE.score_features({ANSWER: 0.75})
        assert score == replace(PROBE.score_features({ANSWER: 0.75, PROMPT: 0.1}), missing=(PROMPT,))
        assert PROBE.score_features({}) is None
        assert PROBE.score(make_trace(positions=(2,), spans=())) is None

    def test_isotonic_calibration(self) -> None:
        """Straight between its points, level outside of them."""
        calibration = Isotonic(((-1.0, 0.1), (1.0, 0.3), (2.0, 1.0)))
        found = [calibration.probability(z) for z in (-5, -1, 0, 1.5, 9)]
        assert pytest.approx([0.1, 0.1, 0.2, 0.65, 1.0]) == found

    def test_numbers_without_end(self) -> None:
        """The farthest outlier has a probability, too."""
        for value in (-1e30, 1e30):
            score = PROBE.score_features({ANSWER: value})
            assert score is not None
            assert 0 <= score.value <= 1


class TestNeeds:
    def test_are_those_of_its_features(self) -> None:
        """Nothing else has to be measured."""
        needs = PROBE.needs
        assert ((0, 3), (1, 2), ("user",), (), False) == (
            needs.layers,
            needs.heads,
            needs.spans,
            needs.signals,
            needs.prompt,
        )

    def test_of_signals(self) -> None:
        """Their names, the spans that they are of, and whether they need the whole prompt."""
        focus, rauq, spectral = (
            replace(PROBE, features=(ProbeFeature(name, 0.0, 1.0, 1.0),)).needs
            for name in ("focus_mass_user_L0_H1", "rauq_score", "spectral_sv1_L0_H0")
        )
        assert (("focus",), ("user",), False) == (focus.signals, focus.spans, focus.prompt)
        assert (("rauq",), (), (), False) == (rauq.signals, rauq.layers, rauq.heads, rauq.prompt)
        assert (("spectral",), True) == (spectral.signals, spectral.prompt)

    def test_a_model_that_has_them(self) -> None:
        """More layers and heads do no harm."""
        PROBE.check_fits("m", range(4), range(9))

    @pytest.mark.parametrize(
        ("layers", "heads", "message"),
        [
            (
                range(3),
                range(9),
                r"layers that other/model measures \(0 to 2\), got layer 3; the probe was trained on tiny",
            ),
            ((0, 3), (0, 1), r"heads that other/model measures \(0 to 1\), got head 2;"),
            ((), range(9), r"layers that other/model measures \(none\), got layer 0, 3;"),
        ],
    )
    def test_another_model(self, layers: Any, heads: Any, message: str) -> None:
        """Which place it lacks, on what the probe was trained, and what to do."""
        with pytest.raises(ProbeError, match=message):
            replace(PROBE, source="a.json").check_fits("other/model", layers, heads)


class TestFile:
    @pytest.mark.parametrize("calibration", [Platt(0.1, 1 / 3), Isotonic(((-1.5, 0.0), (0.1, 1.0)))])
    def test_holds_all_of_it(self, tmp_path: Path, calibration: Any) -> None:
        """Every number to its last digit; the file is JSON."""
        probe = replace(PROBE, calibration=calibration)
        write_probe(tmp_path / "a.json", probe)
        found = read_probe(tmp_path / "a.json")
        assert probe == found
        assert found.source == str(tmp_path / "a.json")
        assert json.loads((tmp_path / "a.json").read_text())["format"] == "glassbox-probe"

    def test_what_could_not_be_read_is_not_written(self, tmp_path: Path) -> None:
        """With the same message; nothing is left."""
        with pytest.raises(ProbeError, match="threshold must be a number from 0 to 1, got nan"):
            write_probe(tmp_path / "a.json", replace(PROBE, threshold=math.nan))
        assert [] == list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("where", "value", "message"),
        [
            (("format",), "other", "format must be glassbox-probe, got 'other'"),
            (("version",), 2, "version must be 1, got 2"),
            (("version",), True, "version must be 1, got True"),
            (
                ("name",),
                "9\x1b[2J",
                r"name must be 1 to 64 letters, digits, _ \. or -, the first a letter, got '9\\x1b",
            ),
            (("label",), "a\u202eb", "label must be a text of 1 to 256 characters that can be shown"),
            (("label",), "", "label must be a text"),
            (("features",), [], "features must be a list of 1 to 4096, got 0"),
            (("features",), [1] * 5000, "features must be a list of 1 to 4096, got 5000"),
            (("features", 1), 7, r"features\[1\] must be a mapping, got 7"),
            (("features", 1, "name"), "os.system", r"features\[1\]\.name must be a feature that this release knows"),
            (("features", 1, "name"), ANSWER, r"features\[1\]\.name must be there once, but is there twice"),
            (("features", 0, "scale"), 0, r"features\[0\]\.scale must be a number from 1e-30 to 1e\+30, got 0"),
            (("features", 0, "mean"), "0.5", r"features\[0\]\.mean must be a number"),
            (("features", 0, "coefficient"), 1e31, r"features\[0\]\.coefficient must be a number from -1e\+30"),
            (("intercept",), None, "intercept must be a number"),
            (("intercept",), math.nan, "intercept must be a number from -1e.30 to 1e.30, got nan"),
            (("intercept",), 10**4000, "intercept must be a number"),
            (("threshold",), 1.5, "threshold must be a number from 0 to 1, got 1.5"),
            (("calibration",), "platt", "calibration must be a mapping, got 'platt'"),
            (("calibration", "kind"), "pickle", r"calibration\.kind must be platt or isotonic, got 'pickle'"),
            (("calibration",), {"kind": "isotonic", "points": [[0, 0.5], [0, 0.6]]}, r"points must rise"),
            (("calibration",), {"kind": "isotonic", "points": [[0, 0.5], [1, 1.6]]}, r"points must rise, with prob"),
            (("calibration",), {"kind": "isotonic", "points": [[0, 0.5], [1]]}, r"points must be pairs of numbers"),
            (("trained", "samples"), -1, r"trained\.samples must be a whole number from 0"),
            (("trained", "metrics", "auroc"), [], r"trained\.metrics\.auroc must be a number"),
            (("code",), "import os", "code must be one of format, version, name, label"),
        ],
    )
    def test_what_is_not_as_it_must_be(self, tmp_path: Path, where: tuple[Any, ...], value: Any, message: str) -> None:
        """One line: file, field, rule, value, remedy."""
        path = tmp_path / "a.json"
        write_probe(path, PROBE)
        document = json.loads(path.read_text())
        part = document
        for key in where[:-1]:
            part = part[key]
        part[where[-1]] = value
        path.write_text(json.dumps(document))
        with pytest.raises(ProbeError, match=message) as raised:
            read_probe(path)
        text = str(raised.value)
        assert text.startswith(f"{path}: ")
        assert text.endswith("; make the file with `glassbox train`")
        assert text.isprintable()

    def test_every_field_must_be_there(self, tmp_path: Path) -> None:
        """Its name is said."""
        path = tmp_path / "a.json"
        write_probe(path, PROBE)
        document = json.loads(path.read_text())
        for part, prefix in (
            (document, ""),
            (document["features"][0], "features[0]."),
            (document["trained"], "trained."),
        ):
            for name in list(part):
                kept = part.pop(name)
                path.write_text(json.dumps(document))
                with pytest.raises(ProbeError) as raised:
                    read_probe(path)
                assert f"{prefix}{name} must be" in str(raised.value)
                part[name] = kept

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", r"must be JSON \(Expecting value"),
            (b"\x80\x04\x95", r"must be JSON \("),
            (b"[" * 100_000, "must be JSON, but is nested too deeply"),
            (b'{"name": 1, "name": 2}', "a key is there twice"),
            (b"[1]", "the file must be a mapping"),
            (b" " * (MAX_BYTES + 1), "can't be read .is larger than 4 MB"),
        ],
    )
    def test_what_is_no_probe_at_all(self, tmp_path: Path, content: bytes, message: str) -> None:
        """Pickles, garbage, bombs."""
        path = tmp_path / "a.json"
        path.write_bytes(content)
        with pytest.raises(ProbeError, match=message):
            read_probe(path)

    def test_what_is_no_file(self, tmp_path: Path) -> None:
        """A pipe doesn't keep its reader."""
        os.mkfifo(tmp_path / "pipe")
        for name, message in (("pipe", "is a pipe or a device"), (".", "Is a directory"), ("no", "No such file")):
            with pytest.raises(ProbeError, match=f"can't be read .{message}"):
                read_probe(tmp_path / name)
