"""From samples to a verdict on the command line: what is printed, written and refused. No engine runs here."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.signals.probe import read_probe
from glassbox.view.samples.parts import open_parts
from glassbox.view.samples.samples_file import read_samples
from tests.sample_tables import ORIGIN, TELLING, make_rows, write_table

QUICK = ("--bootstrap", 100, "--permutations", 99)


def invoke(*args: object) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refused(message: str, *args: object, status: int = 1) -> None:
    result = invoke(*args)
    assert (status, "") == (result.exit_code, result.stdout)
    assert message in result.stderr
    assert 1 == len(result.stderr.splitlines())
    assert result.stderr.rstrip("\n").isprintable()


class TestAnalyze:
    def test_the_most_telling_head_comes_first(self, tmp_path: Path) -> None:
        """With its interval, p and the area at equal length; the lengths beside it, and what was corrected for."""
        table = write_table(tmp_path / "a.parquet", make_rows(groups=60))
        text = invoke("analyze", table, *QUICK, "--limit", 1).stdout
        assert "tiny/model, 120 samples in 60 groups, 60 positive" in text
        first = next(line for line in text.splitlines() if "entropy_ratio" in line)
        assert ["prompt_entropy_ratio", "1", "1"] == first.split()[:3]
        assert 0.9 < float(first.split()[3]) < 0.96  # Phi(sqrt 2) is 0.921
        assert "answer_tokens" in text
        assert "max statistic of 99 permutations of the labels, over all 24" in text

    def test_json_has_all_features(self, tmp_path: Path) -> None:
        """By falling distance from 0.5, each with its place."""
        found = json.loads(invoke("analyze", write_table(tmp_path / "a.parquet", make_rows()), *QUICK, "--json").stdout)
        assert 24 == len(found["features"])
        first = found["features"][0]
        assert (TELLING, "prompt", "entropy_ratio", 1, 1, 0.01, 120) == tuple(
            first[name] for name in ("name", "signal", "value", "layer", "head", "p_corrected", "samples")
        )
        assert first["interval"][0] < first["auroc"] < first["interval"][1]
        distances = [abs(one["auroc"] - 0.5) for one in found["features"]]
        assert sorted(distances, reverse=True) == distances
        assert ["prompt_tokens", "answer_tokens"] == [one["name"] for one in found["lengths"]]

    def test_the_page_needs_nothing_else(self, tmp_path: Path) -> None:
        """Tables and pictures in one file; names of others are text there."""
        rows = [*make_rows(40, also={"prompt_span.x_L0_H0": 0.5}), *make_rows(1)]
        table = write_table(tmp_path / "<b>.parquet", rows)
        result = invoke("analyze", table, *QUICK, "-o", tmp_path / "a.html")
        assert 0 == result.exit_code
        page = (tmp_path / "a.html").read_text()
        assert page.count("<svg") == page.count("<figure") >= 4
        assert "prompt_entropy_ratio" in page
        assert "&lt;b&gt;.parquet" in page
        assert "<b>" not in page
        assert not any(word in page for word in ("<script", "http://localhost", "src="))

    def test_a_terminal_is_given_no_orders(self, tmp_path: Path) -> None:
        """Whatever a file's name and its metadata hold."""
        arrow = pq.read_table(write_table(tmp_path / "a.parquet", make_rows(20)))
        path = tmp_path / "\x1b[2Ja.parquet"
        pq.write_table(arrow, path)
        text = invoke("analyze", path, *QUICK).stdout
        assert "\\x1b[2Ja.parquet" in text
        assert "\x1b" not in text

    def test_what_has_no_value(self, tmp_path: Path) -> None:
        """An interval of one sample, and features that one kind lacks, in words and as null."""
        rows = make_rows(9)
        rows = [replace(rows[1], features={**rows[1].features, "prompt_span.x_L0_H0": 0.5}), *rows[::2]]
        table = write_table(tmp_path / "a.parquet", rows)
        found = invoke("analyze", table, *QUICK)
        assert 0 == found.exit_code
        assert "n/a" in found.stdout
        assert "nan" not in found.stdout
        assert "1 features have no value in any sample of one kind" in found.stdout
        line = json.loads(invoke("analyze", table, *QUICK, "--json").stdout)["features"][0]
        assert [None, None] == line["interval"]
        assert 0 == invoke("analyze", table, *QUICK, "-o", tmp_path / "a.html").exit_code

    def test_one_kind_of_samples(self, tmp_path: Path) -> None:
        """There is nothing to tell apart."""
        rows = [row for row in make_rows(20) if row.label]
        message = "must have samples with label true and with label false, got 10 and 0"
        refused(message, "analyze", write_table(tmp_path / "a.parquet", rows))
        refused("No such file", "analyze", tmp_path / "b.parquet")


