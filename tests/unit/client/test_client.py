"""The client of traces, against the real routes: what it is given, what it asks, what it returns, and its errors."""

import asyncio
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from glassbox.client import (
    AccessDeniedError,
    AsyncGlassboxClient,
    GlassboxClient,
    GlassboxClientError,
    NoGlassboxError,
    TraceNotFoundError,
    TraceTimeoutError,
)
from glassbox.client.references import Reference, reference_of
from glassbox.config.load import GlassboxConfig
from glassbox.core.statistics import STATISTICS
from glassbox.export.trace_tables import trace_tables
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import RequestTrace, write_trace
from glassbox.web import request_routes as routes_module
from glassbox.web.request_routes import request_routes
from tests.export_samples import make_snapshot
from tests.trace_samples import make_trace
from tests.waiting import require_within, seconds_of

pytest.importorskip("pyarrow", reason="the extra `tables`")
URL = "http://testserver/v1"
TABLES = ("tokens", "rows", "top_k", "spans", "attention")


class Server:
    """The routes over a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.requests: list[str] = []
        config = GlassboxConfig()
        self.app = Starlette(routes=request_routes(run_dir, lambda: config))
        self.http = TestClient(self.app, base_url="http://testserver")
        self.client = GlassboxClient(URL, http_client=self.http, timeout_s=60.0)

    def write(self, trace: RequestTrace) -> RequestTrace:
        write_trace(traces_path(self.run_dir), trace)
        return trace


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "run")


def answering(*replies: Response) -> GlassboxClient:
    """A client of a server that gives these replies, the last one again and again."""
    left = list(replies)

    def reply(_: Any) -> Response:
        return left.pop(0) if len(left) > 1 else left[0]

    app = Starlette(routes=[Route("/{path:path}", reply)])
    return GlassboxClient(URL, http_client=TestClient(app, base_url="http://testserver"), timeout_s=0.3)


class TestReference:
    @pytest.mark.parametrize(
        "response",
        [
            "chatcmpl-1",
            {"id": "chatcmpl-1"},
            SimpleNamespace(id="chatcmpl-1", glassbox=None),
            # The last event of a response.
            SimpleNamespace(type="response.completed", response=SimpleNamespace(id="chatcmpl-1")),
        ],
    )
    def test_an_id(self, response: Any) -> None:
        """Of whatever has one."""
        assert Reference("chatcmpl-1", 0) == reference_of(response)

    def test_a_summary(self) -> None:
        """It has vLLM's own id of each choice."""
        summary = {"choices": [{"internal_id": "0_chatcmpl-1-aa"}, {"internal_id": "1_chatcmpl-1-aa"}]}
        inside = SimpleNamespace(response=SimpleNamespace(id="resp_1", glassbox=summary))
        for response in ({"id": "chatcmpl-1", "glassbox": summary}, inside):
            assert Reference("1_chatcmpl-1-aa", 1, exact=True) == reference_of(response, 1)
            with pytest.raises(GlassboxClientError, match="choice must be from 0 to 1, got 2"):
                reference_of(response, 2)

    @pytest.mark.parametrize("response", [None, "", 7, {}, SimpleNamespace(id=None)])
    def test_nothing_with_an_id(self, response: Any) -> None:
        """Says what to give."""
        with pytest.raises(GlassboxClientError, match=r"response must have an id, got .*; give what the API's client"):
            reference_of(response)

    @pytest.mark.parametrize("choice", [-1, True, 0.5, "0"])
    def test_no_choice(self, choice: Any) -> None:
        """Says which there are."""
        with pytest.raises(GlassboxClientError, match="choice must be a whole number from 0 on, got"):
            reference_of("chatcmpl-1", choice)


