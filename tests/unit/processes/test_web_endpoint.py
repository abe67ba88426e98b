"""The endpoint plugin: glassbox's routes on vLLM's application, or none, and never an error."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Router
from starlette.testclient import TestClient

from glassbox.adapter.seat import SEAT
from glassbox.config.load import GlassboxConfig
from glassbox.processes import registration
from glassbox.processes.api_server.endpoint import GlassboxEndpoint
from glassbox.processes.api_server.shown_metrics import ShownMetrics
from glassbox.processes.registration import Registration
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import write_trace
from tests.export_samples import logged, make_snapshot
from tests.trace_samples import make_trace


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


class TestVllmsKeys:
    """vLLM's own application, middleware included, with glassbox's routes in it; no engine."""

    PATHS = ("/glassbox/v1/snapshot", "/glassbox/v1/requests", "/glassbox/v1/requests/cmpl-1-0")

    @pytest.fixture
    def client(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TestClient]:
        """Of `vllm serve` with these arguments and this $VLLM_API_KEY."""
        launchers = pytest.importorskip("vllm.entrypoints.launchers.app", reason="older vLLM builds it elsewhere")
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        write_snapshot(tmp_path, make_snapshot())
        write_trace(traces_path(tmp_path), make_trace())
        monkeypatch.setenv("VLLM_PLUGINS", "glassbox")
        show(monkeypatch, ShownMetrics(GlassboxConfig, tmp_path))

        def start(*args: str, key: str = "") -> TestClient:
            monkeypatch.setenv("VLLM_API_KEY", key)
            parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(list(args))
            return TestClient(launchers.build_app(parsed, ("generate",), None), raise_server_exceptions=False)

        return start

    @pytest.mark.parametrize(
        ("args", "key", "good", "bad"),
        [
            (("--api-key", "one", "two"), "", ("one", "two"), ("", "on", "onee", "one two", "ONE")),
            (("--api-key", "one"), "env", ("one",), ("env",)),
            ((), "env", ("env",), ("", "one")),
        ],
    )
    def test_they_open_what_they_open_of_vllm(
        self,
        client: Callable[..., TestClient],
        args: tuple[str, ...],
        key: str,
        good: tuple[str, ...],
        bad: tuple[str, ...],
    ) -> None:
        """Several keys, the variable and what comes first: glassbox's routes answer 401 when vLLM's do."""
        served = client(*args, key=key)
        for path in ("/v1/models", *self.PATHS):
            for sent in good:
                assert 401 != served.get(path, headers={"Authorization": f"Bearer {sent}"}).status_code
                assert 401 != served.get(path, headers={"Authorization": f"bearer {sent}"}).status_code
                assert 401 == served.get(path, headers={"Authorization": f"Basic {sent}"}).status_code
                assert 401 == served.get(path, params={"api_key": sent}).status_code
            for sent in bad:
                assert 401 == served.get(path, headers={"Authorization": f"Bearer {sent}"}).status_code
            assert 401 == served.get(path).status_code
        assert 401 == served.head(self.PATHS[0]).status_code
        assert "send Authorization: Bearer with vLLM's API key" in served.get(self.PATHS[1]).json()["error"]
        for path in ("/glassbox/", "/glassbox/page/main.js", "/metrics"):
            assert 200 == served.get(path).status_code

    def test_without_keys_everything_is_open(self, client: Callable[..., TestClient]) -> None:
        """As vLLM's own routes are; an empty key is none, to vLLM too."""
        for args in ((), ("--api-key", "")):
            served = client(*args)
            assert {200} == {served.get(path).status_code for path in self.PATHS}

    def test_a_root_path_leads_round_nothing(self, client: Callable[..., TestClient]) -> None:
        """With and without the prefix that a proxy adds."""
        served = client("--api-key", "one", "--root-path", "/glassbox")
        for prefix in ("", "/glassbox", "/glassbox/glassbox"):
            for path in self.PATHS:
                answer = served.get(prefix + path)
                assert answer.status_code in {401, 404}
                assert "cmpl-1" not in answer.text
        assert 200 == served.get("/glassbox" + self.PATHS[1], headers={"Authorization": "Bearer one"}).status_code


class TestUnknownKeys:
    def test_nobody_gets_in_until_they_are_known(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A vLLM whose application doesn't tell its arguments: 503, until it has told them at the start."""
        show(monkeypatch, ShownMetrics(GlassboxConfig, tmp_path))
        app, endpoint = Starlette(), GlassboxEndpoint()
        endpoint.attach_router(app)
        client = TestClient(app)
        assert 503 == client.get("/glassbox/v1/requests").status_code
        arguments = SimpleNamespace(api_key=["one"], host=None)
        asyncio.run(endpoint.init_state(None, app.state, arguments))
        assert 401 == client.get("/glassbox/v1/requests").status_code
        assert 200 == client.get("/glassbox/v1/requests", headers={"Authorization": "Bearer one"}).status_code


class TestText:
    @pytest.mark.parametrize(
        ("arguments", "shown"),
        [
            ({"host": None, "api_key": None}, False),
            ({"host": "0.0.0.0", "api_key": [""]}, False),
            ({"host": None, "api_key": ["one"]}, True),
            ({"host": "127.0.0.1", "api_key": None}, True),
            ({"host": "::1", "api_key": None}, True),
            ({"host": None, "api_key": None, "uds": "/run/vllm.sock"}, True),
        ],
    )
    def test_a_port_that_is_open_to_the_network_shows_none(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        arguments: dict[str, Any],
        shown: bool,
    ) -> None:
        """With the remedy in the log; vLLM's own answers show a client what is its own, a trace shows everybody's."""
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        # Said once in a process, and this is one process.
        monkeypatch.setattr("glassbox.core.logs._ONCE_ATTRIBUTE", f"once {arguments}")
        write_trace(traces_path(tmp_path), make_trace())
        config = GlassboxConfig.model_validate({"requests": {"include_text": True}})
        show(monkeypatch, ShownMetrics(lambda: config, tmp_path))
        app = Starlette()
        app.state.args = SimpleNamespace(**arguments)
        with caplog.at_level(logging.WARNING, "glassbox"):
            GlassboxEndpoint().attach_router(app)
        answer = TestClient(app).get("/glassbox/v1/requests/cmpl-1-0", headers={"Authorization": "Bearer one"})
        assert shown == ("text" in answer.json())
        remedy = (
            "vLLM's port shows traces without text until vllm serve has an --api-key or listens on --host 127.0.0.1"
        )
        assert shown == (not any(remedy in line for line in logged(caplog.records)))
