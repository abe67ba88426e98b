"""glassbox's own port: for servers whose /metrics cannot be scraped, and for the live page beside vLLM's API.

Owns the listening socket and the thread that serves it; what is served is `glassbox.web.app`.
"""

import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from starlette.applications import Starlette

ADDRESS_ENV: Final = "GLASSBOX_HTTP_ADDR"
# All interfaces, like vLLM's own port: Prometheus is rarely on the same host.
DEFAULT_ADDRESS: Final = "0.0.0.0"
_BACKLOG: Final = 128
_START_TIMEOUT_S: Final = 10.0
# A download in progress may end; streams of the live page end by themselves.
_GRACE_S: Final = 1


def bind_address(environ: Mapping[str, str] | None = None) -> str:
    """Address to listen on: $GLASSBOX_HTTP_ADDR, else all interfaces."""
    return (os.environ if environ is None else environ).get(ADDRESS_ENV) or DEFAULT_ADDRESS


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket; `address` may be a name and may be IPv6."""
    family, kind, protocol, _, place = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Not SO_REUSEPORT: a second server must fail. This lets a port be used again at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class HttpServer:
    """Serves an application over HTTP, in a thread of its own, until closed.

    Attributes:
        address: it listens on.
        port: it listens on, also if 0 (any free one) was asked for.

    Raises:
        OSError: if the port is taken, not permitted, or the address is none of this host.
        RuntimeError: if the server ended while it started.
    """

    def __init__(self, port: int, app: "Starlette", address: str = DEFAULT_ADDRESS) -> None:
        # Not at the top: an exporter without a port of its own needs none of it.
        import uvicorn

        listener = _listen(address, port)
        self.address = address
        self.port: int = listener.getsockname()[1]
        config = uvicorn.Config(
            app,
            access_log=False,
            # Whoever sends garbage to the port gets an answer, not a line in the log.
            log_config=None,
            log_level="error",
            lifespan="off",
            loop="asyncio",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        self._server = uvicorn.Server(config)
        app.state.server = self._server  # by which streams know that they have to end
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="glassbox-http", daemon=True)
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