class TestTrace:
    def test_its_numbers(self, server: Server) -> None:
        """The arrays bit for bit, and the signals of the document; without text, which the server doesn't show."""
        written = server.write(make_trace())
        trace = server.client.trace("cmpl-1-0")
        for name, values in written.arrays.items():
            if name != "token_ids":
                np.testing.assert_array_equal(values, trace.record.arrays[name])
        assert 0 == len(trace.record.token_ids)
        assert ("cmpl-1-0", "finished", None) == (trace.request_id, trace.status, trace.text)
        document = server.http.get("/glassbox/v1/requests/cmpl-1-0").json()
        assert (document["signals"], document["scores"]) == (trace.signals, trace.scores)
        assert trace.signals["decode_rows"] == 3

    def test_its_tables_are_those_of_capture(self, server: Server) -> None:
        """The same columns, the same numbers, made by the same code."""
        written = server.write(make_trace(token_ids=np.empty(0, dtype=np.int32)))
        offline, trace = trace_tables([[written]], "a test"), server.client.trace("cmpl-1-0")
        for name in TABLES:
            assert getattr(offline, name).equals(getattr(trace, name)), name
        assert 5 == trace.tokens.num_rows
        assert 5 * 2 * 3 == trace.rows.num_rows
        means = written.stats.astype(np.float64).mean(axis=(1, 2))
        for index, statistic in enumerate(STATISTICS):
            np.testing.assert_allclose(trace.tokens[statistic.name].to_numpy(), means[:, index], rtol=1e-12)

    def test_a_part(self, server: Server) -> None:
        """Of some layers, heads and tokens: only these are sent."""
        written = server.write(make_trace())
        trace = server.client.trace("cmpl-1-0", layers=[3], heads=[0, 2], tokens=(5, 8))
        assert ((3,), (0, 2), [5, 6, 7]) == (trace.record.layers, trace.record.heads, trace.record.positions.tolist())
        np.testing.assert_array_equal(written.stats[1:4][:, 1:2][:, :, [0, 2]], trace.record.stats)
        for line, row in enumerate((1, 2, 3)):
            np.testing.assert_array_equal(written.attention(row)[1:2][:, [0, 2]], trace.record.attention(line))
        with pytest.raises(GlassboxClientError, match=r"layers must be among those of the trace \(0, 3\), got 7"):
            server.client.trace("cmpl-1-0", layers=[7])

    def test_too_large(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """The server says what to leave out, before it sends anything."""
        monkeypatch.setattr(routes_module, "MAX_ARRAY_BYTES", 1000)
        server.write(make_trace())
        with pytest.raises(GlassboxClientError, match="the answer must have at most 0 MB, got 0; choose fewer layers"):
            server.client.trace("cmpl-1-0")

    def test_choices(self, server: Server) -> None:
        """Of two prompts with two samples each; an older request of the same id is none of them."""
        for number, (prompt, sample) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            request_id, call = f"cmpl-9-{prompt}", f"cmpl-9-{prompt}-0000000{prompt}"
            server.write(make_trace(seed=number, request_id=request_id, internal_id=f"{sample}_{call}"))
        server.write(make_trace(request_id="cmpl-9-0", internal_id="0_cmpl-9-0-000000ff", start_time_s=1.0))
        wanted = ["0_cmpl-9-0-00000000", "1_cmpl-9-0-00000000", "0_cmpl-9-1-00000001", "1_cmpl-9-1-00000001"]
        found = [server.client.trace("cmpl-9", choice) for choice in range(4)]
        assert wanted == [trace.record.internal_id for trace in found]
        assert [0, 1, 2, 3] == [trace.tokens["sample"][0].as_py() for trace in found]
        with pytest.raises(TraceNotFoundError, match="choice must be one that http://testserver has a trace of, got 4"):
            server.client.trace("cmpl-9", 4, timeout_s=0.1)

    def test_asyncio(self, server: Server) -> None:
        """The same trace."""
        server.write(make_trace())

        async def ask() -> Any:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(server.app))
            async with http, AsyncGlassboxClient(URL, http_client=http) as client:
                with pytest.raises(TraceNotFoundError):
                    await client.trace("nobody's", timeout_s=0.1)
                return await client.trace("cmpl-1-0")

        assert server.client.trace("cmpl-1-0").rows.equals(asyncio.run(ask()).rows)


