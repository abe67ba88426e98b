"""What tests of `glassbox doctor` share: questions, findings by id, and servers that answer as a test says."""

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from glassbox.cli.doctor.finding import Finding
from glassbox.cli.doctor.question import Question
from tests.export_samples import changed, make_snapshot
from tests.metrics_pages import metrics_page

KEY = "sesame"
Answers = Callable[[str, str | None], tuple[int, str]]


def told(findings: Iterable[Finding]) -> dict[str, Finding]:
    """By id; each at most once."""
    found = list(findings)
    by_id = {finding.id: finding for finding in found}
    assert len(found) == len(by_id), found
    return by_id


def statuses(findings: Iterable[Finding]) -> dict[str, str]:
    return {name: finding.status.value for name, finding in told(findings).items()}


def asked(**changes: Any) -> Question:
    """Of a shell without variables, by a user without servers."""
    return Question(**{"environ": {}, "servers": (), **changes})


def write_yaml(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


@contextmanager
def answering(answers: Answers, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server on loopback that answers as the function says, from path and Authorization; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name http.server asks for
            status, body = answers(self.path, self.headers["Authorization"])
            self.send_response_only(status)
            for name, value in (headers or {"Server": "uvicorn"}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=running.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@contextmanager
def sending(*parts: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """A server that sends these bytes to whoever connects, each after a pause; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    for part in parts:
                        time.sleep(pause_s)
                        connection.sendall(part)
                except OSError:  # nobody listens any more
                    pass

    thread = Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def good_page(**numbers: Any) -> str:
    """Of a server that is well but for the changes to its engine's numbers."""
    well = {"layers_bypassed": {}, "errors": {}, **numbers}
    return metrics_page([changed(make_snapshot(), **well)], "layer", of_the_moment=False)
