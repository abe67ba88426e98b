"""Servers that answer as no server should: whoever fetches traces from them gets an error, soon, that can be shown."""

import asyncio
import socket
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from glassbox.client import AsyncGlassboxClient, GlassboxClient, GlassboxClientError, http_clients
from glassbox.core.printable import printable
from glassbox.view.asking import NO_ACCESS
from glassbox.view.measured import ViewError
from glassbox.view.samples.remote import RemoteModel
from glassbox.view.samples.samples_file import read_samples
from tests.hostile_server import HostileServer, drip, hostile, reply

NASTY = "\x1b]0;owned\x07\u202e\r"


def waiting(url: str, _: Path) -> str:
    with GlassboxClient(url, timeout_s=0.1) as client, pytest.raises(GlassboxClientError) as found:
        client.trace("cmpl-1")
    return str(found.value)


def asynchronous(url: str, _: Path) -> str:
    async def ask() -> None:
        async with AsyncGlassboxClient(url, timeout_s=0.1) as client:
            await client.trace("cmpl-1")

    with pytest.raises(GlassboxClientError) as found:
        asyncio.run(ask())
    return str(found.value)


def extracting(url: str, folder: Path) -> str:
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "Hello", "label": true}\n')
    with pytest.raises(ViewError) as found:
        RemoteModel(url, "m", NO_ACCESS, timeout_s=http_clients._ANSWER_S).rows(read_samples(data).samples)
    return str(found.value)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_clients, "_ANSWER_S", 0.5)


# Something now and then: each piece comes in time, the whole never.
HEAD = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "a body": (HEAD + b"\r\n", b" "),
    "a status": (b"HTTP/1.1 200 ", b"O"),
    "a header": (HEAD + b"X-Name: ", b"a"),
    "headers": (HEAD, b"X-Name: a\r\n"),
    "interim answers": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "the size of a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
    "headers after a body": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-Name: a\r\n"),
}


@pytest.mark.parametrize("fetch", [waiting, asynchronous, extracting])
class TestEveryWay:
    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("part", ENDLESS)
    def test_an_answer_without_an_end(self, part: str, fetch: Callable[[str, Path], str], tmp_path: Path) -> None:
        """Whichever part of it has none."""
        begin = time.monotonic()
        with hostile(drip(*ENDLESS[part])) as server:
            assert "0.5 s" in fetch(server.url, tmp_path)
            # Nor does anybody go on reading: the server hears of it.
            while [one for one in threading.enumerate() if one.name == "glassbox-client"]:
                assert time.monotonic() - begin < 20.0
                time.sleep(0.01)
        assert time.monotonic() - begin < 20.0

    @pytest.mark.parametrize("packing", ["gzip", "deflate", "br", "zstd"])
    def test_a_bomb(self, packing: str, fetch: Callable[[str, Path], str], tmp_path: Path) -> None:
        """What was not asked for is not unpacked."""
        body = zlib.compress(bytes(1 << 20), wbits=31)
        with hostile(reply(body, f"Content-Encoding: {packing}")) as server:
            assert f"answers in '{packing}', which was not asked for" in fetch(server.url, tmp_path)
            assert all("accept-encoding: identity\r\n" in head.lower() for head in server.requests)

    def test_too_much(self, fetch: Callable[[str, Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor is more taken than a trace can have."""
        for module in ("client.http_clients", "view.samples.remote"):
            monkeypatch.setattr(f"glassbox.{module}.MAX_TRACE_BYTES", 1 << 20)
        with hostile(reply(bytes(2 << 20))) as server:
            assert "answers with more than 1 MB" in fetch(server.url, tmp_path)

    @pytest.mark.parametrize(
        "body",
        [b"[" * 200_000, b'{"internal_id": ' * 50_000, b"\xff\xfe", b"", b"[1]", b'{"id": 1, "id": 2}',
         f'{{"error": "{NASTY}"}}'.encode()],
    )  # fmt: skip
    def test_no_document(self, body: bytes, fetch: Callable[[str, Path], str], tmp_path: Path) -> None:
        """What is none is said in words that can be shown, whatever the status."""
        for status in ("200 OK", "403 Forbidden", "500 Oh"):
            with hostile(reply(body, status=status)) as server:
                said = fetch(server.url, tmp_path)
            assert printable(said) == said
            assert len(said) < 1000


@pytest.mark.usefixtures("impatient")
class TestConnectionsThatWereThere:
    def test_of_a_client_that_was_given(self, tmp_path: Path) -> None:
        """One that answered well before is no more trusted than a new one."""
        answered: list[bytes] = []

        def answer(server: HostileServer, connection: socket.socket) -> None:
            connection.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
            answered.append(connection.recv(65536))
            drip(HEAD + b"X-Name: ", b"a")(server, connection)

        with hostile(answer) as server, httpx.Client() as http:
            http.get(server.url)
            begin = time.monotonic()
            with pytest.raises(GlassboxClientError, match=r"0\.5 s"):
                GlassboxClient(server.url, http_client=http, timeout_s=0.1).trace("cmpl-1")
            assert time.monotonic() - begin < 20.0
            assert b"GET /glassbox/v1/requests/cmpl-1 " in answered[0]