class TestWaiting:
    def test_for_the_end(self, server: Server) -> None:
        """The trace may be there late, and run for a while."""
        ended = make_trace()

        def serve() -> None:
            time.sleep(0.2)
            server.write(replace(ended, status="active", end_time_s=None))
            time.sleep(0.2)
            server.write(ended)

        thread = threading.Thread(target=serve)
        thread.start()
        assert "finished" == server.client.trace("cmpl-1-0").status
        thread.join()

    def test_for_all_ranks(self, server: Server) -> None:
        """Each writes its part when its own interval is over: the trace has the heads of both."""
        now_s = time.time()
        parts = []
        for rank, heads in enumerate([(0, 1), (2, 3)]):
            place = {"rank": rank, "instance": f"i{rank}"}
            fields = {"layers": (0, 3), "head_offset": 2 * rank, "total_heads": 4, "interval_s": 60.0}
            write_snapshot(server.run_dir, make_snapshot(**place, **fields))
            parts.append(make_trace(heads=heads, start_time_s=now_s - 1, end_time_s=now_s, **place))
        server.write(parts[0])
        told = []

        def serve() -> None:
            time.sleep(0.3)
            told.extend(server.http.get("/glassbox/v1/requests").json()["requests"])
            told.append(server.http.get("/glassbox/v1/requests/cmpl-1-0").json())
            server.write(parts[1])

        thread = threading.Thread(target=serve)
        thread.start()
        trace = server.client.trace("cmpl-1-0")
        thread.join()
        assert ("finished", (0, 1, 2, 3)) == (trace.status, trace.record.heads)
        assert [("active", None, 1)] * 2 == [(one["status"], one["end_time_s"], one["awaited_ranks"]) for one in told]
        (listed,) = server.http.get("/glassbox/v1/requests").json()["requests"]
        assert ("finished", now_s, 0) == (listed["status"], listed["end_time_s"], listed["awaited_ranks"])

    def test_not_longer_than_told(self, server: Server) -> None:
        """Whether it runs or isn't there; both say what to do."""
        server.write(make_trace(status="active", end_time_s=None))

        def ask() -> None:
            with pytest.raises(TraceTimeoutError, match=r"cmpl-1-0 had not ended after 0.3 s; wait for the end"):
                server.client.trace("cmpl-1-0", timeout_s=0.3)
            with pytest.raises(TraceNotFoundError, match=r"no trace of other after 0.3 s: send the request with"):
                server.client.trace("other", timeout_s=0.3)

        require_within(5.0, lambda: seconds_of(ask))

    def test_a_server_that_is_busy(self) -> None:
        """A 503 is asked again."""
        with pytest.raises(GlassboxClientError, match="can't show it at the moment: no disk; try again"):
            answering(JSONResponse({"error": "no disk"}, 503)).trace("a")
        again = answering(JSONResponse({"error": "no disk"}, 503), JSONResponse({"error": "no such thing"}, 400))
        with pytest.raises(GlassboxClientError, match="HTTP 400: no such thing"):
            again.trace("a", timeout_s=60.0)


