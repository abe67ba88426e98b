"""Two tenants and somebody without a name at one server: from the header of a request to what each of them is shown.

vLLM's engine is left out; its application, its middleware for API keys and glassbox's worker are the real ones.
"""

import json
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from glassbox.adapter import http_request
from glassbox.adapter.runner import RequestTokens
from glassbox.adapter.server import Wrappers
from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.trace_arrays import without_values
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import PrometheusCollector
from glassbox.measure.deferred import DeferredActions
from glassbox.measure.sampling import is_sampled_request
from glassbox.processes.api_server.intake import Intake
from glassbox.processes.worker.traces.active import Chunk
from glassbox.processes.worker.traces.tracker import RequestTracker
from glassbox.processes.worker.traces.writer import TraceWriter
from glassbox.store import trace_directory
from glassbox.store.acts import Act, Acts
from glassbox.store.score_files import ScoreFiles, StoredScores
from glassbox.store.snapshot import write_snapshot
from glassbox.store.tokenizer_note import write_source
from glassbox.store.trace_directory import TraceDirectory, traces_path
from glassbox.store.trace_record import decode_trace, write_trace
from glassbox.web.app import make_app, make_routes
from tests.export_samples import logged, make_snapshot
from tests.route_table import left_out
from tests.trace_samples import make_host, make_trace, new_request, scheduled_step, with_arrays_of_signals
from tests.unit.export.test_token_text import make_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="comes with vLLM")
fastapi = pytest.importorskip("fastapi", reason="comes with vLLM")
authenticate = pytest.importorskip(
    "vllm.entrypoints.serve.middleware.authenticate", reason="needs a vLLM with that middleware"
)

LIST = "/glassbox/v1/requests"
KEYS = ["key-of-alice", "key-of-bob"]
LAYERS = frozenset({0, 1})
TEXT = "the secret of a tenant"
# How each of them tells who it is, by what is asked for; nobody doesn't.
BY_KEY = {
    "alice": {"Authorization": "Bearer key-of-alice"},
    "bob": {"Authorization": "Bearer key-of-bob"},
    "nobody": {},
}
BY_HEADER = {"alice": {"X-Tenant": "alice"}, "bob": {"X-Tenant": "bob"}, "nobody": {}}


class EndsAfterAFrame:
    """What runs the application, and stops between a stream's first frame and its second."""

    def __init__(self) -> None:
        self._asked = 0

    @property
    def should_exit(self) -> bool:
        """A stream asks before each frame."""
        self._asked += 1
        return self._asked % 2 == 0


class Worker:
    """Traces every request at once and wholly: two rows of it, and its tokens."""

    def __init__(self, run_dir: Path, config: Any) -> None:
        self._config = config
        self.now_s = 0.0
        errors = ErrorCounter(logging.getLogger("test"))
        self.tracker = RequestTracker(make_host(), DeferredActions(errors), clock=lambda: self.now_s)
        self.writer = TraceWriter(run_dir, make_host(), self.tracker)

    def serve(self, internal_id: str, extra_args: dict[str, Any], tokens: list[int]) -> None:
        arrives = scheduled_step([new_request(internal_id, 5, extra_args)], {internal_id: 5})
        self.tracker.begin_step(None, arrives, self._config(), LAYERS)
        for trace in self.tracker.active():
            arrays = without_values({"token": 1, "layer": 2, "head": 2, "top_k": 0, "span": 0})
            arrays["positions"][:], arrays["phases"][:], arrays["stats"][:] = 5, 1, 0.5
            trace.append(Chunk(arrays))
            trace.tokens = RequestTokens(tokens, [], None)
        self.tracker.begin_step(None, scheduled_step(finished_req_ids={internal_id}), self._config(), LAYERS)
        self.writer.write(self._config().requests)


