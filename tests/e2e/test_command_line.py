"""`glassbox top`, `heatmap`, `report`, `diff` and `check` on a real server and on the file it writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glassbox.core.statistics import Phase
from glassbox.view.measured import exported_statistics
from glassbox.view.text import format_value
from glassbox.view.windows import read_run
from tests.serving import MODEL_NAME, GlassboxServer, wait_for

pytestmark = pytest.mark.e2e

NUM_LAYERS, NUM_HEADS = 30, 9
PROMPT = "The harbour log of that night names four ships, two of which carried timber. The first of them"


def glassbox(*args: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "glassbox.cli", *(str(arg) for arg in args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd)


def rows_of_table(text: str) -> dict[str, list[str]]:
    """Words of each line of `top`'s table, by layer."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line[:1].isdigit()}


def ask(server: GlassboxServer) -> None:
    """Some 1,400 decode rows for each layer."""
    for number in range(5):
        server.complete(f"{number + 2} sailors tell the story of {PROMPT}", max_tokens=32, ignore_eos=True)


def record(server: GlassboxServer, path: Path) -> Path:
    """What the server measured while it was asked, as a file of `export.jsonl`."""
    server.edit_config(export={"interval_s": 1, "jsonl": {"path": str(path)}})

    def told() -> int:
        ask(server)
        return len(path.read_text().splitlines()) if path.exists() else 0

    wait_for(told, lambda number: number >= 4, 180.0, "windows of all prompts")
    server.settled_rows()
    return path


class TestLayers:
    def test_top_shows_what_the_page_says(self, server: GlassboxServer) -> None:
        """The means of all layers, as computed from the page itself; model and engine in the header."""
        server.complete(PROMPT, max_tokens=16)
        server.settled_rows()
        done = glassbox("top", server.url, "--once")
        measured = server.measured()
        assert (0, "") == (done.returncode, done.stderr)
        assert f"{MODEL_NAME}  engine 0  CPU_ATTN vLLM 0.32" in done.stdout
        table = rows_of_table(done.stdout)
        assert [str(layer) for layer in range(NUM_LAYERS)] == list(table)
        for statistic in exported_statistics()[:3]:
            column = exported_statistics().index(statistic) + 2
            values = measured.typical(statistic, Phase.DECODE)[:, 0]
            assert [format_value(float(value)) for value in values] == [row[column] for row in table.values()]

    def test_a_heatmap_needs_heads(self, server: GlassboxServer, tmp_path: Path) -> None:
        """At detail layer it says which setting to change."""
        done = glassbox("heatmap", server.url, "-o", tmp_path / "a.png")
        assert (1, "", 1) == (done.returncode, done.stdout, len(done.stderr.splitlines()))
        assert "set export.prometheus.detail: head in the server's YAML" in done.stderr


class TestHeads:
    def test_pictures_report_and_comparison(
        self, server: GlassboxServer, demo_model_path: Path, tmp_path: Path
    ) -> None:
        """After following that advice: all commands work on the server, and on its file."""
        lines = tmp_path / "run.jsonl"
        prometheus = {"detail": "head", "max_series": 100_000}
        export = {"interval_s": 1, "prometheus": prometheus, "jsonl": {"path": str(lines)}}
        server.edit_config(export=export)
        checked = glassbox("check", server.config_path, "--model", demo_model_path)
        assert f"{NUM_LAYERS} layers x {NUM_HEADS} heads" in checked.stdout
        wait_for(server.measured, lambda measured: measured.detail == "head", 90.0, "detail head")

        def told() -> int:
            server.complete(PROMPT, max_tokens=8)
            return len(lines.read_text().splitlines()) if lines.exists() else 0

        wait_for(told, lambda number: number >= 3, 120.0, "three windows")
        server.settled_rows()

        # The newest rows of the page are the file's windows and what came before them.
        total, page = read_run([lines]).total, server.measured()
        assert (NUM_LAYERS, NUM_HEADS) == (len(total.layers), len(total.heads))
        assert np.all(page.rows >= total.rows)
        assert total.rows.all()

        picture = glassbox("heatmap", server.url, "-o", tmp_path / "a.png", "--statistic", "sink_ratio")
        assert (0, "") == (picture.returncode, picture.stderr)
        with Image.open(tmp_path / "a.png") as image:
            assert image.width > image.height > 300
        report = glassbox("report", lines, "-o", tmp_path / "r.html")
        assert (0, "") == (report.returncode, report.stderr)
        html = (tmp_path / "r.html").read_text()
        assert f"{NUM_LAYERS} layers x {NUM_HEADS} heads" in html
        assert 9 * 2 + 8 * 2 + 1 == html.count("<svg")

        same = glassbox("diff", lines, lines, "--json", "--fail-above", 0, "--min-rows", 1)
        document = json.loads(same.stdout)
        assert (0, 0) == (same.returncode, document["failed"])
        # Of both phases nine statistics at 270 heads; lookback_ratio has no prefill rows.
        assert (9 + 8) * NUM_LAYERS * NUM_HEADS == document["compared"]
        against = glassbox("diff", server.url, lines, "--min-rows", 1, "--limit", 3)
        assert (0, "") == (against.returncode, against.stderr)
        assert f"3 of {(8 + 7) * NUM_LAYERS * NUM_HEADS:,} comparisons shown" in against.stdout


