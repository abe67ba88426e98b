"""Options of clients over HTTP, at every API that has `vllm_xargs`: good ones are served, bad ones are told so."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.malformed_options import MALFORMED, Malformed
from tests.serving import MODEL_NAME, GlassboxServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a harbour."}]
APIS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}),
    "completions": ("/v1/completions", {"prompt": "The harbour of", "max_tokens": 1}),
    "responses": ("/v1/responses", {"input": "Name a harbour.", "max_output_tokens": 1}),
}


@pytest.fixture
def send(server: GlassboxServer) -> Iterator[Callable[..., httpx.Response]]:
    """Sends a request with such `vllm_xargs` to an API."""
    with httpx.Client(base_url=server.url, timeout=120.0) as client:

        def post(api: str, xargs: Any, **fields: Any) -> httpx.Response:
            path, body = APIS[api]
            return client.post(path, json={"model": MODEL_NAME, **body, **fields, "vllm_xargs": xargs})

        yield post


def message_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["message"])


class TestAbuse:
    def test_there_are_fifty(self) -> None:
        """Kinds, all different."""
        assert len({repr(one.xargs) for one in MALFORMED}) == len(MALFORMED) >= 50

    @pytest.mark.parametrize("api", sorted(APIS))
    def test_each_is_answered(self, server: GlassboxServer, send: Callable[..., httpx.Response], api: str) -> None:
        """With the status that is due and an error that says what is wrong; afterwards the server serves as before."""
        before = server.metric("glassbox_errors_total") or 0.0

        def wrong(one: Malformed) -> str | None:
            answer = send(api, one.xargs)
            said = message_of(answer) if answer.status_code == 400 else ""
            fine = answer.status_code == one.status and (one.says or "") in said and len(said) < 3000
            return None if fine else f"{repr(one.xargs)[:80]}: {answer.status_code} {said[:200]}"

        with ThreadPoolExecutor(8) as pool:
            assert [] == [one for one in pool.map(wrong, MALFORMED) if one is not None]
        assert server.complete("Afterwards", max_tokens=2, ignore_eos=True)
        assert before == (server.metric("glassbox_errors_total") or 0.0)

    @pytest.mark.parametrize("api", sorted(APIS))
    def test_before_a_stream_begins(self, send: Callable[..., httpx.Response], api: str) -> None:
        """A streamed answer has its status before the engine is asked: 400 all the same, not an error in the stream."""
        answer = send(api, {"glassbox": "trace", "glassbox_top_k": 99}, stream=True)
        assert 400 == answer.status_code
        assert message_of(answer).startswith("glassbox_top_k must be a whole number from 0 to 32, got 99")

    def test_messages_that_are_not_there(self, send: Callable[..., httpx.Response]) -> None:
        """Also streamed; and APIs without messages say what to send instead."""
        xargs = {"glassbox": "trace", "glassbox_spans": ["user=message:2"]}
        for stream in (False, True):
            answer = send("chat", xargs, stream=stream)
            assert 400 == answer.status_code
            assert "user must name one of the 2 messages, 0 to 1, got 2" in message_of(answer)
        for api in ("completions", "responses"):
            answer = send(api, xargs)
            assert 400 == answer.status_code
            assert "are for chat completions" in message_of(answer)

    def test_switched_off(self, server: GlassboxServer, send: Callable[..., httpx.Response]) -> None:
        """With `enabled: false` the keys mean nothing: vLLM serves the request as without glassbox."""
        server.edit_config(enabled=False)
        assert 200 == send("chat", {"glassbox": "nonsense", "glassbox_x": 1}).status_code


class TestGoodOptions:
    @pytest.mark.parametrize("api", sorted(APIS))
    @pytest.mark.parametrize("xargs", [{"glassbox": "trace", "glassbox_top_k": 4}, {"glassbox": "off"}])
    def test_they_are_served(self, send: Callable[..., httpx.Response], api: str, xargs: dict[str, Any]) -> None:
        """By each API, whole and streamed."""
        assert 200 == send(api, xargs).status_code
        streamed = send(api, xargs, stream=True)
        assert 200 == streamed.status_code
        lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
        assert [] == [line for line in lines if line != "[DONE]" and json.loads(line).get("error")]
