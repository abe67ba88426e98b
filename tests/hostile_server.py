"""A server that answers as no server should: a socket, and a function that does with each connection what it likes."""

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread


class HostileServer:
    """Answers each connection by `answer`.

    Attributes:
        url: of it.
        requests: the heads of the requests, as they came.
        closing: set when the test is over; an answer that goes on for ever looks at it.
    """

    def __init__(self, answer: Callable[["HostileServer", socket.socket], None]) -> None:
        self._answer = answer
        self.requests: list[str] = []
        self.closing = Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                head = b""
                while b"\r\n\r\n" not in head and (data := connection.recv(65536)):
                    head += data
                head, _, body = head.partition(b"\r\n\r\n")
                # What is left unread would reset the connection, and the answer with it.
                length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
                while length and len(body) < int(length[1]) and (data := connection.recv(65536)):
                    body += data
                self.requests.append(f"{head.decode('latin-1')}\r\n\r\n")
                self._answer(self, connection)

    def close(self) -> None:
        """Stop answering."""
        self.closing.set()
        # Closing alone doesn't wake up who accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@contextmanager
def hostile(answer: Callable[[HostileServer, socket.socket], None]) -> Iterator[HostileServer]:
    """A `HostileServer` for the length of a block."""
    server = HostileServer(answer)
    try:
        yield server
    finally:
        server.close()


def reply(body: bytes, *headers: str, status: str = "200 OK") -> Callable[[HostileServer, socket.socket], None]:
    """An answer of these bytes, its length left unsaid."""

    def answer(_: HostileServer, connection: socket.socket) -> None:
        lines = (f"HTTP/1.1 {status}", "Content-Type: text/plain", "Connection: close", *headers)
        connection.sendall("\r\n".join((*lines, "", "")).encode("latin-1") + body)

    return answer


def drip(start: bytes, drop: bytes, pause_s: float = 0.05) -> Callable[[HostileServer, socket.socket], None]:
    """An answer that never ends: a little, then less and less."""

    def answer(server: HostileServer, connection: socket.socket) -> None:
        connection.sendall(start)
        while not server.closing.wait(pause_s):
            connection.sendall(drop)

    return answer