class TestRollout:
    def test_a_wrong_rotary_base_is_found(self, server: GlassboxServer, demo_model_path: Path, tmp_path: Path) -> None:
        """The same weights with a tenth of rope_theta: status 1; the good server against itself: 0."""
        runs = [record(server, tmp_path / name) for name in ("first.jsonl", "second.jsonl")]
        limit = ("--phase", "decode", "--detail", "layer", "--fail-above", 0.25)
        same = glassbox("diff", *runs, *limit)
        assert (0, "") == (same.returncode, same.stderr), same.stdout

        model = tmp_path / "model"
        model.mkdir()
        for file in demo_model_path.iterdir():
            (model / file.name).symlink_to(file)
        config = json.loads((demo_model_path / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] /= 10
        (model / "config.json").unlink()
        (model / "config.json").write_text(json.dumps(config))
        folder = tmp_path / "wrong"
        folder.mkdir()
        with GlassboxServer(model, folder) as wrong:
            ask(wrong)
            wrong.settled_rows()
            found = glassbox("diff", runs[0], wrong.url, *limit)
        assert (1, "") == (found.returncode, found.stderr), found.stdout


class TestGone:
    def test_a_closed_port_is_one_line(self) -> None:
        """Of every command that asks a server, with its own status."""
        for command, status in ((["top"], 1), (["heatmap"], 1), (["diff", "127.0.0.1:1"], 2)):
            done = glassbox(*command, "127.0.0.1:1")
            assert (status, "", 1) == (done.returncode, done.stdout, len(done.stderr.splitlines())), command
            assert done.stderr.startswith("glassbox: can't read http://127.0.0.1:1/metrics")


class TestDoctor:
    def test_finds_this_server_and_nothing_wrong_with_it(self, server: GlassboxServer, demo_model_path: Path) -> None:
        """From its process, its run directory, its page, its door and its model; then what an edit does to it."""
        server.complete(PROMPT, max_tokens=16)
        server.settled_rows()
        done = glassbox("doctor", "--url", server.url, "--model", demo_model_path, "--json", cwd=server.folder)
        findings = json.loads(done.stdout)["findings"]
        wrong = [finding for finding in findings if finding["status"] in {"warning", "error"}]
        assert (0, []) == (done.returncode, wrong)
        seen = {finding["id"]: finding["seen"] for finding in findings if finding["status"] == "ok"}
        assert f"port {server.port}, run directory {server.run_dir}" in seen["run.servers"]
        assert seen["config.found"].startswith(str(server.config_path))
        assert f"all {NUM_LAYERS} attention layers would be observed" == seen["config.model"]
        assert f"{NUM_LAYERS} layers are observed, none is left out" == seen["server.layers"]
        told = {"vllm.import", "kernel.compiled", "run.snapshots", "server.certified", "server.sampling", "door.vllm"}
        assert told <= seen.keys()
        server.edit_config(sample_rate=0.0)
        server.wait_metric("glassbox_sample_rate", lambda rate: rate == 0)
        done = glassbox("doctor", "--url", server.url, cwd=server.folder)
        assert 1 == done.returncode
        assert "nothing is measured" in done.stdout
