"""A node whose numbers nobody reads says so, once."""

from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.processes.worker.unread import GRACE_S, UnreadWatch
from glassbox.store.api_server_note import write_note
from tests.export_samples import logged


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    caplog.set_level("WARNING", logger="glassbox")


def config(**export: Any) -> GlassboxConfig:
    return GlassboxConfig.model_validate({"export": export})


class Node:
    """A run directory, and the watches of two of its workers."""

    def __init__(self, run_dir: Path) -> None:
        self.now_s = 100.0
        self.watches = [UnreadWatch(run_dir, lambda: self.now_s) for _ in range(2)]

    def look(self, config: GlassboxConfig, after_s: float) -> None:
        self.now_s += after_s
        for watch in self.watches:
            watch.look(config)


def test_a_headless_node_says_what_helps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After the time in which an API server would have come; one line for all workers of the node."""
    node = Node(tmp_path)
    node.look(config(), GRACE_S - 1)
    assert logged(caplog.records) == []
    node.look(config(), 2)
    node.look(config(), 1000)
    (line,) = logged(caplog.records)
    assert "reaches nobody" in line
    assert "Set export.http.port or export.otel in glassbox.yaml" in line


def test_with_an_api_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its /metrics shows what lies there."""
    node = Node(tmp_path)
    write_note(tmp_path)
    node.look(config(), GRACE_S + 1)
    assert logged(caplog.records) == []


@pytest.mark.parametrize(
    "export", [{"prometheus": {"port": 9464}}, {"otel": {"enabled": True}}, {"jsonl": {"path": "/x"}}]
)
def test_with_an_export_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture, export: dict[str, Any]) -> None:
    """Nothing is said; once that is edited away, it is."""
    node = Node(tmp_path)
    node.look(config(**export), GRACE_S + 1)
    assert logged(caplog.records) == []
    node.look(config(), 1)
    assert len(logged(caplog.records)) == 1


def test_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing is measured, nobody misses anything."""
    Node(tmp_path).look(GlassboxConfig(enabled=False), GRACE_S + 1)
    assert logged(caplog.records) == []


def test_own_port_only_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With an API server that shows nothing, and no port of glassbox's own, it is said which key is to blame."""
    node = Node(tmp_path)
    write_note(tmp_path)
    node.look(config(prometheus={"on_vllm_port": False}), GRACE_S + 1)
    (line,) = logged(caplog.records)
    assert "export.prometheus.on_vllm_port is false" in line
