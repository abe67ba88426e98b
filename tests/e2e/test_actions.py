"""Rules of a running server: the request that they are about ends within a second, and nobody else notices."""

import json
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest

from glassbox.core.statistics import INDEX
from glassbox.export.webhooks import MAX_WAITING
from glassbox.signals.probe import Platt, Probe, ProbeFeature, Trained, write_probe
from glassbox.store import orders
from glassbox.store.trace_directory import TraceDirectory
from glassbox.store.trace_record import RequestTrace
from tests.serving import MODEL_NAME, wait_for
from tests.waiting import require_within
from tests.webhook_receiver import WebhookReceiver

if TYPE_CHECKING:
    from tests.serving import GlassboxServer

pytestmark = pytest.mark.e2e

PROMPT: Final = "The lighthouse keeper opened the door and"
OTHERS: Final = tuple(f"{word} is a word that" for word in ("Ocean", "Candle", "Winter", "Copper"))
# The rule is to apply after so many tokens, of this many.
AFTER, TOKENS = 40, 400
STATISTIC: Final = "distance_tokens"
# Of the dead webhook: rules that apply to each request, requests of a turn, and those that ask at the same time.
RULES, REQUESTS, CLIENTS, TURNS = 32, 80, 8, 4
SECRET: Final = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@dataclass(frozen=True)
class Streamed:
    """An answer: its tokens and when each came, how it ended and when, and the rules that the last chunk names."""

    id: str
    tokens: tuple[int, ...]
    times_s: tuple[float, ...]
    finish_reason: str
    end_s: float
    rules: tuple[str, ...]


def stream(server: "GlassboxServer", prompt: str, max_tokens: int, **xargs: Any) -> Streamed:
    body = {
        "model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "ignore_eos": True,
        "temperature": 0, "return_token_ids": True, "vllm_xargs": xargs,
    }  # fmt: skip
    tokens: list[int] = []
    times: list[float] = []
    request_id, reason, end_s, rules = "", "", 0.0, ()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                request_id, now_s = chunk["id"], time.monotonic()
                for choice in chunk["choices"]:
                    tokens += choice["token_ids"] or ()
                    times += [now_s] * (len(tokens) - len(times))
                    if choice["finish_reason"] is not None:
                        reason, end_s = choice["finish_reason"], now_s
                rules = tuple(chunk.get("glassbox_rules", ()))
    return Streamed(request_id, tuple(tokens), tuple(times), reason, end_s, rules)


def trace_of(server: "GlassboxServer", request_id: str) -> RequestTrace:
    """Once it has ended; the worker hears of that with its next step."""

    def read() -> RequestTrace | None:
        server.complete("Wake up", max_tokens=1)
        found = TraceDirectory(server.run_dir).traces(f"{request_id}")
        return next((trace for trace in found if trace.status != "active"), None)

    trace = wait_for(read, lambda found: found is not None, 30.0, f"a trace of {request_id}")
    assert trace is not None
    return trace


def so_far(trace: RequestTrace) -> npt.NDArray[np.float64]:
    """[T, L, H] mean of the statistic over the answer's rows up to each of them, straight from the trace."""
    values = trace.stats[trace.decode()][..., INDEX[STATISTIC]].astype(np.float64)
    mean: npt.NDArray[np.float64] = np.cumsum(values, axis=0) / np.arange(1, len(values) + 1)[:, None, None]
    return mean


@dataclass(frozen=True)
class Threshold:
    """A place of the model and a number that its statistic passes there after some tokens.

    Attributes:
        at: indices along the trace's axes L and H.
    """

    at: tuple[int, int]
    value: float

    def crossed(self, trace: RequestTrace) -> int:
        """The first row of the answer with which the mean is larger."""
        return int(np.argmax(so_far(trace)[:, self.at[0], self.at[1]] > self.value))


@pytest.fixture(scope="module")
def _server(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["GlassboxServer"]:
    from tests.serving import GlassboxServer

    # In float32 tokens don't depend on who else is in the batch, so that what was touched can be told.
    args, env = ("--dtype", "float32"), {"VLLM_PLUGINS": "glassbox"}
    with GlassboxServer(demo_model_path, tmp_path_factory.mktemp("server"), args=args, env=env) as server:
        yield server


@pytest.fixture
def server(_server: "GlassboxServer") -> Iterator["GlassboxServer"]:
    """One for this module."""
    yield _server
    _server.restore_config()


@pytest.fixture(scope="module")
def threshold(_server: "GlassboxServer") -> Threshold:
    """Of the place where the statistic rises most after `AFTER` tokens."""
    server = _server
    mean = so_far(trace_of(server, stream(server, PROMPT, 120, glassbox="trace").id))
    before = mean[:AFTER].max(axis=0)
    layer, head = np.unravel_index(np.argmax((mean[AFTER + 20] - before) / before), before.shape)
    return Threshold((int(layer), int(head)), float(before[layer, head]) * 1.02)


@pytest.fixture
def rules(server: "GlassboxServer", threshold: Threshold, tmp_path: Path) -> Any:
    """Sets a rule of the probe `far`, whose score is above a half where the threshold is crossed."""
    feature = ProbeFeature(f"answer_{STATISTIC}_L{threshold.at[0]}_H{threshold.at[1]}", threshold.value, 1.0, 1.0)
    trained = Trained("smollm2", 2, 1, "2026-01-01T00:00:00Z", "none.parquet")
    write_probe(tmp_path / "far.json", Probe("far", "far", (feature,), 0.0, Platt(50.0, 0.0), 0.5, trained))
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)

    def set_rule(**rule: Any) -> Path:
        audit = tmp_path / "audit.jsonl"
        name = {"name": "too-far", "probe": "far", "above": 0.5, "per_minute": 600}
        if "webhook" in rule:
            rule["webhook"] = {"url": rule["webhook"], "secret_file": str(secret)}
        server.edit_config(
            probes=[{"file": str(tmp_path / "far.json")}],
            actions={"audit": {"path": str(audit)}, "rules": [{**name, **rule}]},
        )
        wait_for(lambda: server.metric("glassbox_actions_total", rule="too-far"), lambda value: value is not None)
        time.sleep(4.0)  # by then it is in force in every process
        return audit

    return set_rule


