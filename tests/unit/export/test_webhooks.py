"""Webhooks: signed so that any library can tell, sent again for a while, and never a burden to who offers them."""

import base64
import gc
import json
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from glassbox.export import webhooks
from glassbox.export.webhooks import ATTEMPT_S, MAX_WAITING, Event, WebhookSender
from tests.webhook_receiver import WebhookReceiver

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Outcomes:
    """What came of events, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []
        self._came = threading.Condition()

    def event(self, number: int, body: bytes = b"{}") -> Event:
        name = f"msg_{number}"

        def tell(outcome: str, why: str) -> None:
            with self._came:
                self.told.append((name, outcome, why))
                self._came.notify_all()

        return Event(name, body, tell)

    def wait(self, count: int, timeout_s: float = 60.0) -> list[tuple[str, str, str]]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.told) >= count, timeout_s), self.told
        return self.told


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def make_sender(secret_file: Path) -> Iterator[Callable[..., WebhookSender]]:
    senders: list[WebhookSender] = []

    def make(url: str, **how: float) -> WebhookSender:
        senders.append(WebhookSender(url, secret_file, **{"first_backoff_s": 0.02, "patience_s": 60.0, **how}))
        return senders[-1]

    yield make
    for sender in senders:
        sender.close()


@pytest.fixture
def dead_address() -> Iterator[str]:
    """One that takes connections and never says anything."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/hook"


Make = Callable[..., WebhookSender]


class TestSignature:
    def test_by_another_library(self, make_sender: Make, outcomes: Outcomes) -> None:
        """The openai client verifies such webhooks: it takes ours, and none that was changed or is another's."""
        body = json.dumps({"type": "glassbox.rule_applied", "data": {"rule": "über"}}).encode()
        with WebhookReceiver() as receiver:
            assert make_sender(receiver.url).offer(outcomes.event(7, body))
            assert [("msg_7", "done", "")] == outcomes.wait(1)
        (got,) = receiver.received
        assert (body, "msg_7", "application/json") == (got.body, got.headers["webhook-id"], got.headers["content-type"])
        client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
        client.webhooks.verify_signature(got.body, got.headers)
        other = "whsec_" + base64.b64encode(bytes(32)).decode()
        old = {**got.headers, "webhook-timestamp": str(int(got.headers["webhook-timestamp"]) - 1)}
        for bad_body, headers, secret in (
            (body + b" ", got.headers, SECRET), (body, got.headers, other), (body, old, SECRET),
            (body, {**got.headers, "webhook-id": "msg_8"}, SECRET),
        ):  # fmt: skip
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.verify_signature(bad_body, headers, secret=secret)

    def test_a_secret_that_is_replaced(self, make_sender: Make, outcomes: Outcomes, secret_file: Path) -> None:
        """The next event is signed with the new one; with none there is nothing sent, and it is said why."""
        new = "whsec_" + base64.b64encode(os.urandom(24)).decode()
        with WebhookReceiver() as receiver:
            sender = make_sender(receiver.url)
            secret_file.write_text(new)
            sender.offer(outcomes.event(1))
            outcomes.wait(1)
            secret_file.chmod(0o644)
            sender.offer(outcomes.event(2))
            told = outcomes.wait(2)
        (got,) = receiver.received
        openai.OpenAI(api_key="none", webhook_secret=new).webhooks.verify_signature(got.body, got.headers)
        why = "webhook.secret_file must not be read or changed by others, got mode 0644; use chmod 600"
        assert ("msg_2", "failed", why) == told[1]