class Server:
    """A server of vLLM's with glassbox in it, and glassbox's own port.

    Args:
        keys: of `--api-key`.
    """

    def __init__(self, folder: Path, keys: list[str], **requests: Any) -> None:
        self.run_dir, self.settings = folder / "run", {"requests": requests}
        self.guarded = True
        self.worker = Worker(self.run_dir, self.config)
        self._intake = Intake(self.config, self.run_dir)
        app = fastapi.FastAPI()
        app.post("/v1/completions")(self._complete)
        app.post("/invocations")(self._complete)  # vLLM's middleware guards some paths only
        source = FamilySource(self.run_dir, self.config)
        app.state.server = EndsAfterAFrame()
        self.routes = make_routes(source)
        app.router.routes.extend(self.routes)
        if keys:
            app.add_middleware(authenticate.AuthenticationMiddleware, tokens=keys)
        self.port = TestClient(app, follow_redirects=False)
        own = make_app(source, metrics=[PrometheusCollector(source)], is_guarded=lambda: self.guarded)
        self.own_port = TestClient(own, follow_redirects=False)
        model = make_tokenizer(folder / "model")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        write_source(self.run_dir, str(model), None)
        write_snapshot(self.run_dir, make_snapshot(heads=2))

    def config(self) -> GlassboxConfig:
        return GlassboxConfig.model_validate(self.settings)

    async def _complete(self, request: fastapi.Request) -> dict[str, str]:
        external = f"cmpl-{request.headers.get('X-Request-Id', secrets.token_hex(8))}-0"
        body = await request.json()

        def process_inputs(_: Any, request_id: str, prompt: Any, params: Any) -> Any:
            return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=params.extra_args, n=1))

        processor = SimpleNamespace(vllm_config=None)
        params = SimpleNamespace(extra_args=body["vllm_xargs"])
        admitted = Wrappers(self._intake).process_inputs(process_inputs)(processor, external, {}, params)
        tokens = self.tokenizer.encode(body["prompt"]).ids
        self.worker.serve(f"{external}-{secrets.token_hex(4)}", admitted.sampling_params.extra_args, tokens)
        return {"id": external.removesuffix("-0")}

    def ask(
        self, headers: dict[str, str], request_id: str | None = None, path: str = "/v1/completions", **xargs: Any
    ) -> str:
        """Send a request to be traced; returns its id."""
        named = headers if request_id is None else {**headers, "X-Request-Id": request_id}
        body = {"vllm_xargs": {"glassbox": "trace", **xargs}, "prompt": TEXT}
        answer = self.port.post(path, headers=named, json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def listed(self, headers: dict[str, str], code: int = 200) -> Any:
        answer = self.port.get(LIST, headers=headers)
        assert answer.status_code == code, answer.text
        return answer.json() if code != 200 else [one["request_id"] for one in answer.json()["requests"]]

    def get(self, request_id: str, headers: dict[str, str], code: int = 200, **parameters: str) -> httpx.Response:
        answer = self.port.get(f"{LIST}/{request_id}", headers=headers, params=parameters)
        assert answer.status_code == code, answer.text
        return answer


@pytest.fixture(autouse=True)
def noted() -> Iterator[None]:
    """Requests are noted as in an API server."""
    undo = http_request.note_requests()
    yield
    undo()


@pytest.fixture(params=["key", "header"])
def door(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Server, dict[str, dict[str, str]], dict[str, str]]:
    """A server that isolates, how each of them tells who it is there, and the ids of their requests."""
    requests: dict[str, Any] = {"isolate": True, "include_text": True}
    if request.param == "header":
        server, who = Server(tmp_path, [], client_header="x-tenant", **requests), BY_HEADER
    else:
        server, who = Server(tmp_path, KEYS, **requests), BY_KEY
    return server, who, {name: server.ask(headers, path="/invocations") for name, headers in who.items()}


# What each of them is answered at vLLM's port. `mine` is the asker's own request, `theirs` each of the others'.
TABLE = [
    ("/glassbox", 307, 307),
    ("/glassbox/", 200, 200),
    ("/glassbox/page/main.js", 200, 200),
    ("/glassbox/v1/snapshot", 200, 200),
    ("/glassbox/v1/stream", 200, 200),
    ("/glassbox/v1/stream?window=total&statistic=max_logit", 200, 200),
    (LIST, 200, 403),
    (f"{LIST}?limit=1", 200, 403),
    (f"{LIST}/mine", 200, 403),
    (f"{LIST}/mine?layers=0", 200, 403),
    (f"{LIST}/mine?format=html", 200, 403),
    (f"{LIST}/mine?format=npz", 200, 403),
    (f"{LIST}/theirs", 404, 403),
    (f"{LIST}/theirs?layers=0", 404, 403),
    (f"{LIST}/theirs?format=html", 404, 403),
    (f"{LIST}/theirs?format=npz", 404, 403),
    (f"{LIST}/theirs-internal", 404, 403),
    (f"{LIST}/theirs-internal?format=npz", 404, 403),
    (f"{LIST}/missing", 404, 403),
]


class TestWhoGetsWhat:
    def paths(self, server: Server, path: str, mine: str, theirs: list[str]) -> list[str]:
        internal = [one.internal_id for one in TraceDirectory(server.run_dir).summaries() if mine not in one.request_id]
        if "theirs-internal" in path:
            return [path.replace("theirs-internal", one) for one in internal]
        return [path.replace("theirs", one) for one in theirs] if "theirs" in path else [path.replace("mine", mine)]

    @pytest.mark.parametrize(("path", "of_tenants", "of_nobody"), TABLE)
    def test_every_route(self, door: Any, path: str, of_tenants: int, of_nobody: int) -> None:
        """A tenant gets its own; whoever can't be told from others gets no traces. No other method does anything."""
        server, who, ids = door
        for name, headers in who.items():
            expected = of_nobody if name == "nobody" else of_tenants
            others = [request_id for other, request_id in ids.items() if other != name]
            for shown in self.paths(server, path, ids[name], others):
                answer = server.port.get(shown, headers=headers)
                assert answer.status_code == expected, (name, shown)
                assert ("event: frame" in answer.text) == ("/stream" in path)
                assert server.port.head(shown, headers=headers).status_code == expected
                for method in ("POST", "PUT", "PATCH", "DELETE"):
                    assert server.port.request(method, shown, headers=headers).status_code == 405
                body = answer.text.replace(shown.partition("?")[0].removeprefix(f"{LIST}/"), "")
                assert not [request_id for request_id in others if request_id in body], (name, shown)

    def test_no_route_is_left_out(self, tmp_path: Path) -> None:
        """A new one needs its line, and who may see what of it."""
        assert [] == left_out(Server(tmp_path, KEYS).routes, (path for path, *_ in TABLE))

    def test_lists_are_apart(self, door: Any) -> None:
        """Each tenant's holds its own request."""
        server, who, ids = door
        for name in ("alice", "bob"):
            assert [f"{ids[name]}-0"] == server.listed(who[name])

    def test_anothers_is_as_a_missing_one(self, door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same answer but for the id, and no file is read that would take longer."""
        server, who, ids = door
        read: list[Path] = []
        for name in ("read_header", "read_trace"):
            monkeypatch.setattr(trace_directory, name, read.append)
        theirs, missing = (server.get(one, who["bob"], 404).json()["error"] for one in (ids["alice"], "cmpl-missing"))
        assert theirs.replace(ids["alice"], "*") == missing.replace("cmpl-missing", "*")
        assert [] == read

    def test_text_is_the_clients_own(self, door: Any) -> None:
        """It reads its own prompt; an operator sees everybody's numbers and nobody's prompt."""
        server, who, ids = door
        (own_json, own_html) = (server.get(ids["alice"], who["alice"], format=form) for form in ("json", "html"))
        assert TEXT == "".join(own_json.json()["text"]["tokens"])
        assert json.dumps(own_json.json()["text"]["tokens"], separators=(",", ":")) in own_html.text
        listed = server.own_port.get(LIST).json()
        assert sorted(f"{one}-0" for one in ids.values()) == sorted(one["request_id"] for one in listed["requests"])
        assert 3 == len({one["client"] for one in listed["requests"]})
        for request_id in ids.values():
            shown = server.own_port.get(f"{LIST}/{request_id}")
            assert shown.status_code == 200
            assert "text" not in shown.json()

    def test_an_operator_reads_no_text_in_arrays(self, door: Any) -> None:
        """Neither tokens nor queries and keys, of which whoever has the model can make them; the client has its own."""
        server, who, ids = door
        client = server.get(ids["alice"], who["alice"]).json()["client"]
        trace = with_arrays_of_signals(make_trace(request_id="vectors", client=client))
        write_trace(traces_path(server.run_dir), trace)
        own = decode_trace(server.get("vectors", who["alice"], format="npz").content, "own")
        assert 4 == own.keys.shape[-1] == own.queries.shape[-1]
        assert len(own.token_ids)
        shown = decode_trace(server.own_port.get(f"{LIST}/vectors", params={"format": "npz"}).content, "operator's")
        assert (0, 0, 0) == (shown.keys.size, shown.queries.size, len(shown.token_ids))
        np.testing.assert_array_equal(trace.received, shown.received)

    def test_an_own_port_that_lets_everybody_in(self, door: Any) -> None:
        """Whoever asks there may be a client: it shows metrics, and no traces."""
        server, _, ids = door
        server.guarded = False
        for path in (LIST, f"{LIST}/{ids['alice']}", f"{LIST}/{ids['alice']}?format=html", f"{LIST}/missing"):
            answer = server.own_port.get(path, headers=BY_KEY["alice"])
            assert answer.status_code == 403
            assert "set credentials for it" in answer.json()["error"]
        metrics = server.own_port.get("/metrics", headers={"Accept": "application/openmetrics-text"})
        assert metrics.status_code == 200
        assert not [one for one in ids.values() if one in metrics.text]

    def test_scores_and_acts(self, door: Any) -> None:
        """What probes say of a request, and rules did about it, is its client's, whoever lists or guesses."""
        server, who, ids = door
        found = {one.request_id.removesuffix("-0"): one for one in TraceDirectory(server.run_dir).summaries()}
        key = found[ids["alice"]].key
        probe = {"score": 0.75, "label": "lost", "threshold": 0.5, "above": True, "missing": 0}
        ScoreFiles(server.run_dir).write(key, StoredScores({"probes": {"told": probe}, "signals": {}}))
        Acts(server.run_dir).note(key, [Act("told", "tag", "done", 0.75, 1.0)])
        own = server.get(ids["alice"], who["alice"]).json()["scores"]
        assert (0.75, "told") == (own["probes"]["told"]["score"], own["actions"][0]["rule"])
        assert ["told"] == server.port.get(LIST, headers=who["alice"]).json()["requests"][0]["flagged"]
        for path in (LIST, f"{LIST}/{ids['alice']}", f"{LIST}/{ids['bob']}", f"{LIST}/{ids['alice']}?format=html"):
            for name in ("bob", "nobody"):
                assert "told" not in server.port.get(path, headers=who[name]).text, (path, name)

    def test_without_isolation(self, door: Any) -> None:
        """Everybody sees everything, as an operator has said, once the file is edited."""
        server, who, ids = door
        server.settings = {"requests": {"include_text": True}}
        for headers in who.values():
            assert 3 == len(server.listed(headers))
            assert all("text" in server.get(one, headers).json() for one in ids.values())


class TestWhoSomebodyIs:
    def test_a_key_that_vllm_does_not_know(self, tmp_path: Path) -> None:
        """On a path that vLLM lets everybody into it makes nobody somebody: nor does a new one for each request."""
        server = Server(tmp_path, KEYS, isolate=True)
        for number in range(3):
            server.ask({"Authorization": f"Bearer made-up-{number}"}, path="/invocations")
        clients = {one.client for one in TraceDirectory(server.run_dir).summaries()}
        assert {"anonymous"} == clients
        server.listed({"Authorization": "Bearer made-up-0"}, 403)

    def test_keys_where_vllm_asks_for_none(self, tmp_path: Path) -> None:
        """Nobody has checked them: the header must be named for it to count."""
        server = Server(tmp_path, [])
        server.ask(BY_KEY["alice"])
        server.settings = {"requests": {"client_header": "Authorization"}}
        server.ask(BY_KEY["alice"])
        clients = [one.client for one in TraceDirectory(server.run_dir).summaries()]
        assert clients[1] is None
        assert clients[0] not in (None, "anonymous")

    def test_where_nobody_is_anybody(self, tmp_path: Path) -> None:
        """A server without keys and header has the limits of all: one client's are not for all together."""
        server = Server(tmp_path, [], keep=20, per_client={"keep": 2, "max_active": 1, "rows_per_second": 1})
        for _ in range(30):
            server.ask({})
        assert 20 == len(server.listed({}))
        assert 0 == sum(server.worker.tracker.counts()[0].values())

    def test_a_header_twice(self, tmp_path: Path) -> None:
        """A gateway that adds its own to the client's makes it neither of the two."""
        server = Server(tmp_path, [], isolate=True, client_header="X-Tenant")
        alice = server.ask(BY_HEADER["alice"])
        twice = [("X-Tenant", "alice"), ("X-Tenant", "bob")]
        for sent in (twice, twice[::-1]):
            assert 404 == server.port.get(f"{LIST}/{alice}", headers=sent).status_code

    @pytest.mark.parametrize("value", ["anonymous", "0" * 24])
    def test_it_is_not_a_clients_to_say(self, tmp_path: Path, value: str) -> None:
        """In its keys it would be taken for what glassbox found."""
        server = Server(tmp_path, KEYS)
        with pytest.raises(Exception, match="glassbox_client must not be given"):
            server.ask(BY_KEY["bob"], glassbox_client=value)

    def test_a_name_tells_nothing(self, tmp_path: Path) -> None:
        """Neither keys nor headers are in any file; another server gives the same key another name."""
        names = []
        for number in range(2):
            server = Server(tmp_path / str(number), KEYS, client_header=None)
            server.ask(BY_KEY["alice"])
            names += [one.client for one in TraceDirectory(server.run_dir).summaries()]
            held = b"".join(path.read_bytes() for path in server.run_dir.rglob("*") if path.is_file())
            assert b"key-of-alice" not in held
            assert all(0 == path.stat().st_mode & 0o077 for path in server.run_dir.rglob("*"))
        assert names[0] != names[1]

    def test_api_servers_agree(self, tmp_path: Path) -> None:
        """One of them takes a request, another one is asked for its trace."""
        server = Server(tmp_path, KEYS, isolate=True)
        request_id = server.ask(BY_KEY["alice"])
        other = Server(tmp_path, KEYS, isolate=True)
        other.get(request_id, BY_KEY["alice"])
        other.get(request_id, BY_KEY["bob"], 404)

    def test_nobody_is_told_once_that_it_sees_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """The log says what to do, and the answer what was missing."""
        logging.getLogger("glassbox.processes.api_server.intake").__dict__.pop("_glassbox_logged_once", None)
        server = Server(tmp_path, [], isolate=True)
        server.ask({})
        server.ask({})
        told = [line for line in logged(caplog.records) if "requests.isolate: true" in line]
        assert 1 == len(told)
        assert "Start vLLM with --api-key, or set requests.client_header" in told[0]
        assert "came without the API key" in server.listed({}, 403)["error"]


class TestIds:
    def test_a_victims_id(self, tmp_path: Path) -> None:
        """A hundred requests with it leave the victim's own trace where it is, and are not shown to it."""
        server = Server(tmp_path, KEYS, isolate=True)
        server.ask(BY_KEY["alice"], "victim")
        own = server.get("cmpl-victim", BY_KEY["alice"]).json()
        for _ in range(100):
            server.ask(BY_KEY["bob"], "victim")
        again = server.get("cmpl-victim", BY_KEY["alice"]).json()
        assert (own["internal_id"], []) == (again["internal_id"], again["others"])
        attackers = server.get("cmpl-victim", BY_KEY["bob"]).json()
        assert 99 == len(attackers["others"])
        assert own["internal_id"] not in json.dumps(attackers)

    def test_newest_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without isolation an id that comes again is the newest's; the others are named with their times, and one
        trace is read, not all of them."""
        server = Server(tmp_path, KEYS)
        for number in range(12):
            server.ask(BY_KEY["bob" if number % 3 else "alice"], "again")
        loaded: list[Path] = []
        original = trace_directory.read_trace
        monkeypatch.setattr(trace_directory, "read_trace", lambda path: (loaded.append(path), original(path))[1])
        shown = server.get("cmpl-again", BY_KEY["alice"]).json()
        assert 1 == len(loaded)
        times = [shown["start_time_s"], *(other["start_time_s"] for other in shown["others"])]
        assert 12 == len(times)
        assert times == sorted(times, reverse=True)
        assert all(other["end_time_s"] is not None for other in shown["others"])
        assert 12 == len({shown["internal_id"], *(other["internal_id"] for other in shown["others"])})

    def test_ids_that_vllm_leaves_as_they_are(self, tmp_path: Path) -> None:
        """Told not to make them unique, it gives two clients the same internal id: neither replaces the other's."""
        server = Server(tmp_path, KEYS, isolate=True)
        for name in ("alice", "bob"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(secrets, "token_hex", lambda _: "00000000")
                server.ask(BY_KEY[name], "same")
        internal = {server.get("cmpl-same", BY_KEY[name]).json()["internal_id"] for name in ("alice", "bob")}
        assert {"cmpl-same-0-00000000"} == internal
        assert 2 == len({server.get("cmpl-same", BY_KEY[name]).json()["client"] for name in ("alice", "bob")})


class TestQuotas:
    def test_who_stores_much_loses_its_own(self, tmp_path: Path) -> None:
        """A hundred traces of one client push nobody else's out."""
        server = Server(tmp_path, KEYS, keep=20, per_client={"keep": 15})
        kept = [server.ask(BY_KEY["alice"]) for _ in range(4)]
        latest = [server.ask(BY_KEY["bob"]) for _ in range(100)][-1]
        stored = [one.request_id for one in TraceDirectory(server.run_dir).summaries()]
        assert {f"{one}-0" for one in kept} < set(stored)
        assert f"{latest}-0" == stored[0]
        assert 4 + 15 == len(stored)

    def test_ids_that_the_rate_would_choose(self, tmp_path: Path) -> None:
        """Where clients may not ask, none gets itself traced by the id that it sends: chance chooses."""
        server = Server(tmp_path, KEYS, opt_in=False, trace_rate=0.25, keep=1000, per_client={"keep": 1000})
        chosen = next(one for one in map(str, range(1000)) if is_sampled_request(f"cmpl-{one}-0", 0.25))
        for _ in range(100):
            server.ask(BY_KEY["bob"], chosen, glassbox=None)
        traced = TraceDirectory(server.run_dir).summaries()
        assert 5 < len(traced) < 50
        assert {("sampled", True)} == {(one.why, one.client not in (None, "anonymous")) for one in traced}
        with pytest.raises(Exception, match="glassbox_sampled must not be given"):
            server.ask(BY_KEY["bob"], glassbox=None, glassbox_sampled=True)
