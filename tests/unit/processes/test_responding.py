"""What an answer says of its own request: once its trace is there, and while it isn't; and of nobody else's."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from glassbox.adapter import internals
from glassbox.adapter.http_reply import Reply
from glassbox.adapter.http_request import note_requests
from glassbox.adapter.internals import Feature, Internal
from glassbox.adapter.server import SentRequest, Wrappers
from glassbox.config.load import GlassboxConfig
from glassbox.core.statistics import STATISTICS
from glassbox.export.trace_document import document
from glassbox.export.trace_scores import TraceScores
from glassbox.processes.api_server import responding
from glassbox.processes.api_server.intake import Intake
from glassbox.processes.api_server.responding import MAX_CHOICES, Answers
from glassbox.signals.probe import ProbeFeature
from glassbox.store import process_name
from glassbox.store.file_names import request_digest
from glassbox.store.score_files import are_awaited
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import TraceDirectory, traces_path
from glassbox.store.trace_record import RequestTrace, write_trace
from glassbox.store.trace_refusals import Refusal, write_refusals
from tests import probe_samples
from tests.export_samples import make_snapshot
from tests.trace_samples import make_trace
from tests.waiting import require_within, seconds_of

fastapi = pytest.importorskip("fastapi", reason="comes with vLLM")


class Server:
    """An API server's answers over a run directory with one worker.

    Attributes:
        settings: of `requests:`.
        probes: of `probes:`.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.settings: dict[str, Any] = {"respond_wait_s": 30.0}
        self.probes: list[Any] = []
        self.answers = Answers(self.config, run_dir)
        self.worker("i0")

    def config(self) -> GlassboxConfig:
        return GlassboxConfig.model_validate({"requests": self.settings, "probes": self.probes})

    def worker(self, instance: str, **fields: Any) -> None:
        write_snapshot(self.run_dir, make_snapshot(**{"layers": (0, 3), "instance": instance, **fields}))

    def write(self, trace: RequestTrace) -> RequestTrace:
        write_trace(traces_path(self.run_dir), trace)
        return trace

    def refuse(
        self,
        internal_id: str = "cmpl-1-0-00000000",
        *,
        client: str | None = None,
        time_s: float = 0.0,
        rank: int = 0,
        why: str = "the moon is full",
        lacks_layers: bool = False,
    ) -> None:
        """A worker says that it has not traced a request."""
        refusal = Refusal(request_digest(internal_id, client), why, time_s, lacks_layers)
        write_refusals(self.run_dir, "0", rank, f"i{rank}", [refusal])

    def missing(self, *sent: SentRequest) -> str:
        """Why it says nothing of the first one, after a short wait: for what never comes."""
        patience_s, self.settings["respond_wait_s"] = self.settings["respond_wait_s"], 0.3
        try:
            return str(self.of(*sent)["missing"])
        finally:
            self.settings["respond_wait_s"] = patience_s

    def say(self, *sent: SentRequest) -> dict[str, Any]:
        """What the answer to these says."""
        reply = Reply(SimpleNamespace(), "glassbox")  # type: ignore[arg-type]
        for request in sent:
            self.answers.sent(request, reply)
        assert reply.field is not None
        told: Any = asyncio.run(reply.field())
        said: dict[str, Any] = json.loads(told, parse_constant=pytest.fail)
        return said

    def of(self, *sent: SentRequest) -> dict[str, Any]:
        """What it says of the first one."""
        first: dict[str, Any] = self.say(*sent)["choices"][0]
        return first


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "run")
    yield made
    made.answers.close()


def sent(
    internal_id: str = "cmpl-1-0-00000000", request_id: str = "cmpl-1-0", samples: int = 1, client: str | None = None
) -> SentRequest:
    """A request that the engine has given its id."""
    request = SimpleNamespace(request_id=request_id, sampling_params=SimpleNamespace(n=samples))
    made = SentRequest(request_id, request, client)
    request.request_id = internal_id
    return made


