"""The incident with its servers: each fault fires its alert and no other critical one, the healthy model none."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from glassbox.cli.demo.faults import FAULTS
from glassbox.cli.demo.incident import IncidentOptions, choose, passed, run_incident
from glassbox.cli.demo.incident_report import Outcome, finding
from tests.serving import require_tool

pytestmark = pytest.mark.e2e


# Three servers: one that is healthy and whose kernel then breaks, and two broken models. Of kv-scale all kinds of alert
# tell: a statistic's, the baseline's and the cache's.
SHORT = ("kv-scale", "query-weights", "broken-kernel")


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *faults: str) -> dict[str, Outcome]:
    """The healthy model and these faults, all of them if none is named; nothing is left behind."""
    require_tool("prometheus", "prometheus")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    console = Console(width=140, file=io.StringIO())
    outcomes = run_incident(IncidentOptions(choose(faults)), console)
    assert isinstance(console.file, io.StringIO)
    print(console.file.getvalue())
    assert [] == list(tmp_path.glob("glassbox-demo-*"))
    return {outcome.name: outcome for outcome in outcomes}


def check(outcomes: dict[str, Outcome]) -> None:
    """Who fired what, and that a user saw nothing where nothing is to be seen."""
    healthy, *broken = outcomes.values()
    assert {} == healthy.fired
    assert [] == [f"{fault.name}: {sorted(fault.fired)}" for fault in broken if not passed([fault])]
    assert {"EntropyCollapse", "Drift"} <= outcomes["query-weights"].fired.keys()
    if outcomes["kv-scale"].skipped is None:
        assert {"SinkLost", "Drift", "KvCacheQuantization"} <= outcomes["kv-scale"].fired.keys()
    assert "Paris" in outcomes["broken-kernel"].answer
    assert "output error, layer 12 head 4: " in str(finding(outcomes["broken-kernel"]))


class TestShort:
    @pytest.mark.timeout(900)
    def test_three_faults(self, demo_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One server after the other; on a CPU without AVX-512 the FP8 cache is left out."""
        assert demo_model_path.is_dir()
        check(run(tmp_path, monkeypatch, *SHORT))


@pytest.mark.slow
class TestLong:
    @pytest.mark.timeout(1500)
    def test_every_fault(self, demo_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that need a server of their own for the same kinds of alert, too."""
        assert demo_model_path.is_dir()
        outcomes = run(tmp_path, monkeypatch)
        check(outcomes)
        assert len(FAULTS) + 1 == len(outcomes)
        if outcomes["value-scale"].skipped is None:
            assert "Paris" in outcomes["value-scale"].answer
            assert "cache error of values, layer " in str(finding(outcomes["value-scale"]))