class TestAttempts:
    def test_again_until_it_is_taken(self, make_sender: Make, outcomes: Outcomes) -> None:
        """After errors of the server; with the same id, so that the receiver knows it."""
        with WebhookReceiver(lambda n: (500, 429, 503, 204)[min(n, 3)]) as receiver:
            make_sender(receiver.url).offer(outcomes.event(1))
            assert [("msg_1", "done", "")] == outcomes.wait(1)
        assert ["msg_1"] * 4 == [one.headers["webhook-id"] for one in receiver.received]

    @pytest.mark.parametrize("status", [301, 400, 401, 404])
    def test_a_refusal_is_one(self, make_sender: Make, outcomes: Outcomes, status: int) -> None:
        """What would be refused again isn't sent again, and nobody is led elsewhere."""
        with WebhookReceiver(lambda _: status) as receiver:
            make_sender(receiver.url).offer(outcomes.event(1))
            assert [("msg_1", "failed", f"HTTP {status}")] == outcomes.wait(1)
        assert 1 == len(receiver.received)

    def test_an_end_of_patience(self, make_sender: Make, outcomes: Outcomes) -> None:
        """A receiver that never works is given up in the time that was given, and the next event has its own."""
        with WebhookReceiver(lambda _: 500) as receiver:
            sender, began_s = make_sender(receiver.url, patience_s=2.0), time.monotonic()
            for number in range(2):
                sender.offer(outcomes.event(number))
            told = outcomes.wait(2)
            assert 20.0 > (time.monotonic() - began_s)
        assert [("msg_0", "failed", "HTTP 500"), ("msg_1", "failed", "HTTP 500")] == told
        attempts = [one.headers["webhook-id"] for one in receiver.received]
        assert all(attempts.count(f"msg_{number}") > 1 for number in range(2)), attempts

    def test_a_silent_receiver(
        self, make_sender: Make, outcomes: Outcomes, dead_address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An attempt has an end though the connection stands."""
        monkeypatch.setattr(webhooks, "ATTEMPT_S", 0.1)
        make_sender(dead_address, patience_s=0.3).offer(outcomes.event(1))
        assert [("msg_1", "failed", "no answer within 0.1 s")] == outcomes.wait(1)


class TestBurden:
    def test_ten_thousand_to_a_dead_address(
        self, make_sender: Make, outcomes: Outcomes, dead_address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To offer them takes next to no time, the queue bounds the memory, and each one is accounted for."""
        monkeypatch.setattr(webhooks, "ATTEMPT_S", 60.0)  # the first stays under way, however slow the machine
        sender, body = make_sender(dead_address, patience_s=60.0), b"x" * 2000
        sender.offer(outcomes.event(0))  # starts the thread
        gc.collect()
        tracemalloc.start()
        try:
            began_s, taken = time.thread_time(), 0
            for number in range(10_000):
                # Each has a body of its own, as real ones have.
                taken += sender.offer(outcomes.event(number, body + str(number).encode()))
            took_s = time.thread_time() - began_s
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert MAX_WAITING - 1 <= taken <= MAX_WAITING
        assert MAX_WAITING >= sender.waiting
        assert ATTEMPT_S > took_s  # with tracemalloc, which makes it several times slower
        assert 4 * MAX_WAITING * len(body) > grown
        sender.close(timeout_s=0.1)
        told = outcomes.wait(taken)
        assert {"dropped"} == {outcome for _, outcome, _ in told[-MAX_WAITING + 1 :]}

    def test_the_end(self, make_sender: Make, outcomes: Outcomes) -> None:
        """What waits is sent if that is quick; nothing is taken any more."""
        with WebhookReceiver() as receiver:
            sender = make_sender(receiver.url)
            for number in range(20):
                sender.offer(outcomes.event(number))
            sender.close(timeout_s=60.0)
            assert not sender.offer(outcomes.event(99))
        assert [("done", "")] * 20 == [told[1:] for told in outcomes.told]
        assert 20 == len(receiver.received)


class TestThisHost:
    def test_no_proxy_is_asked(
        self, outcomes: Outcomes, make_sender: Callable[..., WebhookSender], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What may go unencrypted because it stays on this host does stay there."""
        with WebhookReceiver() as proxy, WebhookReceiver() as receiver:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, proxy.url.removesuffix("/hook"))
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            make_sender(receiver.url).offer(outcomes.event(1))
            assert [("msg_1", "done", "")] == outcomes.wait(1)
        assert (0, 1) == (len(proxy.received), len(receiver.received))
