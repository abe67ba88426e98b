"""The clients: one that waits, and one for asyncio.

Owns sending, and what is sent along. What is asked and what answers mean is `fetching.py`'s.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx

from glassbox.client.bounded import Connection, within
from glassbox.client.failures import GlassboxClientError, NoGlassboxError
from glassbox.client.fetching import Answer, Ask, Part, Steps, steps
from glassbox.client.received import Trace
from glassbox.client.references import reference_of
from glassbox.view.asking import MAX_TRACE_BYTES, UNPACKED, Access, check_unpacked, content_of, without_user
from glassbox.view.measured import ViewError

TIMEOUT_S: Final = 30.0
_SILENCE_S: Final = 10.0
# All of an answer: 64 MB from far away take their time, and a server that sends a byte now and then has no end.
_ANSWER_S: Final = 120.0
_API: Final = "/v1"


class _Server:
    """An address, and what is sent along to it."""

    def __init__(self, base_url: str, api_key: str | None, headers: Mapping[str, str] | None, timeout_s: float) -> None:
        url = str(base_url).rstrip("/").removesuffix(_API)
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise GlassboxClientError(
                f"base_url must be an address of http or https, got {without_user(url)!r}; write such as "
                "http://localhost:8000"
            )
        if not timeout_s > 0:
            raise GlassboxClientError(f"timeout_s must be above 0, got {timeout_s!r}; use {TIMEOUT_S:g}")
        try:
            sent = Access.of(api_key).headers
        except ViewError as error:
            raise GlassboxClientError(f"api_key can't be sent: {error}") from None
        self.url, self.shown, self.timeout_s = url, without_user(url), timeout_s
        self.headers = {**UNPACKED, **sent, **(headers or {})}

    def steps(self, response: Any, choice: int, part: Part, timeout_s: float | None) -> Steps:
        wanted = reference_of(response, choice)
        return steps(self.shown, wanted, part, self.timeout_s if timeout_s is None else timeout_s, time.monotonic)

    def arguments(self, ask: Ask) -> dict[str, Any]:
        """Of httpx's `stream`."""
        return {
            "method": "GET",
            "url": self.url + ask.path,
            "params": dict(ask.parameters),
            "headers": self.headers,
            "timeout": _SILENCE_S,
            # What is sent along is for this server alone.
            "follow_redirects": False,
        }

    def check_head(self, headers: Mapping[str, str]) -> None:
        try:
            check_unpacked(self.shown, headers)
        except ViewError as error:
            raise NoGlassboxError(str(error)) from None

    def too_slow(self) -> NoGlassboxError:
        return NoGlassboxError(
            f"{self.shown} had not sent all of an answer after {_ANSWER_S:g} s; is that the server's address?"
        )

    def too_large(self) -> NoGlassboxError:
        return NoGlassboxError(
            f"{self.shown} answers with more than {MAX_TRACE_BYTES >> 20} MB; is that the server's address?"
        )


class GlassboxClient:
    """Traces of a server's requests.

    Args:
        base_url: of the server, as other clients have it: with `/v1` or without. vLLM's, if it was started with
            VLLM_PLUGINS=glassbox, or that of glassbox's own port.
        api_key: vLLM's, or a token of glassbox's own port; None: none is sent.
        timeout_s: how long to wait for a trace to be there and to have ended.
        headers: further ones of each request, such as a gateway's.
        http_client: that sends; None: one of its own, which `close` closes.

    Raises:
        GlassboxClientError: an argument breaks its rule.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
        http_client: httpx.Client | None = None,
    ) -> None:
        self._server = _Server(base_url, api_key, headers, timeout_s)
        self._own = http_client is None
        # A connection for each answer: which one is used again isn't told before the answer begins.
        once = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(limits=once) if http_client is None else http_client

    def trace(
        self,
        response: Any,
        choice: int = 0,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        tokens: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Trace:
        """The trace of a request that has been answered; waits until it has ended.

        Args:
            response: what the API's client returned, whole or the last chunk; or the id.
            choice: which of its choices (`n` above 1, several prompts, turns).
            layers, heads: global indices, of which alone numbers are fetched; None is all.
            tokens: positions, end exclusive, likewise.
            timeout_s: instead of the client's.

        Raises:
            GlassboxClientError: it can't be had; `failures.py` has a class for each reason.
        """
        way = self._server.steps(response, choice, Part(layers, heads, tokens), timeout_s)
        answer = None
        while True:
            try:
                step = way.send(answer)
            except StopIteration as end:
                trace: Trace = end.value
                return trace
            if isinstance(step, Ask):
                answer = self._ask(step)
            else:
                answer = None
                time.sleep(step)

    def _ask(self, ask: Ask) -> Answer:
        try:
            return within(_ANSWER_S, lambda connection: self._read(ask, connection))
        except TimeoutError:
            raise self._server.too_slow() from None
        except httpx.HTTPError as error:
            return _failed(error)

    def _read(self, ask: Ask, connection: Connection) -> Answer:
        with self._http.stream(**self._server.arguments(ask), extensions={"trace": connection}) as reply:
            connection.use(reply.extensions.get("network_stream"))  # of a client that was given it may be an older one
            self._server.check_head(reply.headers)
            content = bytearray()
            for chunk in reply.iter_bytes():
                content += chunk
                if len(content) > MAX_TRACE_BYTES:
                    raise self._server.too_large()
            return Answer(reply.status_code, bytes(content))

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncGlassboxClient:
    """The same for asyncio; arguments and errors are those of `GlassboxClient`."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        self._server = _Server(base_url, api_key, headers, timeout_s)
        self._own = http_client is None
        self._http = httpx.AsyncClient() if http_client is None else http_client

    async def trace(
        self,
        response: Any,
        choice: int = 0,
        *,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        tokens: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Trace:
        """See `GlassboxClient.trace`."""
        way = self._server.steps(response, choice, Part(layers, heads, tokens), timeout_s)
        answer = None
        while True:
            try:
                step = way.send(answer)
            except StopIteration as end:
                trace: Trace = end.value
                return trace
            if isinstance(step, Ask):
                answer = await self._ask(step)
            else:
                answer = None
                await asyncio.sleep(step)

    async def _ask(self, ask: Ask) -> Answer:
        try:
            async with asyncio.timeout(_ANSWER_S), self._http.stream(**self._server.arguments(ask)) as reply:
                self._server.check_head(reply.headers)
                content = await content_of(reply, MAX_TRACE_BYTES)
                if content is None:
                    raise self._server.too_large()
                return Answer(reply.status_code, content)
        except TimeoutError:
            raise self._server.too_slow() from None
        except httpx.HTTPError as error:
            return _failed(error)

    async def close(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()


def _failed(error: httpx.HTTPError) -> Answer:
    return Answer(0, (str(error) or type(error).__name__).encode())
