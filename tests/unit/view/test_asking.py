"""Asking a server that may be anybody's: bounded in time and size, and what it is told goes to no other."""

import base64
import gzip
import socket
from collections.abc import Callable

import pytest

from glassbox.view import asking
from glassbox.view.asking import NO_ACCESS, Access, get_text, without_user
from glassbox.view.measured import ViewError
from glassbox.view.scrape import fetch, metrics_url
from tests.export_samples import make_snapshot
from tests.hostile_server import HostileServer, drip, hostile, reply
from tests.metrics_pages import metrics_page
from tests.waiting import require_within, seconds_of

PAGE = metrics_page([make_snapshot()], "layer")
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
Answer = Callable[[HostileServer, socket.socket], None]


def problem(answer: Answer, timeout_s: float = 20.0, access: Access = NO_ACCESS) -> str:
    """What is said of such an answer; that it comes in time."""
    said: list[str] = []
    with hostile(answer) as server:

        def ask() -> None:
            with pytest.raises(ViewError) as caught:
                fetch(server.url, timeout_s, access=access)
            said.append(str(caught.value))

        require_within(timeout_s + 3, lambda: seconds_of(ask))
    text = said[-1]
    assert text.isprintable()
    assert len(text) < 1100
    return text


class TestTime:
    @pytest.mark.parametrize(
        "answer",
        [
            drip(b"HTTP/1.1 200", b"0"),
            drip(OK, b"X-More: x\r\n"),
            drip(OK + b"\r\n", b"#"),
            drip(OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"")[:10], b"\0\0\0\xff\xff"),
            drip(OK + b"Content-Length: 1000000000\r\n\r\n", b"#"),
            drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n#\r\n"),
            drip(b"", b""),
        ],
        ids=["status", "headers", "body", "packed", "length", "chunks", "nothing"],
    )
    def test_an_answer_that_never_ends(self, answer: Answer) -> None:
        """Each part comes in time, the whole never."""
        assert "did not answer within 0.6 s; is the server there?" in problem(answer, 0.6)


class TestSize:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(asking, "MAX_PAGE_BYTES", 4 << 20)

    def test_a_large_page(self) -> None:
        """More than a page can be."""
        assert "answers with more than 4 MB" in problem(reply(b"#" * (5 << 20)))

    def test_a_bomb(self) -> None:
        """Some kilobytes that unpack to a thousand times as much are given up at the limit."""
        bomb = gzip.compress(b"\0" * (64 << 20), 9)
        assert len(bomb) < 100_000
        assert "answers with more than 4 MB" in problem(reply(bomb, "Content-Encoding: gzip"))

    @pytest.mark.parametrize("packing", ["br", "zstd", "deflate", "gzip, gzip", "x" * 500])
    def test_other_packings(self, packing: str) -> None:
        """Only what was asked for is unpacked."""
        assert "which was not asked for" in problem(reply(b"abc", f"Content-Encoding: {packing}"))

    def test_damaged(self) -> None:
        """No gzip, and half of it."""
        assert "a damaged body" in problem(reply(b"no gzip", "Content-Encoding: gzip"))
        assert "half a body" in problem(reply(gzip.compress(PAGE.encode())[:100], "Content-Encoding: gzip"))

    def test_a_packed_page(self) -> None:
        """What is packed and good is read."""
        with hostile(reply(gzip.compress(PAGE.encode()), "Content-Encoding: gzip")) as server:
            assert "tiny/model" == fetch(server.url).model_name

    @pytest.mark.parametrize("data", [b"", b"\0" * 100, b"HTTP/1.1 200 OK\r\n" + b"X" * 200_000, b"SSH-2.0-x\r\n"])
    def test_no_http(self, data: bytes) -> None:
        """Something else listens there."""
        assert "can't read http://127.0.0.1:" in problem(lambda _, connection: connection.sendall(data))