def later(delay_s: float, action: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(delay_s, action)
    timer.start()
    return timer


class TestSummary:
    def test_of_an_ended_request(self, server: Server) -> None:
        """Its id, where its trace is, and the document's signals; means are those of all rows of a phase."""
        trace = server.write(make_trace())
        said = server.say(sent())
        (choice,) = said["choices"]
        shown = json.loads(json.dumps(document(trace)))
        for name in ("request_id", "internal_id", "status", "prompt_len", "num_generated", "num_rows", "truncated"):
            assert shown[name] == choice[name], name
        assert shown["signals"] == choice["signals"]
        assert {"probes": {}, "signals": {}, "final": True} == choice["scores"]
        assert ["choices"] == list(said)
        assert 0 == choice["index"]
        assert "/glassbox/v1/requests/cmpl-1-0-00000000" == choice["trace"]
        rows = {"prefill": trace.stats[:2], "decode": trace.stats[2:]}
        for phase, stats in rows.items():
            for at, statistic in enumerate(STATISTICS):
                assert (
                    pytest.approx(stats[..., at].mean(dtype=float), rel=1e-5) == choice["means"][phase][statistic.name]
                )

    def test_of_named_signals(self, server: Server) -> None:
        """As the document says them, without the numbers of single layers and heads; those on demand come later."""
        options = make_trace().options
        trace = server.write(make_trace(options=replace(options, signals=("focus", "tracker"))))
        scores = TraceScores(server.run_dir, GlassboxConfig).document(trace, (trace.engine, trace.internal_id, None))
        said = server.of(sent())["scores"]
        assert {name: scores[name] for name in ("probes", "signals", "final")} == said
        assert set(said["signals"]["focus"]["values"])
        assert said["signals"]["tracker"]["refused"].startswith("it is computed once, by the exporter")
        assert are_awaited(server.run_dir)  # by which a worker starts one, where none runs

    def test_of_probes(self, server: Server, tmp_path: Path) -> None:
        """Their scores; one that reads a signal on demand has none yet, and says so."""
        slow = probe_samples.write(tmp_path, "slow", features=(ProbeFeature("tracker_sigma2_L0_H0", 0.5, 1.0, 1.0),))
        server.probes = [{"file": str(file)} for file in (probe_samples.write(tmp_path), slow)]
        trace = server.write(make_trace())
        probes = server.of(sent())["scores"]["probes"]
        assert pytest.approx(probe_samples.score_of(trace), rel=1e-5) == probes["drift"]["score"]
        assert None is probes["slow"]["score"]
        assert probes["slow"]["reason"].startswith("it is computed once, by the exporter")

    def test_of_each_sample(self, server: Server) -> None:
        """By the engine's ids, which number them; prompts come in their order, whichever was sent first."""
        ids = {}
        for prompt in (1, 0):
            for sample in (0, 1):
                request_id, call = f"cmpl-1-{prompt}", f"cmpl-1-{prompt}-0000000{prompt}"
                internal_id = f"{sample}_{call}"
                ids[2 * prompt + sample] = internal_id
                server.write(make_trace(seed=2 * prompt + sample, request_id=request_id, internal_id=internal_id))
        said = server.say(*(sent(f"1_cmpl-1-{p}-0000000{p}", f"cmpl-1-{p}", samples=2) for p in (1, 0)))
        assert ids == {choice["index"]: choice["internal_id"] for choice in said["choices"]}
        assert ["finished"] * 4 == [choice["status"] for choice in said["choices"]]

    def test_of_bounded_size(self, server: Server) -> None:
        """Of an answer with very many choices the first ones are told, and how many are not."""
        server.settings["opt_in"] = False
        said = server.say(sent(f"{MAX_CHOICES + 7}_a-00000000", "a", samples=MAX_CHOICES + 8))
        assert (MAX_CHOICES, 8) == (len(said["choices"]), said["left_out"])


class TestWaiting:
    def test_for_the_trace(self, server: Server) -> None:
        """It is not there yet when the answer is, and then runs for a moment."""
        timers = [
            later(0.05, lambda: server.write(make_trace(status="active", end_time_s=None))),
            later(0.12, lambda: server.write(make_trace())),
        ]
        assert "finished" == server.of(sent())["status"]
        [timer.join() for timer in timers]

    def test_not_longer_than_it_may(self, server: Server) -> None:
        """What isn't there by then is said in words, and where it will be."""
        server.settings["respond_wait_s"] = 0.3
        server.write(make_trace(status="active", end_time_s=None))
        said: dict[str, Any] = {}

        def ask() -> float:
            took_s = seconds_of(lambda: said.update(server.of(sent())))
            assert took_s > 0.25
            return took_s

        require_within(3.0, ask)
        assert {"index", "request_id", "internal_id", "trace", "missing"} == said.keys()
        assert said["missing"].startswith(
            "no trace within 0.3 s of the answer (requests.respond_wait_s): it takes longer"
        )
        assert "/glassbox/v1/requests/cmpl-1-0-00000000" == said["trace"]

    def test_those_that_are_there_are_told(self, server: Server) -> None:
        """One sample was refused: the other one's is told all the same."""
        server.settings["respond_wait_s"] = 2.0
        server.write(make_trace(internal_id="1_cmpl-1-0-00000000"))
        first, second = server.say(sent("1_cmpl-1-0-00000000", samples=2))["choices"]
        assert "missing" in first
        assert "finished" == second["status"]

    def test_nobody_may_ask(self, server: Server) -> None:
        """With `opt_in: false` there is nothing to wait for."""
        server.settings.update(opt_in=False, respond_wait_s=30.0)
        assert "clients of this server may not ask for traces (requests.opt_in: false)" == server.of(sent())["missing"]

    def test_a_summary_that_fails(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is missing, and the answer is there."""

        def fail(*_: Any) -> None:
            raise OSError("no disk")

        monkeypatch.setattr(responding.Summaries, "of", fail)
        assert server.missing(sent())

    def test_many_wait_as_one(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many answers wait, the directory is listed no more often for it."""
        server.settings["respond_wait_s"] = 0.5
        listed, versions = [], TraceDirectory.versions

        def count(directory: TraceDirectory) -> Any:
            listed.append(1)
            return versions(directory)

        monkeypatch.setattr(TraceDirectory, "versions", count)
        said = server.say(*(sent(f"cmpl-{i}-0-00000000", f"cmpl-{i}-0") for i in range(MAX_CHOICES)))
        assert MAX_CHOICES == sum("missing" in choice for choice in said["choices"])
        assert len(listed) <= 26

    def test_others_are_served_meanwhile(self, server: Server) -> None:
        """The event loop is free: no task in it is held up while an answer waits."""
        server.settings["respond_wait_s"] = 2.0
        reply = Reply(SimpleNamespace(), "glassbox")  # type: ignore[arg-type]
        server.answers.sent(sent(), reply)

        async def run() -> int:
            assert reply.field is not None
            waiting, turns = asyncio.ensure_future(reply.field()), 0  # type: ignore[arg-type]
            while not waiting.done():
                await asyncio.sleep(0.005)
                turns += 1
            return turns

        assert asyncio.run(run()) > 20


class TestRefused:
    def test_is_said_at_once(self, server: Server) -> None:
        """With the reason in words, and no wait for what never comes."""
        server.settings["respond_wait_s"] = 30.0
        timer = later(0.1, server.refuse)
        begun = time.monotonic()
        said = server.of(sent())
        timer.join()
        assert time.monotonic() - begun < 20.0
        assert "its trace was refused: the moon is full" == said["missing"]
        assert {"index", "request_id", "internal_id", "trace", "missing"} == said.keys()

    def test_of_another(self, server: Server) -> None:
        """Another client's of the same id, or an older request's, is none of this one's."""
        server.refuse("a", client="0" * 24)
        assert "refused:" not in server.missing(sent("a", "b", client="1" * 24))
        server.refuse("a", time_s=time.time() - 60)
        assert "refused:" not in server.missing(sent("a", "a"))
        server.refuse("a", time_s=time.time() + 60)
        assert "refused:" in server.of(sent("a", "a"))["missing"]

    @pytest.mark.parametrize("written", [False, True])
    def test_by_some_ranks(self, server: Server, written: bool) -> None:
        """One of two tensor-parallel ranks has no room: there will be no whole trace, which is said at once."""
        server.settings["respond_wait_s"] = 30.0
        server.worker("i1", rank=1, head_offset=2, total_heads=6)
        if written:
            server.write(make_trace(heads=(0, 1, 2)))
        timer = later(0.1, lambda: server.refuse(rank=1))
        begun = time.monotonic()
        said = server.of(sent())
        timer.join()
        assert time.monotonic() - begun < 20.0
        assert said["missing"].startswith("its trace was refused by 1 of 2 workers: the moon is full. What the others")
        assert "/glassbox/v1/requests/cmpl-1-0-00000000" == said["trace"]

    def test_by_a_rank_that_is_gone(self, server: Server) -> None:
        """It keeps nobody from tracing."""
        server.refuse(rank=1)
        server.write(make_trace())
        assert "finished" == server.of(sent())["status"]

    @pytest.mark.parametrize("layers", [(0, 3), None])
    def test_by_a_stage_without_the_layers(self, server: Server, layers: tuple[int, ...] | None) -> None:
        """Of a pipeline: what another one traces is waited for, whether the client or sampling.layers has chosen it."""
        server.worker("i1", rank=1, layers=(8, 9))
        server.refuse(rank=1, lacks_layers=True)
        assert "refused" not in server.missing(sent())
        server.write(make_trace(options=replace(make_trace().options, layers=layers)))
        assert "finished" == server.of(sent())["status"]

    def test_by_all_stages(self, server: Server) -> None:
        """None has the layers, or the one that has them refuses."""
        server.worker("i1", rank=1, layers=(8, 9))
        for number, lacks_layers in enumerate((True, False)):
            ids = f"cmpl-{number}-0-00000000", f"cmpl-{number}-0"
            server.refuse(ids[0], why="no such layer", lacks_layers=True)
            server.refuse(ids[0], rank=1, lacks_layers=lacks_layers)
            expected = "no such layer" if lacks_layers else "the moon is full"
            assert f"its trace was refused: {expected}" == server.of(sent(*ids))["missing"]

    @pytest.mark.parametrize(
        "content",
        [b"", b"[]", b"{}", b"[" * 100_000, b'{"engine": "0", "instance": "i0", "refusals": [1]}',
         b'{"engine": 0, "instance": "i0", "refusals": []}', b'{"engine": "0", "instance": "i0", "refusals": {}}',
         b'{"engine": "0", "instance": "i0", "refusals": [{"request": "a", "why": 1, "time_s": 0}]}',
         b'{"engine": "0", "instance": "i0", "refusals": [{"request": "a", "why": "b", "time_s": 1%s}]}' % (b"0" * 400),
         b"x" * (1 << 20)],
    )  # fmt: skip
    def test_garbage(self, server: Server, content: bytes) -> None:
        """Says nothing, and keeps nothing else back."""
        (server.run_dir / "refused-0-1.json").write_bytes(content)
        (server.run_dir / "refused-0-1.json").chmod(0o600)
        (server.run_dir / "refused-0-2.json").symlink_to("/dev/zero")
        server.refuse()
        assert "its trace was refused: the moon is full" == server.of(sent())["missing"]


class TestWhose:
    def test_not_another_clients(self, server: Server) -> None:
        """Even of the same id, which a client may choose where vLLM doesn't make ids unique."""
        server.write(make_trace(client="0" * 24))
        assert server.missing(sent(client="1" * 24))
        assert "status" in server.of(sent(client="0" * 24))

    def test_not_an_older_request_of_the_same_id(self, server: Server) -> None:
        """Where vLLM's ids are the clients', what was there before is another request's."""
        server.write(make_trace(request_id="a", internal_id="a", start_time_s=time.time() - 60))
        assert server.missing(sent("a", "a"))
        server.write(make_trace(request_id="a", internal_id="a", start_time_s=time.time() + 60))
        assert "status" in server.of(sent("a", "a"))

    def test_an_id_that_cant_be_told(self, server: Server) -> None:
        """Of a vLLM that names samples in another way none is guessed."""
        server.settings["respond_wait_s"] = 0.3
        server.write(make_trace())
        assert None is server.of(sent("cmpl-1-0-00000000", samples=2))["internal_id"]


class TestRanks:
    def test_all_of_them(self, server: Server) -> None:
        """A summary speaks of all heads: it waits until each worker of the engine has written its part."""
        server.worker("i1", rank=1, head_offset=2, total_heads=6)
        server.write(make_trace(heads=(0, 1, 2)))
        assert server.missing(sent())
        server.write(make_trace(seed=0, heads=(3, 4, 5), rank=1, instance="i1", internal_id="cmpl-1-0-00000000"))
        assert "finished" == server.of(sent())["status"]

    def test_none_that_died_or_is_another_engines(self, server: Server) -> None:
        """What an engine's earlier workers, and others, have left is not waited for."""
        server.worker(f"{os.getpid()}-1-{process_name.own_place()}-0")
        server.worker("i7", engine="7")
        server.write(make_trace())
        assert "finished" == server.of(sent())["status"]

    def test_none_without_the_chosen_layers(self, server: Server) -> None:
        """A stage of a pipeline that has none of the layers of interest traces nothing."""
        server.worker("i1", layers=(8, 9))
        chosen = make_trace()
        server.write(make_trace(options=type(chosen.options)(layers=(0, 3))))
        assert "finished" == server.of(sent())["status"]


class TestIntake:
    """From the request's options to its answer: vLLM's method that hands a request to the engine, and a real app."""

    @pytest.fixture
    def app(self, server: Server) -> Iterator[Any]:
        undo = note_requests()
        intake = Intake(server.config, server.run_dir)

        def process_inputs(_: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(
                request_id=request_id, sampling_params=SimpleNamespace(n=1, extra_args=params.extra_args)
            )

        process = Wrappers(intake).process_inputs(process_inputs)
        model = SimpleNamespace(logprobs_mode="raw_logprobs")
        processor = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
        app = fastapi.FastAPI()

        @app.post("/ask")
        async def ask(request: fastapi.Request) -> Any:
            params = SimpleNamespace(extra_args=(await request.json())["xargs"])
            made = process(processor, "cmpl-1-0", {}, params, ("generate",))
            made.request_id = "cmpl-1-0-00000000"
            return {"text": "fog", "extra_args": made.sampling_params.extra_args}

        yield app
        undo()
        intake.close()

    def ask(self, app: Any, xargs: Any) -> dict[str, Any]:
        async def post() -> dict[str, Any]:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
                answer: dict[str, Any] = (await client.post("/ask", json={"xargs": xargs})).raise_for_status().json()
                return answer

        return asyncio.run(post())

    def test_who_asks_is_told(self, server: Server, app: Any) -> None:
        """And the worker is told that somebody waits."""
        server.write(make_trace())
        answer = self.ask(app, {"glassbox": "trace", "glassbox_respond": 1})
        assert "finished" == answer["glassbox"]["choices"][0]["status"]
        assert 1 == answer["extra_args"]["glassbox_respond"]

    def test_a_vllm_that_hides_its_ids(
        self, server: Server, app: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Says so in the log, and nothing in the answer."""
        monkeypatch.setattr(internals, "INTERNALS", (Internal("json.nothing", "json", Feature.ANSWERS),))
        internals.lacks.cache_clear()
        try:
            assert "glassbox" not in self.ask(app, {"glassbox": "trace", "glassbox_respond": 1})
        finally:
            internals.lacks.cache_clear()
        assert "summaries of traced requests in their responses: json.nothing; it is off" in caplog.text

    @pytest.mark.parametrize(
        "xargs",
        [None, {}, {"glassbox": "trace"}, {"glassbox": "trace", "glassbox_respond": 0}, {"glassbox": "off"}],
    )
    def test_who_doesnt_is_not(self, server: Server, app: Any, xargs: Any) -> None:
        """The answer is vLLM's alone."""
        server.write(make_trace())
        assert ["text", "extra_args"] == list(self.ask(app, xargs))