class TestErrors:
    @pytest.mark.parametrize(
        ("reply", "error", "message"),
        [
            (JSONResponse({"detail": "Not Found"}, 404), NoGlassboxError, "start vLLM with VLLM_PLUGINS=glassbox"),
            (JSONResponse({"error": "who?"}, 401), AccessDeniedError, "HTTP 401: who.; give the server's key"),
            (JSONResponse({"error": {"message": "no"}}, 403), AccessDeniedError, "it wants to know who asks"),
            (Response("<html>", 200), NoGlassboxError, "answers in another form"),
            (JSONResponse({}, 302, {"location": "http://elsewhere/"}), NoGlassboxError, "answers HTTP 302"),
        ],
    )
    def test_at_once(self, reply: Response, error: type[Exception], message: str) -> None:
        """What won't be another answer later is not waited for."""
        with pytest.raises(error, match=message):
            answering(reply).trace("a", timeout_s=3600.0)

    def test_another_version(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its arrays are told apart from this one's."""
        server.write(make_trace())
        monkeypatch.setattr(routes_module, "encode_trace", lambda _: b"something else")
        with pytest.raises(GlassboxClientError, match=r"can't read: .*; install the server's version of glassbox"):
            server.client.trace("cmpl-1-0")

    def test_nobody_there(self) -> None:
        """Says where it looked, and never with what is secret in the address."""
        with (
            GlassboxClient("http://me:secret@127.0.0.1:9/v1/", timeout_s=0.2) as client,
            pytest.raises(NoGlassboxError, match=r"^http://127.0.0.1:9 can't be reached: .*; is the server there"),
        ):
            client.trace("a")

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://here", "", "http://"])
    def test_addresses(self, url: str) -> None:
        """Must be of a web server."""
        with pytest.raises(GlassboxClientError, match="base_url must be an address of http or https, got"):
            GlassboxClient(url)

    def test_keys(self) -> None:
        """Must be printable, and aren't shown."""
        with pytest.raises(GlassboxClientError, match="api_key can't be sent") as raised:
            GlassboxClient(URL, "sec\nret")
        assert "sec" not in str(raised.value).replace("sent", "")

    def test_what_is_sent(self) -> None:
        """The key as a bearer token, and further headers."""
        seen: list[Any] = []

        def reply(request: Any) -> Response:
            seen.append(request.headers)
            return JSONResponse({}, 401)

        http = TestClient(Starlette(routes=[Route("/{path:path}", reply)]), base_url="http://testserver")
        with pytest.raises(AccessDeniedError):
            GlassboxClient(URL, "k1", headers={"X-Tenant": "a"}, http_client=http).trace("a")
        assert ("Bearer k1", "a") == (seen[0]["authorization"], seen[0]["x-tenant"])


class TestPlot:
    def test_tokens(self, server: Server, tmp_path: Path) -> None:
        """Whole attention: a line for each generated token, a column for each token before it but the first."""
        pytest.importorskip("matplotlib", reason="the extra `tables`")
        written = server.write(make_trace())
        figure = server.client.trace("cmpl-1-0").plot(tmp_path / "a.png")
        (image,) = figure.axes[0].images
        wanted = written.attention(2).astype(np.float64).mean(axis=(0, 1))
        np.testing.assert_allclose(image.get_array()[0].compressed(), wanted[1:], rtol=1e-6)
        assert (3, 8) == image.get_array().shape
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_places(self, server: Server) -> None:
        """Without: a statistic's mean over the generated tokens, by layer and head."""
        pytest.importorskip("matplotlib", reason="the extra `tables`")
        written = server.write(make_trace(attention=False))
        trace = server.client.trace("cmpl-1-0")
        (image,) = trace.plot(statistic="sink_ratio").axes[0].images
        index = [one.name for one in STATISTICS].index("sink_ratio")
        wanted = written.stats[2:, ..., index].astype(np.float64).mean(axis=0).T
        np.testing.assert_allclose(image.get_array(), wanted, rtol=1e-12)
        with pytest.raises(ValueError, match=r"statistic must be one of entropy_ratio, .*, got 'entropy'"):
            trace.plot(statistic="entropy")


def test_it_loads_neither_vllm_nor_torch() -> None:
    """Nor a plotting or table library, before one is needed."""
    program = "import glassbox.client, sys; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    heavy = ["vllm", "torch", "pyarrow", "matplotlib", "openai", "pandas", "sklearn", "starlette"]
    done = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert "[]" == done.stdout.strip()
