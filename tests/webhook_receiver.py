"""A receiver of webhooks on loopback: real HTTP, and answers as a test wants them."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Received:
    """A request: headers in small letters, and its body."""

    headers: dict[str, str]
    body: bytes


class WebhookReceiver:
    """Listens at a free port of 127.0.0.1 until it is left.

    Attributes:
        received: all requests so far.

    Args:
        status: of the answer to the n-th request, from 0.
    """

    def __init__(self, status: Callable[[int], int] = lambda _: 200) -> None:
        self.received: list[Received] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = handler.rfile.read(int(handler.headers["content-length"]))
                with lock:
                    code = status(len(self.received))
                    self.received.append(Received({k.lower(): v for k, v in handler.headers.items()}, body))
                handler.send_response(code)
                handler.send_header("content-length", "0")
                if 300 <= code < 400:
                    handler.send_header("location", "/elsewhere")
                handler.end_headers()

            def log_message(handler, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """To post to."""
        return f"http://127.0.0.1:{self._server.server_port}/hook"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
