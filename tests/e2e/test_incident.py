"""The incident with its servers: each fault fires its alert and no other critical one, the healthy model none."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from glassbox.cli.demo.faults import FAULTS
from glassbox.cli.demo.incident import IncidentOptions, passed, run_incident
from glassbox.cli.demo.incident_report import Outcome
from tests.serving import require_tool

pytestmark = pytest.mark.e2e


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """The healthy model and all faults; nothing is left behind."""
    require_tool("prometheus", "prometheus")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    console = Console(width=140, file=io.StringIO())
    outcomes = run_incident(IncidentOptions(), console)
    assert isinstance(console.file, io.StringIO)
    print(console.file.getvalue())
    assert [] == list(tmp_path.glob("glassbox-demo-*"))
    return outcomes


def check(outcomes: list[Outcome]) -> None:
    """Who fired what."""
    healthy, *broken = outcomes
    assert {} == healthy.fired
    assert [] == [f"{fault.name}: {sorted(fault.fired)}" for fault in broken if not passed([fault])]


class TestIncident:
    @pytest.mark.timeout(1200)
    def test_every_fault(self, demo_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One server after the other; on a CPU without AVX-512 the FP8 cache is left out."""
        assert demo_model_path.is_dir()
        outcomes = run(tmp_path, monkeypatch)
        check(outcomes)
        assert len(FAULTS) + 1 == len(outcomes)
        fired = {outcome.name: outcome.fired.keys() for outcome in outcomes}
        assert {"EntropyCollapse", "Drift"} <= fired["query-weights"]