def counted(server: "GlassboxServer", action: str, outcome: str) -> float:
    return server.metric("glassbox_actions_total", rule="too-far", action=action, outcome=outcome) or 0.0


class TestAbort:
    @pytest.mark.timeout(900)
    def test_within_a_second_under_load(self, server: "GlassboxServer", threshold: Threshold, rules: Any) -> None:
        """Streamed, beside others that are served as without it; and everybody who should hears why."""
        with WebhookReceiver() as receiver, ThreadPoolExecutor() as pool:
            expected = list(pool.map(lambda prompt: stream(server, prompt, 160), OTHERS))
            alone = stream(server, PROMPT, 120)
            audit = rules(do=["log", "tag", "abort", "webhook"], dry_run=False, webhook=receiver.url)
            before = counted(server, "abort", "done")
            traces: list[RequestTrace] = []

            def ask() -> float:
                """How long after the token that the rule is about the request ended."""
                beside = pool.map(lambda prompt: stream(server, prompt, 160), OTHERS)
                ended = stream(server, PROMPT, TOKENS, glassbox="trace")
                others = list(beside)
                trace = trace_of(server, ended.id)
                traces.append(trace)
                crossed = threshold.crossed(trace)
                late_s = ended.end_s - ended.times_s[crossed]
                print(f"crossed with token {crossed}, ended after {len(ended.tokens)}, {late_s:.3f} s later")
                assert AFTER - 5 < crossed < len(ended.tokens) < TOKENS
                assert ("abort", ("too-far",)) == (ended.finish_reason, ended.rules)
                assert {()} == {one.rules for one in others}
                assert 0 <= late_s
                assert alone.tokens[: len(ended.tokens)] == ended.tokens[: len(alone.tokens)]
                assert [one.tokens for one in expected] == [one.tokens for one in others]
                assert {"length"} == {one.finish_reason for one in others}
                assert "aborted" == trace.status
                return late_s

            require_within(1.0, ask)
            wait_for(lambda: counted(server, "abort", "done"), lambda value: value == before + len(traces))

            def told_of() -> set[str]:
                """Events by their ids: a busy receiver may have got one more than once."""
                return {one.headers["webhook-id"] for one in receiver.received}

            wait_for(told_of, lambda ids: len(ids) == len(traces), what="the events")
        got = receiver.received[-1]
        openai.OpenAI(api_key="none", webhook_secret=SECRET).webhooks.verify_signature(got.body, got.headers)
        trace, told = traces[-1], json.loads(got.body)["data"]
        assert (trace.request_id, "too-far", False) == (told["request_id"], told["rule"], told["dry_run"])
        assert told["value"] > 0.5
        assert told["scores"]["probes"]["far"]["score"] == pytest.approx(told["value"], rel=1e-5)
        lines = wait_for(lambda: audit.read_text().splitlines(), lambda found: len(found) == 4 * len(traces))
        assert {"log", "tag", "abort", "webhook"} == {json.loads(line)["action"] for line in lines}
        assert {"done"} == {json.loads(line)["outcome"] for line in lines}
        shown = httpx.get(f"{server.url}/glassbox/v1/requests/{trace.internal_id}", timeout=60.0).json()
        assert "aborted" == shown["status"]
        assert {"too-far"} == {act["rule"] for act in shown["scores"]["actions"]}
        assert [] == [path.name for path in (server.run_dir / orders.FOLDER).iterdir()]

    @pytest.mark.timeout(900)
    def test_a_whole_answer(self, server: "GlassboxServer", rules: Any) -> None:
        """The openai client tells it from a normal end, and a header which rule it was; a request without a trace
        goes on."""
        rules(do=["abort"], dry_run=False)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        asked = {"model": MODEL_NAME, "max_tokens": TOKENS, "temperature": 0, "prompt": PROMPT}

        def ask(**xargs: Any) -> Any:
            extra = {"ignore_eos": True, "vllm_xargs": xargs}
            return client.completions.with_raw_response.create(**asked, extra_body=extra)

        with ThreadPoolExecutor() as pool:
            traced, other = pool.submit(ask, glassbox="trace"), pool.submit(ask)
            answer, untouched = traced.result(), other.result()
        (choice,) = answer.parse().choices
        assert "abort" == choice.finish_reason
        assert "too-far" == answer.headers["x-glassbox-rules"]
        assert AFTER < answer.parse().usage.completion_tokens < TOKENS
        assert "length" == untouched.parse().choices[0].finish_reason
        assert "x-glassbox-rules" not in untouched.headers
        assert untouched.parse().choices[0].text.startswith(choice.text)


