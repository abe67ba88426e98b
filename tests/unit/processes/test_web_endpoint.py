"""The endpoint plugin: glassbox's routes on vLLM's application, or none, and never an error."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.routing import Router

from glassbox.adapter.seat import SEAT
from glassbox.config.load import GlassboxConfig
from glassbox.processes import registration
from glassbox.processes.api_server.endpoint import GlassboxEndpoint
from glassbox.processes.api_server.shown_metrics import ShownMetrics
from glassbox.processes.registration import Registration
from tests.export_samples import logged


@pytest.fixture
def app() -> Any:
    """As much of FastAPI's application as is needed."""
    return SimpleNamespace(router=Router())


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has called register() before it loads endpoint plugins."""
    monkeypatch.setattr(registration, "register", lambda: None)


def show(monkeypatch: pytest.MonkeyPatch, shown: ShownMetrics | None) -> None:
    """Let this process be one in which glassbox shows that."""
    found = Registration()
    found.shown = shown
    monkeypatch.setattr(SEAT, "registration", found)


def paths(app: Any) -> list[str]:
    return [route.path for route in app.router.routes]


class TestEndpoint:
    def test_its_routes_are_added(self, app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All below /glassbox, and no second /metrics."""
        show(monkeypatch, ShownMetrics(GlassboxConfig, tmp_path))
        GlassboxEndpoint().attach_router(app)
        assert {"/glassbox/", "/glassbox/v1/snapshot", "/glassbox/v1/stream"} <= set(paths(app))
        assert all(path.startswith("/glassbox") for path in paths(app))

    def test_a_server_that_is_not_observed_gets_none(self, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """GLASSBOX_DISABLE, or a vLLM that is not supported."""
        show(monkeypatch, None)
        GlassboxEndpoint().attach_router(app)
        assert [] == paths(app)

    def test_an_error_does_not_end_vllm(
        self, app: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is logged, and the server goes on without the routes."""

        def fail() -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(registration, "registered", fail)
        with caplog.at_level(logging.ERROR, "glassbox"):
            GlassboxEndpoint().attach_router(app)
        assert [] == paths(app)
        assert ["glassbox's routes could not be added; the server goes on without"] == logged(caplog.records)

    def test_the_name_is_the_one_of_the_general_plugin(self) -> None:
        """VLLM_PLUGINS=glassbox must not load the one and shut out the other."""
        assert "glassbox" == GlassboxEndpoint.name
        text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
        for group in ("general_plugins", "endpoint_plugins"):
            (line,) = text.split(f'"vllm.{group}"]\n')[1].splitlines()[:1]
            assert line.startswith("glassbox = ")
