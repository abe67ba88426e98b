"""Orders in an API server: the one that has the request ends it in its event loop, and tags what can be tagged."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glassbox.adapter.http_request import HttpRequest
from glassbox.adapter.http_tags import HEADER, MEMBER, Tags
from glassbox.adapter.running_requests import RunningRequests
from glassbox.adapter.server import SentRequest
from glassbox.config.load import GlassboxConfig
from glassbox.processes.api_server.order_taker import OrderTaker
from glassbox.store import orders
from glassbox.store.orders import Do, Order
from tests.waiting import wait_for


class Engine:
    """What is touched of an AsyncLLM: its requests, its event loop in a thread of its own, and `abort`."""

    def __init__(self, *ids: str) -> None:
        self.output_processor = SimpleNamespace(request_states=dict.fromkeys(ids))
        self.aborted: list[tuple[str, bool, int]] = []
        self.error: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._loop.run_forever)
        self.thread.start()
        self.output_handler: Any = SimpleNamespace(get_loop=lambda: self._loop)

    async def abort(self, request_id: str, internal: bool = False) -> None:
        if self.error is not None:
            raise self.error
        del self.output_processor.request_states[request_id]
        self.aborted.append((request_id, internal, threading.get_ident()))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join()
        self._loop.close()


class Sent:
    """What a client gets of a response."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.tags = Tags(self._send)

    async def _send(self, message: Any) -> None:
        self.messages.append(message)

    def begin(self, kind: bytes = b"application/json", status: int = 200) -> None:
        headers = [(b"Content-Type", kind)]
        self.send({"type": "http.response.start", "status": status, "headers": headers})

    def body(self, body: bytes) -> None:
        self.send({"type": "http.response.body", "body": body, "more_body": True})

    def send(self, message: dict[str, Any]) -> None:
        async def sending() -> None:
            await self.tags(message)

        asyncio.run(sending())

    def text(self) -> bytes:
        """Of the body."""
        return b"".join(message.get("body", b"") for message in self.messages)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine("cmpl-1-0-aaaaaaaa", "cmpl-2-0-bbbbbbbb")
    yield engine
    engine.close()


def make_config(**rule: Any) -> GlassboxConfig:
    rules = [{"name": "r", "probe": "p", "above": 0.5, "do": ["abort"], "dry_run": False, **rule}]
    return GlassboxConfig.model_validate({"actions": {"rules": rules}})


@pytest.fixture
def taker(tmp_path: Path, engine: Engine) -> Iterator[OrderTaker]:
    taker = OrderTaker(make_config, tmp_path)
    taker.serves(RunningRequests(engine))
    yield taker
    taker.close()


def order(run_dir: Path, internal_id: str = "cmpl-1-0-aaaaaaaa", do: Do = "abort", rule: str = "r") -> Order:
    given = Order(internal_id, internal_id.rpartition("-")[0], do, rule, time.time())
    orders.give(run_dir, given)
    return given


def asked(taker: OrderTaker, internal_id: str, request: HttpRequest) -> None:
    """As vLLM does it: the request has its client's id first, and its own one when it goes to the engine."""
    of_engine = SimpleNamespace(request_id=internal_id.rpartition("-")[0], sampling_params=SimpleNamespace(n=1))
    taker.asked(SentRequest(of_engine.request_id, of_engine), request)
    of_engine.request_id = internal_id


def answered(run_dir: Path) -> list[str]:
    return sorted(orders.answers(run_dir).values())


class TestAbort:
    def test_in_its_event_loop(self, tmp_path: Path, taker: OrderTaker, engine: Engine) -> None:
        """By vLLM's own id, and no other request is touched."""
        order(tmp_path)
        taker.look()
        assert [("cmpl-1-0-aaaaaaaa", True, engine.thread.ident)] == engine.aborted
        assert ["done"] == answered(tmp_path)
        taker.look()
        assert 1 == len(engine.aborted)

    def test_of_another_process(self, tmp_path: Path, taker: OrderTaker, engine: Engine) -> None:
        """It says nothing: the one that has it does."""
        order(tmp_path, "cmpl-3-0-cccccccc")
        taker.look()
        assert ([], []) == (answered(tmp_path), engine.aborted)

    def test_it_has_ended(self, tmp_path: Path, taker: OrderTaker, engine: Engine) -> None:
        """Here, and its response is still under way."""
        request = HttpRequest({}, tags=Sent().tags)
        asked(taker, "cmpl-3-0-cccccccc", request)
        order(tmp_path, "cmpl-3-0-cccccccc")
        taker.look()
        assert (["late"], []) == (answered(tmp_path), engine.aborted)

    def test_it_cannot_be_ended(self, tmp_path: Path, taker: OrderTaker, engine: Engine) -> None:
        """The request goes on, and the rule is told; the next one is ended."""
        engine.error = RuntimeError("no engine")
        order(tmp_path)
        taker.look()
        assert ["failed"] == answered(tmp_path)
        engine.error = None
        order(tmp_path, "cmpl-2-0-bbbbbbbb")
        taker.look()
        assert ["done", "failed"] == answered(tmp_path)

    def test_without_an_engine(self) -> None:
        """One that is gone has no requests, and isn't kept."""
        gone = Engine("a")
        requests = RunningRequests(gone)
        assert requests.has("a")
        gone.close()
        del gone
        gc.collect()
        assert not requests.has("a")
        assert not requests.abort("a")