class TestTrainAndEvaluate:
    def test_from_a_table_to_a_verdict(self, tmp_path: Path) -> None:
        """The probe's file is what `read_probe` takes; on other samples it is as good as it was said to be."""
        train, test = (write_table(tmp_path / f"{seed}.parquet", make_rows(200, seed=seed)) for seed in (0, 1))
        result = invoke("train", train, "-o", tmp_path / "made.json", "--label", "yes", "--max-features", 4)
        assert 0 == result.exit_code
        assert "Held out: AUROC 0.9" in result.stdout
        probe = read_probe(tmp_path / "made.json")
        assert ("made", "yes") == (probe.name, probe.label)
        assert TELLING in {feature.name for feature in probe.features}
        found = json.loads(invoke("evaluate", tmp_path / "made.json", test, "--json").stdout)
        assert found["auroc"] == pytest.approx(probe.trained.metrics["auroc"], abs=0.06)
        assert found["same_model"]
        assert "AUROC 0.9" in invoke("evaluate", tmp_path / "made.json", test).stdout
        assert 0 == invoke("evaluate", tmp_path / "made.json", test, "--fail-below", 0.8).exit_code
        assert 1 == invoke("evaluate", tmp_path / "made.json", test, "--fail-below", 0.99).exit_code
        unreached = json.loads((tmp_path / "made.json").read_text()) | {"threshold": 1.0}
        (tmp_path / "unreached.json").write_text(json.dumps(unreached))
        told = invoke("evaluate", tmp_path / "unreached.json", test).stdout
        assert "precision n/a" in told
        assert "precision is n/a: no score reaches the threshold" in told
        only = invoke("train", train, "-o", tmp_path / "b.json", "--features", "answer_*", "--max-features", 2)
        assert 0 == only.exit_code
        assert {"answer"} == {feature.parsed.signal for feature in read_probe(tmp_path / "b.json").features}

    def test_a_control_writes_no_probe(self, tmp_path: Path) -> None:
        """And says why."""
        table = write_table(tmp_path / "a.parquet", make_rows(60))
        result = invoke("train", table, "-o", tmp_path / "a.json", "--shuffle-labels", "--max-features", 2)
        assert "no probe is written: the labels were exchanged" in result.stdout
        assert "(labels exchanged by chance)" in result.stdout
        assert not (tmp_path / "a.json").exists()

    def test_what_can_not_be_used(self, tmp_path: Path) -> None:
        """One line each, and a status that tells a bad probe from bad input."""
        table = write_table(tmp_path / "a.parquet", make_rows(40))
        refused("--output must end with .json", "train", table, "-o", tmp_path / "a.pkl")
        refused("name must be 1 to 64 letters", "train", table, "-o", tmp_path / "a.json", "--name", "\x1b")
        refused("no feature of", "train", table, "-o", tmp_path / "a.json", "--features", "x*")
        (tmp_path / "a.json").write_text('{"format": "other"}')
        refused("format must be glassbox-probe", "evaluate", tmp_path / "a.json", table, status=2)
        refused("must be a Parquet file", "train", tmp_path / "a.json", "-o", tmp_path / "b.json")

    @pytest.mark.parametrize("command", [("train",), ("analyze",), ("evaluate", "a.json")])
    def test_a_missing_package(self, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
        """The extra that brings it is named."""
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name))
        status = 2 if command[0] == "evaluate" else 1
        refused("pip install 'vllm-glassbox[analysis]'", *command, "a.parquet", status=status)


class TestExtract:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--layers", "0,x"), "--layers must be whole numbers with commas, got '0,x'"),
            (("--engine-arg", "max_model_len"), "--engine-arg must be NAME=VALUE, got 'max_model_len'"),
            (("--signals", "spectral,rauk"), "--signals must list names of spectral, asymmetry"),
            (("--url", "localhost:8000"), "--url must be an address of http or https, got 'localhost:8000'"),
            (("--url", "http://127.0.0.1:9"), "http://127.0.0.1:9 can't be asked"),
            (("-o", "a.csv"), "--output must end with .parquet"),
        ],
    )
    def test_options_that_make_no_sense(self, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
        """One line, before anything is loaded."""
        data = tmp_path / "a.jsonl"
        data.write_text('{"prompt": "a", "label": 1}\n')
        output = () if "-o" in options else ("-o", tmp_path / "a.parquet")
        result = invoke("extract", "--model", "m", "--data", data, *output, *options)
        assert 1 == result.exit_code
        assert message in result.stderr.splitlines()[-1]

    def test_data_that_make_no_sense(self, tmp_path: Path) -> None:
        """Which line."""
        data = tmp_path / "a.jsonl"
        data.write_text('{"prompt": "a"}\n{"label": 1}\n')
        message = "a.jsonl, line 2: a sample must have either prompt or messages"
        refused(message, "extract", "--model", "m", "--data", data, "-o", tmp_path / "a.parquet")

    def test_a_run_that_was_killed_after_its_last_sample(self, tmp_path: Path) -> None:
        """It only has to be put together: no model is loaded."""
        data = tmp_path / "a.jsonl"
        data.write_text("".join(f'{{"prompt": "a", "id": "s{i}"}}\n' for i in range(4)))
        settings = {"model": "m", "data": read_samples(data).digest, "max_tokens": 64}
        settings |= {"layers": None, "heads": None, "signals": [], "url": None}
        output = tmp_path / "a.parquet"
        with open_parts(output, settings, ORIGIN, restart=False) as parts:
            parts.add(make_rows(4))
        refused(
            "begun with another max_tokens", "extract", "--model", "m", "--data", data, "-o", output, "--max-tokens", 9
        )
        result = invoke("extract", "--model", "m", "--data", data, "-o", output)
        assert (0, f"{output}\n") == (result.exit_code, result.stdout)
        assert ["s0", "s1", "s2", "s3"] == pq.read_table(output)["id"].to_pylist()
