"""The incident with its servers: each fault fires its alert and no other critical one, the healthy model none."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from glassbox.demo.faults import FAULTS
from glassbox.demo.incident import IncidentOptions, choose, passed, run_incident
from glassbox.demo.incident_report import Outcome
from tests.serving import require_tool

pytestmark = pytest.mark.e2e


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Outcome]:
    """The faults of these names (all if there is none), with the healthy model first; nothing is left behind."""
    require_tool("prometheus", "prometheus")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    console = Console(width=140, file=io.StringIO())
    outcomes = run_incident(IncidentOptions(choose(names)), console)
    assert isinstance(console.file, io.StringIO)
    print(console.file.getvalue())
    assert [] == list(tmp_path.glob("glassbox-demo-*"))
    return outcomes


def check(outcomes: list[Outcome]) -> None:
    """Who fired what."""
    healthy, *broken = outcomes
    assert {} == healthy.fired
    assert [] == [f"{fault.name}: {sorted(fault.fired)}" for fault in broken if not passed([fault])]


class TestShort:
    @pytest.mark.timeout(600)
    def test_scaled_query_weights(self, demo_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One layer's broken weights fire EntropyCollapse, though it still answers; the healthy model is silent."""
        assert demo_model_path.is_dir()
        outcomes = run(tmp_path, monkeypatch, "query-weights")
        check(outcomes)
        # The layers above see what the broken one made of its input, so Drift tells as well.
        assert {"EntropyCollapse", "Drift"} <= outcomes[1].fired.keys()


@pytest.mark.slow
class TestLong:
    @pytest.mark.timeout(1200)
    def test_every_fault(self, demo_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All of them, one server after the other; on a CPU without AVX-512 the FP8 cache is left out."""
        assert demo_model_path.is_dir()
        outcomes = run(tmp_path, monkeypatch)
        check(outcomes)
        assert len(FAULTS) + 1 == len(outcomes)