class TestTags:
    def test_before_it_begins(self, tmp_path: Path, taker: OrderTaker) -> None:
        """A header has the rules' names; of a rule that aborts, too."""
        sent = Sent()
        request = HttpRequest({}, tags=sent.tags)
        asked(taker, "cmpl-1-0-aaaaaaaa", request)
        order(tmp_path, do="tag", rule="b")
        order(tmp_path, do="abort", rule="a")
        taker.look()
        sent.begin()
        assert ["done", "done"] == answered(tmp_path)
        assert (HEADER.encode(), b"a, b") == sent.messages[0]["headers"][-1]

    def test_in_a_stream(self, tmp_path: Path, taker: OrderTaker) -> None:
        """It has begun: its last chunk tells, and is one that clients know; all others are as they were."""
        sent = Sent()
        request = HttpRequest({}, tags=sent.tags)
        asked(taker, "cmpl-1-0-aaaaaaaa", request)
        sent.begin(b"text/event-stream; charset=utf-8")
        chunk = {"id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m", "choices": [{"text": "a"}]}
        sent.body(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        order(tmp_path, do="tag")
        taker.look()
        sent.body(b"data: [DONE]\n\n")
        sent.body(b"")
        assert ["done"] == answered(tmp_path)
        assert 1 == len(sent.messages[0]["headers"])
        first, told, done = sent.text().decode().split("\n\n")[:3]
        assert (chunk, "data: [DONE]") == (json.loads(first.removeprefix("data: ")), done)
        assert {**chunk, "choices": [], MEMBER: ["r"]} == json.loads(told.removeprefix("data: "))
        order(tmp_path, do="tag", rule="s")
        taker.look()
        assert ["done", "late"] == answered(tmp_path)

    @pytest.mark.parametrize(
        "body",
        [b'event: message_stop\ndata: {"type":"message_stop"}\n\n', b"data: [DONE]\n\n",
         b'data: {"error":{"message":"x"}}\n\ndata: [DONE]\n\n'],
    )  # fmt: skip
    def test_other_streams(self, tmp_path: Path, taker: OrderTaker, body: bytes) -> None:
        """Named events, errors and what isn't understood pass as they are."""
        sent = Sent()
        request = HttpRequest({}, tags=sent.tags)
        asked(taker, "cmpl-1-0-aaaaaaaa", request)
        sent.begin(b"text/event-stream")
        order(tmp_path, do="tag")
        taker.look()
        sent.body(body)
        assert body == sent.text()

    def test_too_late(self, tmp_path: Path, taker: OrderTaker) -> None:
        """A whole answer has begun; nothing is changed of it."""
        sent = Sent()
        request = HttpRequest({}, tags=sent.tags)
        asked(taker, "cmpl-1-0-aaaaaaaa", request)
        sent.begin()
        order(tmp_path, do="tag")
        taker.look()
        sent.body(b'{"choices":[]}')
        assert (["late"], b'{"choices":[]}') == (answered(tmp_path), sent.text())
        assert 1 == len(sent.messages[0]["headers"])

    def test_another_client_gives_the_same_id(self, tmp_path: Path, taker: OrderTaker) -> None:
        """What is found of a request is told with its own answer, and with no other."""
        mine, others = Sent(), [Sent(), Sent()]
        requests = [HttpRequest({}, tags=sent.tags) for sent in (others[0], mine, others[1])]
        for request, internal_id in zip(
            requests, ("cmpl-1-0-00000000", "cmpl-1-0-aaaaaaaa", "cmpl-1-0-ffffffff"), strict=True
        ):
            asked(taker, internal_id, request)
        order(tmp_path, do="tag")
        taker.look()
        for sent in (mine, *others):
            sent.begin()
        told = [
            [value for name, value in sent.messages[0]["headers"] if name == HEADER.encode()]
            for sent in (mine, *others)
        ]
        assert [[b"r"], [], []] == told

    def test_a_response_that_is_gone(self, tmp_path: Path, taker: OrderTaker) -> None:
        """Requests are not kept."""
        asked(taker, "cmpl-1-0-aaaaaaaa", HttpRequest({}, tags=Sent().tags))
        order(tmp_path, do="tag")
        taker.look()
        assert [] == answered(tmp_path)


class TestThread:
    def test_only_while_there_are_such_rules(self, tmp_path: Path, engine: Engine) -> None:
        """It starts with a request, ends with an edit, and starts again."""
        rule: dict[str, Any] = {"dry_run": True}
        taker = OrderTaker(lambda: make_config(**rule), tmp_path)
        taker.serves(RunningRequests(engine))
        request = HttpRequest({}, tags=Sent().tags)

        def threads() -> int:
            return sum(thread.name == "glassbox-orders" for thread in threading.enumerate())

        wait_for(lambda: threads() == 0, what="those of other tests to end", pause_s=0.01)
        asked(taker, "cmpl-1-0-aaaaaaaa", request)
        assert 0 == threads()
        for internal_id in ("cmpl-1-0-aaaaaaaa", "cmpl-2-0-bbbbbbbb"):
            rule["dry_run"] = False
            asked(taker, "cmpl-1-0-aaaaaaaa", request)
            asked(taker, "cmpl-1-0-aaaaaaaa", request)
            assert 1 == threads()
            order(tmp_path, internal_id)
            states = engine.output_processor.request_states
            wait_for(lambda: internal_id not in states, what="the order to be taken", pause_s=0.01)  # noqa: B023
            rule["dry_run"] = True
            wait_for(lambda: threads() == 0, what="the thread to end", pause_s=0.01)
        wait_for(lambda: len(engine.aborted) == 2, what="both to be aborted", pause_s=0.01)
        taker.close()