class TestRedirects:
    def test_to_itself(self) -> None:
        """A server that shows its page at another path is followed, with what it wants to see."""

        def answer(server: HostileServer, connection: socket.socket) -> None:
            first = len(server.requests) == 1
            moved = reply(b"", "Location: /elsewhere", status="307 Moved")
            (moved if first else reply(PAGE.encode()))(server, connection)

        with hostile(answer) as server:
            assert "tiny/model" == fetch(server.url, access=Access.of("key")).model_name
        assert [True, True] == ["authorization: bearer key" in head.lower() for head in server.requests]
        assert server.requests[1].startswith("GET /elsewhere ")

    @pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
    def test_to_another(self, name: str) -> None:
        """Another port or host gets neither a request nor the key."""
        with hostile(reply(PAGE.encode())) as other:
            target = f"http://{name}:{other.port}/metrics"
            text = problem(reply(b"", f"Location: {target}", status="302 Found"), access=Access.of("s3cret"))
            assert f"redirects to {target}; give that URL if it is the server's" in text
        assert [] == other.requests

    @pytest.mark.parametrize(
        "target",
        [
            "file:///etc/passwd",
            "ftp://127.0.0.1/",
            "gopher://x",
            "//evil",
            "http://[",
            "http://\x1b[31m",
            "javascript:x",
        ],
    )
    def test_to_what_is_no_server(self, target: str) -> None:
        """Nothing of it is opened."""
        text = problem(reply(b"root:x:0", f"Location: {target}", status="302 Found"))
        assert "redirects to " in text or "can't read http://127.0.0.1:" in text

    def test_for_ever(self) -> None:
        """A few are enough."""
        assert "redirects more than 5 times" in problem(reply(b"", "Location: /metrics", status="302 Found"))


class TestAccess:
    def head(self, url: str = "", access: Access = NO_ACCESS) -> str:
        """The request that a server sees."""
        with hostile(reply(PAGE.encode())) as server:
            fetch(f"http://{url}127.0.0.1:{server.port}", access=access)
        return server.requests[0]

    def test_key_and_headers(self) -> None:
        """As a bearer token, and as they are."""
        head = self.head(access=Access.of("k3y", ["X-Api-Key: abc", "X-Empty:"]))
        assert "\r\nAuthorization: Bearer k3y\r\n" in head
        assert "\r\nX-Api-Key: abc\r\n" in head

    def test_a_user_in_the_url(self) -> None:
        """Basic authentication; it is in no message and in no source."""
        head = self.head("me:p%40ss@", Access.of("k3y"))
        assert f"\r\nAuthorization: Basic {base64.b64encode(b'me:p@ss').decode()}\r\n" in head
        with hostile(reply(PAGE.encode())) as server:
            found = fetch(f"http://me:s3cret@127.0.0.1:{server.port}")
        assert f"{server.url}/metrics" == found.source
        assert "http://h:1/x" == without_user("http://me:s3cret@h:1/x")
        for answer in (reply(b""), reply(b"", status="500 No"), reply(b"", "Location: http://x/", status="302 Found")):
            with hostile(answer) as server, pytest.raises(ViewError) as caught:
                fetch(f"http://me:s3cret@127.0.0.1:{server.port}")
            assert "s3cret" not in str(caught.value)

    @pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
    def test_without(self, status: str) -> None:
        """What is missing is said."""
        assert "give its key with --api-key, GLASSBOX_API_KEY or --header" in problem(reply(b"", status=status))

    @pytest.mark.parametrize("key", ["a\nb", "a\r\nX: y", "é", "a\0b"])
    def test_a_key_that_is_none(self, key: str) -> None:
        """No line of a request can be made of it; it is not shown."""
        for args in ((key, ()), (None, [f"X: {key}"])):
            with pytest.raises(ViewError) as caught:
                Access.of(*args)
            assert "é" not in str(caught.value)
        with pytest.raises(ViewError, match="got no colon"):
            Access.of(None, ["s3cret"])

    def test_is_in_no_repr(self) -> None:
        """Nor in what a traceback would show."""
        assert "k3y" not in repr(Access.of("k3y"))


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        ["file:///etc/passwd", "ftp://x", "http://a b", "http://a\nb", "http://\u202ex", "http://x:99999", "http://"],
    )
    def test_that_are_none(self, url: str) -> None:
        """Only http and https are asked."""
        with pytest.raises(ViewError, match="is no URL; give the server's"):
            metrics_url(url)

    def test_a_password_is_not_shown(self) -> None:
        """Not even of an address that is none."""
        with pytest.raises(ViewError) as caught:
            metrics_url("http://me:s3cret@x:port")
        assert "s3cret" not in str(caught.value)

    def test_nobody_there(self) -> None:
        """A port that nobody listens at; a name that nobody has."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(ViewError, match="can't read http"):
                get_text(f"http://127.0.0.1:{unused.getsockname()[1]}/metrics")
        with pytest.raises(ViewError, match="can't read http"):
            get_text("http://nobody.invalid/metrics", timeout_s=20)
