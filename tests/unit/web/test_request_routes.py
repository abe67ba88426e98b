"""The HTTP interface of traced requests: true numbers, clear errors as JSON, text only where allowed, a whole page."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from glassbox.config.load import GlassboxConfig
from glassbox.export import trace_document
from glassbox.export.trace_document import Selection, detail, document
from glassbox.store.score_files import ScoreFiles, StoredScores
from glassbox.store.tokenizer_note import write_source
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import RequestTrace, TraceOptions, write_trace
from glassbox.web import request_page
from glassbox.web.request_routes import request_routes
from tests import probe_samples
from tests.trace_samples import make_trace
from tests.unit.export.test_token_text import make_tokenizer

LIST = "/glassbox/v1/requests"


class Web:
    """The routes over a run directory, and a configuration that may change."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.settings: dict[str, Any] = {}
        self.errors: list[str] = []
        routes = request_routes(run_dir, lambda: GlassboxConfig.model_validate(self.settings), self.errors.append)
        self.client = TestClient(Starlette(routes=routes))

    def write(self, trace: RequestTrace) -> RequestTrace:
        write_trace(traces_path(self.run_dir), trace)
        return trace

    def get(self, path: str = "", code: int = 200, **parameters: Any) -> Any:
        answer = self.client.get(f"{LIST}{path}", params=parameters)
        assert code == answer.status_code, answer.text
        assert "application/json" == answer.headers["content-type"]
        assert [] == self.errors
        return json.loads(answer.text, parse_constant=pytest.fail)  # NaN is no JSON

    def page(self, path: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
        """The HTML, and the data in it."""
        answer = self.client.get(f"{LIST}{path}", params={"format": "html", **parameters})
        assert 200 == answer.status_code
        found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', answer.text, re.DOTALL)
        assert found is not None
        return answer.text, json.loads(found[1], parse_constant=pytest.fail)


@pytest.fixture
def web(tmp_path: Path) -> Web:
    return Web(tmp_path / "run")


class TestList:
    def test_no_server_yet(self, web: Web) -> None:
        """An empty list."""
        assert {"total": 0, "requests": []} == web.get()

    def test_scores(self, web: Web) -> None:
        """Of each probe, and which of them flag a request."""
        for seed in range(2):
            web.write(make_trace(seed=seed))
        probes = {
            "one": {"score": 0.9, "above": True},
            "two": {"score": 0.1, "above": False},
            "none": {"score": None, "reason": "no rows"},
        }
        ScoreFiles(web.run_dir).write(("0", "cmpl-1-0-00000001", None), StoredScores({"probes": probes, "signals": {}}))
        newer, older = web.get()["requests"]
        assert ({"one": 0.9, "two": 0.1}, ["one"]) == (newer["scores"], newer["flagged"])
        assert ({}, []) == (older["scores"], older["flagged"])

    def test_newest_first(self, web: Web) -> None:
        """With what is known of each, and how many there are."""
        for seed in range(3):
            web.write(make_trace(seed=seed, request_id=f"cmpl-{seed}-0"))
        shown = web.get(limit=2)
        assert 3 == shown["total"]
        assert ["cmpl-2-0", "cmpl-1-0"] == [one["request_id"] for one in shown["requests"]]
        assert (6, 4, 5, "finished", "opt_in") == tuple(
            shown["requests"][0][name] for name in ("prompt_len", "num_generated", "num_rows", "status", "why")
        )

    def test_filters(self, web: Web) -> None:
        """All of them must fit."""
        web.write(make_trace(seed=1, request_id="a", status="active", end_time_s=None))
        web.write(make_trace(seed=2, request_id="b", why="sampled"))
        assert ["a"] == [one["request_id"] for one in web.get(status="active")["requests"]]
        assert ["b"] == [one["request_id"] for one in web.get(status="finished", why="sampled")["requests"]]
        assert 0 == web.get(engine="7")["total"]

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"limit": "0"}, "limit must be a whole number from 1 to 1000, got '0'"),
            ({"limit": "ten"}, "limit must be a whole number from 1 to 1000, got 'ten'"),
            ({"limit": "٣"}, "limit must be a whole number"),
            ({"status": "done"}, "status must be one of active, finished, aborted, lost, got 'done'"),
            ({"why": "?"}, "why must be one of opt_in, sampled, got '?'"),
            ({"layer": "1"}, "requested_model, adapter, engine, got 'layer'; remove it"),
        ],
    )
    def test_bad_parameters(self, web: Web, parameters: dict[str, str], message: str) -> None:
        """400, and what to do instead."""
        answer = web.client.get(LIST, params=parameters)
        assert 400 == answer.status_code
        assert message in answer.json()["error"]


