"""A baseline saved from a running server by its URL, named in its YAML, damaged and mended again, while it serves."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.signals.baseline import load_baseline
from tests.serving import GlassboxServer

pytestmark = pytest.mark.e2e

PSI = "glassbox_attention_drift_psi"
PROMPT = "The lighthouse keeper wrote in his book that the sea was calm and"


def edit(server: GlassboxServer, detail: str, path: Path | None) -> None:
    """Show that detail, and drift from that file."""
    server.edit_config(
        baseline={"path": None if path is None else str(path), "min_rows": 1, "window_s": 30},
        export={"interval_s": 1, "prometheus": {"detail": detail, "max_series": 200_000}},
    )


def errors(server: GlassboxServer) -> float:
    return server.metric("glassbox_errors_total", stage="baseline") or 0.0


class TestLive:
    def test_from_url_to_drift_and_back(self, server: GlassboxServer, tmp_path: Path) -> None:
        """Save at detail head, compare at detail layer; a damaged file is one error, and the requests go on."""
        path = tmp_path / "baseline.npz"
        edit(server, "head", None)
        server.complete(PROMPT, 8)
        server.wait_metric("glassbox_attention_rows_total", bool, head="8", layer="29")
        saved = CliRunner().invoke(main, ["baseline", "save", server.url, "-o", str(path)])
        assert 0 == saved.exit_code, saved.output
        baseline = load_baseline(path)
        assert (30, 9, 30) == (len(baseline.layers), baseline.num_heads, baseline.num_layers)
        assert (baseline.rows.sum(axis=(0, 1)) > 0).all()

        edit(server, "layer", path)
        server.metrics()  # an old server's recent rows are those after the first look at them
        before = errors(server)
        server.complete(PROMPT, 8)
        server.wait_metric(PSI, lambda index: index is not None, layer="29", statistic="sink_ratio", phase="decode")
        assert server.metric("glassbox_attention_drift_mean_shift", layer="29") is not None

        path.write_bytes(b"not a baseline")
        server.wait_metric(PSI, lambda index: index is None)
        assert before + 1 == errors(server)
        assert server.complete(PROMPT, 4)
        assert before + 1 == errors(server)
        log = server.log_path.read_text(errors="replace")
        assert 1 == log.count(f"baseline {path} is no file of glassbox")

        assert 0 == CliRunner().invoke(main, ["baseline", "save", str(server.run_dir), "-o", str(path)]).exit_code
        server.metrics()
        server.complete(PROMPT, 8)
        server.wait_metric(PSI, lambda index: index is not None)
        edit(server, "layer", None)
        server.wait_metric(PSI, lambda index: index is None)
        assert before + 1 == errors(server)
