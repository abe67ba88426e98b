"""vLLM's /metrics with glassbox's behind its own: vLLM renders what it would without glassbox, then bytes are added.

Owns one answer: vLLM's part as it is, the page's bytes, and the line that ends OpenMetrics. The page is read in pieces
by other threads than the server's loop, which is never held longer than the sending of a piece takes. Where the page
comes from is `served_page.py`'s.
"""

import gzip
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs

from glassbox.core.logs import get_logger
from glassbox.export.page import EOF_LINE
from glassbox.processes.api_server.served_page import ServedPage
from glassbox.processes.api_server.shown_metrics import HANDED_OUT
from glassbox.store.metrics_page import Format, MetricsPage
from glassbox.web.threads import Threads

logger = get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_PATH: Final = "/metrics"
_PIECE_BYTES: Final = 1 << 17
_OWN_FAMILY: Final = b"# TYPE glassbox_"
_GZIP: Final = 16 + zlib.MAX_WBITS


class MetricsFront:
    """Middleware of the application that serves vLLM's /metrics; other requests pass.

    Args:
        app: what is behind it.
        page: what is added.
        engines: labels of the engines that are shown; None is all.
    """

    def __init__(self, app: App, page: ServedPage, engines: Callable[[], frozenset[str] | None] = lambda: None) -> None:
        self._app, self._page, self._engines = app, page, engines
        self._threads = Threads()
        self._failed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not _is_metrics(scope):
            await self._app(scope, receive, send)
            return
        token = HANDED_OUT.set(True)
        try:
            await self._answer(scope, receive, send)
        finally:
            HANDED_OUT.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        pages = await self._pages() if scope["method"] == "GET" else []
        if not pages:
            await self._app(scope, receive, send)
            return
        try:
            theirs = _Answer(send)
            await self._app({**scope, "headers": _without_dots(scope["headers"])}, receive, theirs.send)
            if theirs.is_whole:
                await self._send_both(scope, theirs, pages, send)
        finally:
            for page in pages:
                page.close()

    async def _pages(self) -> list[MetricsPage]:
        try:
            found = [await self._threads.run(self._page.current)]
            if found[0] is not None:
                found.append(await self._threads.run(self._page.fresh))
            self._failed = False
            return [page for page in found if page is not None]
        except Exception as error:
            if not self._failed:
                logger.warning("glassbox's metrics are not shown: %s: %s", type(error).__name__, error)
            self._failed = True
            return []

    async def _send_both(self, scope: Scope, theirs: "_Answer", pages: list[MetricsPage], send: Send) -> None:
        body, compressed = theirs.body, theirs.header(b"content-encoding") == b"gzip"
        if compressed:
            body = await self._threads.run(partial(gzip.decompress, theirs.body))
        format = theirs.format
        assert format is not None
        names = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("name[]", [])
        own: list[tuple[MetricsPage, int, int]] = []
        # prometheus_client's multiprocess files may still show them, until the exporter has heard of this server.
        if _OWN_FAMILY not in body:
            own = [(page, *found) for page in pages for found in page.ranges(format, self._engines(), names)]
        end = b""
        if format == "openmetrics" and body.endswith(EOF_LINE):
            body, end = body.removesuffix(EOF_LINE), EOF_LINE
        headers = [(name, value) for name, value in theirs.start["headers"] if name.lower() != b"content-length"]
        if not compressed:
            length = len(body) + sum(length for _, _, length in own) + len(end)
            headers.append((b"content-length", b"%d" % length))
        await send({**theirs.start, "headers": headers})
        packer = zlib.compressobj(6, zlib.DEFLATED, _GZIP) if compressed else None
        async for piece in self._pieces(body, own, end):
            packed = piece if packer is None else await self._threads.run(partial(packer.compress, piece))
            await send({"type": "http.response.body", "body": packed, "more_body": True})
        last = b"" if packer is None else await self._threads.run(packer.flush)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pieces(self, body: bytes, own: list[tuple[MetricsPage, int, int]], end: bytes) -> AsyncIterator[bytes]:
        yield body
        for page, start, length in own:
            at, stop = start, start + length
            while at < stop:
                piece = await self._threads.run(partial(page.read, at, min(_PIECE_BYTES, stop - at)))
                if not piece:
                    raise RuntimeError("the page of metrics has become shorter while it was read")
                at += len(piece)
                yield piece
        yield end


def _is_metrics(scope: Scope) -> bool:
    """Whether vLLM answers with metrics: it does for every path that begins so."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root).startswith(_PATH)


def _without_dots(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Asks for no names with dots, which the page hasn't: a server may choose another way of escaping names."""
    return [
        (name, value.replace(b"escaping=dots", b"escaping=underscores") if name.lower() == b"accept" else value)
        for name, value in headers
    ]


def _header(headers: list[tuple[bytes, bytes]], wanted: bytes) -> bytes:
    return b",".join(value for name, value in headers if name.lower() == wanted)


class _Answer:
    """vLLM's answer, held back if it is metrics; any other one goes on as it comes.

    Attributes:
        start: the message that begins it.
        body: so far.
        is_whole: it was held back, and is complete.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._passes = False
        self.start: Message = {}
        self.body = b""
        self.is_whole = False

    def header(self, name: bytes) -> bytes:
        """Of the answer, empty if it has none."""
        return _header(list(self.start.get("headers", ())), name).lower()

    @property
    def format(self) -> Format | None:
        """That it is in; None if it is none of metrics."""
        kind = self.header(b"content-type").split(b";")[0].strip()
        formats: dict[bytes, Format] = {b"text/plain": "text", b"application/openmetrics-text": "openmetrics"}
        return formats.get(kind)

    async def send(self, message: Message) -> None:
        """What the application sends."""
        if message["type"] == "http.response.start":
            self.start = message
            encoding = self.header(b"content-encoding")
            self._passes = message["status"] != 200 or self.format is None or encoding not in (b"", b"gzip")
        if self._passes:
            await self._send(message)
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")
            self.is_whole = not message.get("more_body", False)