class TestOne:
    def test_its_document(self, web: Web) -> None:
        """By the client's id, by vLLM's, and by the id without the number of a completion's prompt."""
        trace = web.write(make_trace())
        for request_id in ("cmpl-1-0", "cmpl-1-0-00000000", "cmpl-1"):
            none = {"probes": {}, "signals": {}, "places": {}, "final": True}
            shown = {**json.loads(json.dumps(document(trace, scores=none))), "awaited_ranks": 0, "others": []}
            assert shown == web.get(f"/{request_id}")

    def test_its_scores(self, web: Web, tmp_path: Path) -> None:
        """What the exporter has left; of one that runs what there is so far, signals on demand not among it."""
        web.settings["probes"] = [{"file": str(probe_samples.write(tmp_path))}]
        options = TraceOptions(signals=("focus", "tracker"))
        trace = web.write(make_trace(options=options, status="active", end_time_s=None))
        scores = web.get("/cmpl-1-0")["scores"]
        assert not scores["final"]
        assert pytest.approx(probe_samples.score_of(trace), rel=1e-5) == scores["probes"]["drift"]["score"]
        assert "after the request has ended" in scores["signals"]["tracker"]["refused"]
        last = trace.span_mass[1]  # the row of the last prompt token
        assert pytest.approx(last[..., 0].mean(), rel=1e-5) == scores["signals"]["focus"]["values"]["mass_system"]
        assert pytest.approx(last[..., 1], rel=1e-5) == np.array(scores["places"]["focus"]["mass_user"])
        stored = StoredScores({"probes": {"drift": {"score": 0.25}}, "signals": {}}, {"tracker": {"sv1": [[1.0]]}})
        ScoreFiles(web.run_dir).write(("0", trace.internal_id, None), stored)
        scores = web.get("/cmpl-1-0")["scores"]
        assert (True, {"drift": {"score": 0.25}}) == (scores["final"], scores["probes"])
        assert {"focus", "tracker"} == scores["places"].keys()

    def test_the_id_of_a_response(self, web: Web) -> None:
        """Clients of /v1/responses don't know the number of its turn."""
        web.write(make_trace(request_id="resp_abc_0"))
        assert "resp_abc_0" == web.get("/resp_abc")["request_id"]

    def test_a_choice(self, web: Web) -> None:
        """Numbers of each token, layer and head chosen."""
        trace = web.write(make_trace())
        shown = web.get("/cmpl-1-0", layers="3", heads="2,0", tokens="5:8")
        true = detail(trace, Selection(layers=(3,), heads=(2, 0), tokens=(5, 8)))
        assert json.loads(json.dumps(true)) == shown["detail"]
        assert [0, 3] == web.get("/cmpl-1-0", layers="all")["detail"]["layers"]
        assert "detail" not in web.get("/cmpl-1-0")

    def test_samples(self, web: Web) -> None:
        """With n > 1 the first one, and the ids of the others."""
        for number in range(3):
            web.write(replace(make_trace(seed=number), internal_id=f"{number}_cmpl-1-0-abcdef00"))
        shown = web.get("/cmpl-1-0")
        others = [one["internal_id"] for one in shown["others"]]
        assert ["1", "2"] == [one[0] for one in others]
        assert others[0] == web.get(f"/{others[0]}")["internal_id"]

    def test_ids_that_clients_choose(self, web: Web) -> None:
        """Slashes, blanks and letters of any kind."""
        for seed, request_id in enumerate(["a/b c", "ré?x=1#y"]):
            web.write(make_trace(seed=seed, request_id=request_id))
            quoted = "".join(f"%{byte:02X}" for byte in request_id.encode())
            assert request_id == web.get(f"/{quoted}")["request_id"]

    @pytest.mark.parametrize("path", ["/nope", "/", "/../../etc/passwd", "/%00", "/" + "x" * 5000])
    def test_not_found(self, web: Web, path: str) -> None:
        """404 as JSON."""
        web.write(make_trace())
        answer = web.client.get(f"{LIST}{path}")
        assert answer.status_code == 404

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"layers": "1"}, "layers must be among those of the trace (0, 3), got 1; or use all"),
            ({"heads": "x"}, "heads must be all or indices such as 0,5,11, got 'x'"),
            ({"layers": ""}, "layers must be all or indices such as 0,5,11, got ''"),
            ({"tokens": "8:5"}, "tokens must be start:end with start < end, got '8:5'"),
            ({"tokens": "5"}, "tokens must be start:end"),
            ({"format": "xml"}, "format must be one of json, html, npz, got 'xml'"),
            ({"limit": "1"}, "parameters must be among layers, heads, tokens, format, got 'limit'"),
        ],
    )
    def test_bad_parameters(self, web: Web, parameters: dict[str, str], message: str) -> None:
        """400, and what to do instead; for the page as well."""
        web.write(make_trace())
        assert message in web.get("/cmpl-1-0", 400, **parameters)["error"]
        if "format" not in parameters and "tokens" not in parameters:
            assert message in web.get("/cmpl-1-0", 400, format="html", **parameters)["error"]

    def test_too_much(self, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer has a limit; the error says how many numbers there would be."""
        monkeypatch.setattr(trace_document, "MAX_NUMBERS", 100)
        web.write(make_trace(top_k=0, spans=(), attention=False))
        error = web.get("/cmpl-1-0", 400, layers="0")["error"]
        assert "the answer must have at most 100 numbers, got 150; choose fewer layers and heads" in error
        web.get("/cmpl-1-0", layers="0", tokens="0:6")

    def test_a_file_that_is_broken(self, web: Web) -> None:
        """It is as if it were not there."""
        web.write(make_trace())
        next(traces_path(web.run_dir).iterdir()).write_bytes(b"PK garbage")
        web.get("/cmpl-1-0", 404)


class TestText:
    @pytest.fixture
    def with_text(self, web: Web, tmp_path: Path) -> Web:
        pytest.importorskip("tokenizers", reason="comes with vLLM")
        write_source(web.run_dir, str(make_tokenizer(tmp_path / "model")), None)
        web.write(make_trace())
        return web

    def test_never_without_the_setting(self, with_text: Web) -> None:
        """Neither texts nor ids, though the trace holds ids."""
        assert "text" not in with_text.get("/cmpl-1-0")
        _, data = with_text.page("/cmpl-1-0")
        assert data["text"] is None

    def test_with_the_setting(self, with_text: Web) -> None:
        """One text per token, in both formats; taken away by an edit."""
        with_text.settings = {"requests": {"include_text": True}}
        text = with_text.get("/cmpl-1-0")["text"]
        assert 10 == len(text["tokens"])
        assert text["tokens"] == with_text.page("/cmpl-1-0")[1]["text"]
        with_text.settings = {}
        assert "text" not in with_text.get("/cmpl-1-0")


class TestPage:
    def decoded(self, data: dict[str, Any]) -> tuple[Any, Any]:
        shape = (len(data["positions"]), len(data["layers"]), len(data["heads"]), data["k"])
        positions = np.frombuffer(base64.b64decode(data["key_positions"]), "<u4").reshape(shape)
        masses = np.frombuffer(base64.b64decode(data["key_masses"]), "<u2").reshape(shape) / 65535
        return positions, masses

    def test_it_is_whole(self, web: Web) -> None:
        """It loads nothing: no address in it, and a policy that would forbid it."""
        web.write(make_trace())
        answer = web.client.get(f"{LIST}/cmpl-1-0", params={"format": "html"})
        assert "text/html; charset=utf-8" == answer.headers["content-type"]
        assert not re.search(r"(src|href)=|url\(|@import|fetch\(|XMLHttp", answer.text)
        policy = answer.headers["content-security-policy"]
        nonce = re.search(r"script-src 'nonce-([^']+)'", policy)
        assert policy.startswith("default-src 'none'")
        assert nonce is not None
        assert re.findall(r"<(?:script|style)[^>]*>", answer.text)
        assert all(f'nonce="{nonce[1]}"' in tag for tag in re.findall(r"<(?:script|style)[^>]*>", answer.text))
        # What is left of a template; a nonce may have two of them by chance.
        shown = answer.text.replace(nonce[1], "")
        assert "__" not in re.sub(r"<script type=.*?</script>", "", shown, flags=re.DOTALL)

    def test_its_numbers(self, web: Web) -> None:
        """Positions as in the trace, masses to 1/65535, statistics to 1/65534; the mean as it is."""
        trace = web.write(make_trace())
        _, data = web.page("/cmpl-1-0")
        positions, masses = self.decoded(data)
        assert trace.topk_positions.tolist() == positions.tolist()
        np.testing.assert_allclose(masses, trace.topk_mass, atol=1 / 65535)
        assert trace.mean_topk_positions.tolist() == data["mean"]["position"]
        entropy = np.frombuffer(base64.b64decode(data["statistics"]["entropy_ratio"]), "<u2") / 65534
        np.testing.assert_allclose(entropy.reshape(trace.stats.shape[:3]), trace.stats[..., 0], atol=1 / 65534)

    def test_from_full_rows(self, web: Web) -> None:
        """Without a top-k the rows have it."""
        trace = web.write(make_trace(top_k=0))
        positions, masses = self.decoded(web.page("/cmpl-1-0")[1])
        row = trace.attention(4)[1, 2].astype(np.float64)
        order = np.argsort(-row, kind="stable")[:8]
        assert order.tolist() == positions[4, 1, 2, : len(order)].tolist()
        np.testing.assert_allclose(masses[4, 1, 2, : len(order)], row[order], atol=1e-4)

    def test_nothing_asked_for(self, web: Web) -> None:
        """The page still has the statistics."""
        web.write(make_trace(top_k=0, attention=False, spans=()))
        assert 0 == web.page("/cmpl-1-0")[1]["k"]

    def test_a_choice(self, web: Web) -> None:
        """The page offers the layers and heads that were chosen; their mean is computed from them."""
        web.write(make_trace())
        _, data = web.page("/cmpl-1-0", layers="3", heads="0,1")
        assert ([3], [0, 1], None) == (data["layers"], data["heads"], data["mean"])

    def test_it_is_bounded(self, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
        """Layers are left out evenly, and the page says so."""
        monkeypatch.setattr(request_page, "MAX_BYTES", 3 * 5 * 3 * (6 * 2 + 2 * 2))
        web.write(make_trace(layers=tuple(range(9)), attention=False))
        _, data = web.page("/cmpl-1-0")
        assert [0, 4, 8] == data["layers"]
        assert "Only 3 of 9 layers" in data["note"]

    def test_hostile_names(self, web: Web) -> None:
        """A request's id can't end the script or become an element."""
        hostile = "</script><img src=x onerror=alert(1)>__DATA__"
        web.write(make_trace(request_id=hostile))
        quoted = "".join(f"%{byte:02X}" for byte in hostile.encode())
        text, data = web.page(f"/{quoted}")
        assert hostile == data["request_id"]
        assert "<img" not in text
