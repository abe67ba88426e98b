"""Answers are made and packed where they hold up nobody: in a few threads, and in pieces."""

import asyncio
import gzip
import json
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from glassbox.export.trace_document import Selection, detail
from glassbox.web import answers
from glassbox.web.answers import encode
from glassbox.web.threads import Threads
from tests.trace_samples import make_trace


def served(app: Starlette, *accepted: str) -> list[httpx.Response]:
    """The answers to requests that come at once, with these encodings accepted."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return await asyncio.gather(*(client.get("/", headers={"Accept-Encoding": one}) for one in accepted))

    return asyncio.run(ask())


def app_of(make: Any, threads: Threads) -> Starlette:
    async def endpoint(request: Request) -> Response:
        return await threads.answer(request, make)

    return Starlette(routes=[Route("/", endpoint)])


class TestThreads:
    def test_a_few_at_once(self) -> None:
        """Others wait, and all are answered."""
        running, most, lock, three = 0, 0, threading.Lock(), threading.Event()

        def make() -> Response:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
                if most >= 3:
                    three.set()
            three.wait(20)
            time.sleep(0.02)  # for more than three to show
            with lock:
                running -= 1
            return Response(b"x")

        found = served(app_of(make, Threads(3)), *["identity"] * 20)
        assert [200] * 20 == [one.status_code for one in found]
        assert 3 == most

    def test_the_loop_packs_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A packed answer is made in another thread than the one that serves; small ones, packed ones, and those of
        whoever doesn't take it, stay."""
        packing: list[int] = []
        compress = gzip.compress

        def noted(*args: Any, **options: Any) -> bytes:
            packing.append(threading.get_ident())
            return compress(*args, **options)

        monkeypatch.setattr(gzip, "compress", noted)
        body = b"numbers " * 1000
        packed, plain = served(app_of(lambda: Response(body), Threads()), "gzip, br", "identity")
        assert (body, body) == (packed.content, plain.content)
        assert ("gzip", None) == (packed.headers.get("content-encoding"), plain.headers.get("content-encoding"))
        assert int(packed.headers["content-length"]) < len(body) == int(plain.headers["content-length"])
        assert ["Accept-Encoding"] * 2 == [packed.headers["vary"], plain.headers["vary"]]
        assert 1 == len(packing)
        assert threading.get_ident() not in packing
        (small,) = served(app_of(lambda: Response(b"x" * 1000), Threads()), "gzip")
        arrays = Response(body, headers={"Content-Encoding": "identity"})
        (marked,) = served(app_of(lambda: arrays, Threads()), "gzip")
        assert ("1000", "8000") == (small.headers["content-length"], marked.headers["content-length"])


class TestPieces:
    @pytest.mark.parametrize(
        "content",
        [None, 1, "\u00fc\u2028", [], {}, [[]], [[1], [], [{"a": []}]], [1, [2]],
         {"a": {"b": {"c": {"d": {"e": [[1.5]]}}}}}, {1: "a", "b": [True, None]}, {"\"": [{"x": 1}, 2, "3"]}],
    )  # fmt: skip
    def test_are_the_same_json(self, content: Any) -> None:
        """As the encoder makes it of the whole."""
        assert json.dumps(content, separators=(",", ":")).encode() == encode(content)

    @pytest.mark.parametrize("content", [float("nan"), {"a": [[1.0, float("inf")]]}, [{"a": float("-inf")}]])
    def test_no_number_that_json_lacks(self, content: Any) -> None:
        """Wherever it stands."""
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode(content)

    def test_of_a_large_document(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No piece is of more than a token's numbers."""
        trace = make_trace(positions=tuple(range(200)), layers=tuple(range(8)), heads=tuple(range(8)), attention=False)
        shown = {"detail": detail(trace, Selection(None, None, None))}
        sizes, dumps = [], json.dumps

        def noted(*args: Any, **options: Any) -> str:
            text = dumps(*args, **options)
            sizes.append(len(text))
            return text

        monkeypatch.setattr(answers.json, "dumps", noted)
        whole = encode(shown)
        assert max(sizes) < 8_000
        assert len(whole) > 1_000_000
        np.testing.assert_equal(json.loads(whole), shown)
