"""Whose request a task works for: noted for each one, not mixed up, and taken back."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from glassbox.adapter import http_request
from glassbox.adapter.http_request import api_keys, current, note_requests

fastapi = pytest.importorskip("fastapi", reason="comes with vLLM")


@pytest.fixture(autouse=True)
def noted() -> Iterator[None]:
    undo = note_requests()
    yield
    undo()


class AuthenticationMiddleware:
    """By its name as vLLM's."""

    def __init__(self, app: Any, tokens: Any = None) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def seen() -> dict[str, Any]:
    found = current()
    assert found is not None
    return {"tenants": list(found.values("x-tenant")), "keys": list(found.api_keys or ())}


def make_app(tokens: Any = ("k",)) -> Any:
    inner = fastapi.FastAPI()
    inner.get("/inner")(seen)
    app = fastapi.FastAPI()
    app.mount("/mounted", inner)
    app.add_middleware(AuthenticationMiddleware, tokens=tokens)

    @app.get("/in-a-task")
    async def in_a_task() -> Any:
        async def later() -> Any:
            await asyncio.sleep(0)
            return seen()

        return await asyncio.create_task(later())

    @app.get("/in-a-thread")
    def in_a_thread() -> Any:
        return seen()

    @app.get("/streamed")
    async def streamed() -> Any:
        async def body() -> Any:
            yield str(seen()["tenants"])

        return fastapi.responses.StreamingResponse(body())

    @app.websocket("/socket")
    async def socket(websocket: fastapi.WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(seen())
        await websocket.close()

    return app


class TestNoting:
    @pytest.mark.parametrize("path", ["/in-a-task", "/in-a-thread", "/mounted/inner"])
    def test_wherever_it_is_asked(self, path: str) -> None:
        """In tasks and threads that the request's own started, and in an application within the application."""
        answer = TestClient(make_app()).get(path, headers=[("X-Tenant", "a"), ("x-tenant", "b")])
        assert {"tenants": ["a", "b"], "keys": ["k"]} == answer.json()

    def test_while_it_is_streamed(self) -> None:
        """The generator of an answer runs after the endpoint has returned."""
        assert "['a']" == TestClient(make_app()).get("/streamed", headers={"X-Tenant": "a"}).text

    def test_a_websocket(self) -> None:
        """By the request that opened it."""
        with TestClient(make_app()).websocket_connect("/socket", headers={"X-Tenant": "a"}) as socket:
            assert {"tenants": ["a"], "keys": ["k"]} == socket.receive_json()

    def test_one_after_the_other(self) -> None:
        """The next one on the same connection is not taken for the one before."""
        with TestClient(make_app()) as client:
            for tenants in (["a"], [], ["b"]):
                headers = [("X-Tenant", one) for one in tenants]
                assert tenants == client.get("/in-a-task", headers=headers).json()["tenants"]
        assert current() is None

    def test_taken_back(self) -> None:
        """FastAPI's own is there again."""
        undo = note_requests()
        wrapped = fastapi.FastAPI.__call__
        undo()
        assert wrapped is not fastapi.FastAPI.__call__


class TestApiKeys:
    @pytest.mark.parametrize(("tokens", "keys"), [(["a", "b"], ("a", "b")), ((), ()), (None, None), ("text", None)])
    def test_as_vllm_gives_them(self, tokens: Any, keys: Any) -> None:
        """A middleware whose keys can't be told has some."""
        assert keys == api_keys(make_app(tokens))

    def test_without(self) -> None:
        """Nobody needs one; nor is there any at what is no application of vLLM's."""
        assert () == api_keys(fastapi.FastAPI()) == api_keys(None)

    def test_vllms_own(self) -> None:
        """The installed vLLM has a middleware of that name, which takes its keys so."""
        authenticate = pytest.importorskip("vllm.entrypoints.serve.middleware.authenticate", reason="needs that vLLM")
        assert http_request._AUTHENTICATION == authenticate.AuthenticationMiddleware.__name__
        app = fastapi.FastAPI()
        app.add_middleware(authenticate.AuthenticationMiddleware, tokens=["k"])
        assert ("k",) == api_keys(app)
