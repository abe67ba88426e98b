"""A uvicorn server that no client can fill: connections, their heads, their idle time and their reading are bounded.

Owns accepting and giving up. Uvicorn bounds the size of a head and the time between two requests; it waits for ever for
a first request, for a head that drips and for a client that doesn't read, and a TLS handshake is no connection to it.
"""

import asyncio
import contextlib
import resource
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from glassbox.web.doors import Door

# From the connection to the end of the first request's head, handshake included.
HEAD_S: Final = 10.0
# Longest wait for a client that doesn't take what it asked for.
SEND_S: Final = 30.0
# Between two requests; a scrape interval of a minute keeps its connection.
IDLE_S: Final = 75
MAX_HEAD_BYTES: Final = 16 * 1024
# Descriptors of this process that are no connections: snapshots, traces, files and targets of the other sinks.
RESERVED_DESCRIPTORS: Final = 128
_SWEEP_S: Final = 0.5
_ACCEPT_PAUSE_S: Final = 0.5
# When all places are taken: whoever has asked nothing for so long makes room, a quarter of them at a time.
_ASKS_WITHIN_S: Final = 0.05
_ROOM_PAUSE_S: Final = 0.005
_FULL: Final = b'{"error":"as many connections are served as may be (export.http.max_connections); try again later"}'
_FULL_ANSWER: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)


class BoundedProtocol(H11Protocol):
    """Uvicorn's, which knows since when it waits for its client.

    Attributes:
        head_since: when the wait for a request's head began; None while one is answered, and between two.
        stalled_since: when the client stopped to take what is sent; None while it does.
        changed: when it was last busy or began to wait.
    """

    def __init__(self, on_closed: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self._on_closed = on_closed
        self.changed = time.monotonic()
        self.head_since: float | None = self.changed
        self.stalled_since: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.busy:
            self.head_since = None
        elif self.head_since is None:
            self.head_since = time.monotonic()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.changed = time.monotonic()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled_since = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled_since = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._on_closed()

    def is_overdue(self, now: float) -> bool:
        """Whether the client has had its time."""
        if self.stalled_since is not None and now - self.stalled_since > SEND_S:
            return True
        if self.transport.is_closing():  # what is left to send isn't taken
            return now - self.changed > SEND_S
        return not self.busy and self.head_since is not None and now - self.head_since > HEAD_S


class _Connection:
    """From accepting to closing, the handshake included."""

    def __init__(self) -> None:
        self.opened = time.monotonic()
        self.protocol: BoundedProtocol | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def waits_since(self) -> float | None:
        """When the wait for a request began; None while one is answered."""
        if self.protocol is None:
            return self.opened
        return None if self.protocol.busy else self.protocol.changed

    def is_overdue(self, now: float) -> bool:
        if self.protocol is None:
            return now - self.opened > HEAD_S
        return self.protocol.is_overdue(now)

    def abort(self) -> None:
        """End it without a word."""
        if self.protocol is not None:
            self.protocol.transport.abort()
        elif self.task is not None:
            self.task.cancel()  # asyncio closes the socket of a handshake that is given up


class BoundedServer(uvicorn.Server):
    """Serves one listening socket.

    Args:
        config: of uvicorn.
        listener: its socket; closed at the end.
        door: TLS, and how many may be connected; its files are looked at again while the server runs.
        report: called with what went wrong, from the server's thread: with `full` or a file's error.
    """

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, door: Door, report: Callable[[Exception | None], None]
    ) -> None:
        super().__init__(config)
        self._listener, self._door, self._report = listener, door, report
        self._open: dict[_Connection, None] = {}
        self._own: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets=[])
        self._listener.setblocking(False)
        self._own = [asyncio.create_task(self._accept()), asyncio.create_task(self._sweep())]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and let what is in progress end."""
        for task in self._own:
            task.cancel()
        await asyncio.gather(*self._own, return_exceptions=True)
        self._listener.close()
        for connection in list(self._open):
            if connection.protocol is None:
                connection.abort()
        await super().shutdown(sockets=[])
        for connection in list(self._open):
            connection.abort()

    def _limit(self) -> int:
        """Connections at the same time: as configured, but never the descriptors that exports need."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return self._door.max_connections
        return max(min(self._door.max_connections, soft - RESERVED_DESCRIPTORS), 1)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except ConnectionError:
                continue  # gone before it was looked at
            except OSError:  # no descriptors: somebody else's, for those of this port are counted
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            if len(self._open) >= self._limit() and not await self._make_room():
                self._refuse(client)
                continue
            connection = _Connection()
            self._open[connection] = None
            connection.task = asyncio.create_task(self._serve_client(connection, client))

    async def _make_room(self) -> bool:
        """End the connections that have waited longest for a request; False if all are being answered.

        Whoever has something to ask asks at once, so they are a client's that holds connections for their own sake. In
        between the loop reads: who has asked by then isn't waiting.
        """
        self._report(None)
        while len(self._open) >= self._limit():
            waiting = [
                (since, connection) for connection in self._open if (since := connection.waits_since) is not None
            ]
            if not waiting:
                return False
            await asyncio.sleep(_ROOM_PAUSE_S)
            waiting.sort(key=lambda pair: pair[0])
            oldest_allowed = time.monotonic() - _ASKS_WITHIN_S
            for since, connection in waiting[: max(len(waiting) // 4, 1)]:
                if connection.waits_since == since <= oldest_allowed:
                    connection.abort()
                    self._open.pop(connection, None)
        return True

    def _refuse(self, client: socket.socket) -> None:
        if self._door.tls is None:
            with contextlib.suppress(OSError):
                client.send(_FULL_ANSWER)
        client.close()

    async def _serve_client(self, connection: _Connection, client: socket.socket) -> None:
        def protocol() -> BoundedProtocol:
            return BoundedProtocol(
                lambda: self._open.pop(connection, None) and None,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )

        loop, tls = asyncio.get_running_loop(), self._door.tls
        try:
            _, made = await loop.connect_accepted_socket(
                protocol, client, ssl=tls, ssl_handshake_timeout=HEAD_S if tls is not None else None
            )
            connection.protocol = made
        except (OSError, TimeoutError):  # among them ssl.SSLError: it didn't agree on a protocol, or has no certificate
            self._open.pop(connection, None)
            client.close()
        except asyncio.CancelledError:
            self._open.pop(connection, None)
            client.close()
            raise

    async def _sweep(self) -> None:
        """Give up clients that are overdue, and look whether the door's files have changed."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            for connection in list(self._open):
                if connection.is_overdue(now):
                    connection.abort()
            try:
                await asyncio.to_thread(self._door.refresh)
            except Exception as error:
                self._report(error)
