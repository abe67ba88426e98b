"""glassbox's own port: for servers whose /metrics cannot be scraped, and for the live page beside vLLM's API.

Owns the listening socket and the thread that serves it; what is served is `glassbox.web.app`, who gets in
`glassbox.web.doors`.
"""

import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from glassbox.config.model import LOOPBACK, HttpConfig
from glassbox.web.address import listen
from glassbox.web.doors import Door

if TYPE_CHECKING:
    from starlette.applications import Starlette

_START_TIMEOUT_S: Final = 10.0
# A download in progress may end; streams of the live page end by themselves.
_GRACE_S: Final = 1


class HttpServer:
    """Serves an application over HTTP, in a thread of its own, until closed.

    Attributes:
        host: it listens on.
        port: it listens on, also if 0 (any free one) was asked for.
        door: TLS, and how many may be connected. Who gets in is the application's to ask.

    Args:
        port: to listen on.
        app: what is served.
        host: address or name, see `listen`.
        door: default: the one of a configuration that says nothing.
        report: called from the server's thread if as many are connected as may be (None), or with the error of a
            file of the door.
        key: of the setting that named the host, for errors.

    Raises:
        AddressError: if the port is taken, not permitted, or the address is none of this host.
        RuntimeError: if the server ended while it started.
    """

    def __init__(
        self,
        port: int,
        app: "Starlette",
        host: str = LOOPBACK,
        door: Door | None = None,
        report: Callable[[Exception | None], None] = lambda _: None,
        key: str = "export.http.host",
    ) -> None:
        # Not at the top: an exporter without a port of its own needs none of it.
        import uvicorn

        from glassbox.processes.exporter.bounded_server import IDLE_S, MAX_HEAD_BYTES, BoundedServer

        listener = listen(host, port, key)
        self.host = host
        self.port: int = listener.getsockname()[1]
        self.door = Door(HttpConfig(), host) if door is None else door
        config = uvicorn.Config(
            app,
            access_log=False,
            # Whoever sends garbage to the port gets an answer, not a line in the log.
            log_config=None,
            log_level="error",
            lifespan="off",
            loop="asyncio",
            http="h11",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ws="none",
            server_header=False,
            # Not from X-Forwarded-*: anybody could say so.
            proxy_headers=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
        self._server = BoundedServer(config, listener, self.door, report)
        app.state.server = self._server  # by which streams know that they have to end
        self._thread = threading.Thread(target=self._server.run, name="glassbox-http", daemon=True)
        self._thread.start()
        self._wait_until_started(listener)

    def _wait_until_started(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._server.should_exit = True
                listener.close()
                raise RuntimeError(f"the HTTP server did not start within {_START_TIMEOUT_S:g} s")
            time.sleep(0.005)

    @property
    def is_alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop listening and end the thread; requests in progress have a second to end."""
        self._server.should_exit = True
        self._thread.join()