class TestDryRun:
    @pytest.mark.timeout(900)
    def test_says_what_it_would_do(self, server: "GlassboxServer", rules: Any) -> None:
        """By default nothing is done, and it is counted, logged and written down."""
        audit = rules(do=["abort", "tag"])
        before = counted(server, "abort", "dry_run")
        assert "length" == stream(server, PROMPT, 120, glassbox="trace").finish_reason
        wait_for(lambda: counted(server, "abort", "dry_run"), lambda value: value == before + 1)
        lines = [json.loads(line) for line in wait_for(lambda: audit.read_text().splitlines(), lambda n: len(n) > 1)]
        assert [("abort", "dry_run"), ("tag", "dry_run")] == [(line["action"], line["outcome"]) for line in lines]
        # The exporter's lines come by way of the worker.
        wait_for(server.log_path.read_text, lambda log: "It is a dry run; it would do: abort, tag" in log)


class TestDeadWebhook:
    @pytest.mark.timeout(900)
    def test_ten_thousand_events_slow_nobody(self, server: "GlassboxServer", tmp_path: Path) -> None:
        """An address that takes connections and never answers: requests whose rules post to it take no longer than
        those in turn with them that no rule is about, and nothing is left open."""
        feature = ProbeFeature("prompt_entropy_ratio_L0_H0", 0.5, 1.0, 0.1)
        trained = Trained("smollm2", 2, 1, "2026-01-01T00:00:00Z", "none.parquet")
        write_probe(tmp_path / "always.json", Probe("always", "any", (feature,), 9.0, Platt(1.0, 0.0), 0.5, trained))
        secret = tmp_path / "secret"
        secret.write_text(SECRET)
        secret.chmod(0o600)
        with socket.create_server(("127.0.0.1", 0)) as dead:
            webhook = {"url": f"http://127.0.0.1:{dead.getsockname()[1]}/", "secret_file": str(secret)}
            rule = {"probe": "always", "above": 0.5, "do": ["webhook"], "dry_run": False, "per_minute": 6000}
            server.edit_config(
                probes=[{"file": str(tmp_path / "always.json")}],
                requests={"keep": 4096},
                actions={"rules": [{"name": f"w{i}", **rule, "webhook": webhook} for i in range(RULES)]},
            )
            wait_for(lambda: server.metric("glassbox_actions_total", rule=f"w{RULES - 1}"), lambda n: n is not None)
            time.sleep(4.0)  # by then it is in force in every process

            def posted() -> float:
                return server.metric("glassbox_actions_total", action="webhook") or 0.0

            def turn(layer: int) -> list[float]:
                """Seconds of each request; those traced in another layer than 0 have no score."""

                def ask(number: int) -> float:
                    began_s = time.monotonic()
                    xargs = {"glassbox": "trace", "glassbox_layers": [layer]}
                    server.complete(f"{number} boats came", max_tokens=2, ignore_eos=True, vllm_xargs=xargs)
                    return time.monotonic() - began_s

                with ThreadPoolExecutor(CLIENTS) as pool:
                    return list(pool.map(ask, range(REQUESTS)))

            def open_now() -> dict[int, tuple[int, int]]:
                return {one.pid: (one.num_fds(), one.num_threads()) for one in server.processes()}

            turn(1)
            before, opened = posted(), open_now()
            assert RULES * REQUESTS * TURNS > 10_000
            blocks = 0

            def slowed() -> float:
                """By how much the median is larger than that of the others, beyond what chance makes of it."""
                nonlocal blocks
                with_rules, without = [], []
                for _ in range(TURNS):
                    with_rules += turn(0)
                    without += turn(1)
                blocks += 1
                median, usual = statistics.median(with_rules), statistics.median(without)
                print(f"median of {len(with_rules)}: {median * 1000:.1f} ms, without {usual * 1000:.1f} ms")
                assert max(with_rules) < max(5.0, 2 * max(without)), "an attempt takes five seconds"
                return median - 1.5 * usual

            require_within(0.02, slowed, attempts=3)
            events = RULES * REQUESTS * TURNS * blocks
            # All but those that wait for their turn are settled: dropped, for so many are never kept.
            settled = wait_for(posted, lambda now: now >= before + events - MAX_WAITING - 1, 60.0, "the events")
            assert settled - before <= events
            wait_for(
                open_now,
                lambda now: all(
                    count <= was + 8
                    for pid, counts in now.items()
                    for count, was in zip(counts, opened[pid], strict=True)
                ),
                what="what was opened to be closed",
            )
