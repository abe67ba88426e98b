"""What rules do: judged while requests run and when they have ended; each action has an outcome, and none waits."""

import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import export_errors
from glassbox.core.logs import get_logger
from glassbox.core.statistics import INDEX
from glassbox.export.attention_spans import attributes
from glassbox.export.liveness import Life, liveness_families
from glassbox.export.webhooks import MAX_BODY_BYTES, MAX_WAITING
from glassbox.processes.exporter import sink as sink_module
from glassbox.processes.exporter import trace_sinks
from glassbox.processes.exporter.acting import ANSWER_S, Acting
from glassbox.processes.exporter.action_watch import ActionWatch
from glassbox.processes.exporter.sinks import Sinks
from glassbox.signals.probe import Platt, Probe, ProbeFeature, Trained, write_probe
from glassbox.signals.scores import scores_of
from glassbox.store import orders
from glassbox.store.acts import acts_of
from glassbox.store.exporter_status import read_status
from glassbox.store.orders import OrderReader
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import RequestTrace, write_trace
from tests.export_samples import limited_file_size, logged, make_snapshot
from tests.trace_samples import make_trace
from tests.unit.export.test_webhooks import SECRET
from tests.webhook_receiver import WebhookReceiver

# Of the mean of one statistic over the answer's rows: above a half where that is above 0.5.
PROBE = Probe(
    "far",
    "far",
    (ProbeFeature("answer_top1_ratio_L0_H0", 0.5, 1.0, 1.0),),
    0.0,
    Platt(50.0, 0.0),
    0.5,
    Trained("tiny", 2, 1, "2026-01-01T00:00:00Z", "none.parquet"),
)


class Server:
    """A run directory with an exporter's rules at work, a clock and a configuration of the test's."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.audit_path = folder / "run", folder / "audit.jsonl"
        self.run_dir.mkdir()
        self.secret = folder / "secret"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o600)
        self.now = time.time()
        self.rules: list[dict[str, Any]] = []
        self.errors = export_errors(get_logger("glassbox.tests"))
        self.acting = Acting(self.run_dir, self.errors, clock=lambda: self.now)
        self.watch = ActionWatch(
            self.run_dir, self.config, lambda: [PROBE], self.errors, clock=lambda: self.now, acting=self.acting
        )

    def config(self) -> GlassboxConfig:
        """In force."""
        actions = {"audit": {"path": str(self.audit_path)}, "rules": self.rules}
        return GlassboxConfig.model_validate({"actions": actions})

    def rule(self, *do: str, **fields: Any) -> None:
        self.rules = [{"name": "r", "probe": "far", "above": 0.5, "do": list(do), "dry_run": False, **fields}]

    def write(self, trace: RequestTrace) -> None:
        write_trace(traces_path(self.run_dir), trace)

    def look(self) -> None:
        self.watch.look(self.config())
        self.collect()

    def collect(self) -> None:
        self.acting.collect(self.config().actions)

    def end(self, trace: RequestTrace) -> None:
        self.watch.ended(trace, scores_of(trace, [PROBE]))
        self.collect()

    def counts(self) -> dict[str, int]:
        return dict(self.watch.counts())

    def audit(self) -> list[dict[str, Any]]:
        text = self.audit_path.read_text() if self.audit_path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def ordered(self) -> list[orders.Order]:
        return list(OrderReader(self.run_dir).fresh(self.now))


def trace(seed: int = 1, value: float = 0.9, running: bool = False, **changes: Any) -> RequestTrace:
    """Of a request, whose rows all have this value."""
    made = make_trace(seed=seed, request_id=f"cmpl-{seed}-0", top_k=0, spans=(), attention=False)
    stats = made.arrays["stats"].copy()
    stats[..., INDEX["top1_ratio"]] = value
    status = {"status": "active", "end_time_s": None} if running else {"end_time_s": time.time() + 60}
    return replace(made, arrays={**made.arrays, "stats": stats}, **{**status, **changes})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.acting.close(server.config().actions)


class TestRunning:
    def test_an_order_and_its_answer(self, server: Server) -> None:
        """The API server is asked to end the request; what it says is the outcome."""
        server.rule("abort")
        server.write(trace(running=True, value=0.1))
        server.look()
        assert [] == server.ordered()
        server.write(trace(running=True, num_generated=5))
        server.look()
        (order,) = server.ordered()
        assert ("cmpl-1-0-00000001", "cmpl-1-0", "abort", "r") == (
            order.internal_id, order.request_id, order.do, order.rule,
        )  # fmt: skip
        server.look()
        assert {} == server.counts()
        orders.answer(server.run_dir, order, "done")
        server.look()
        assert {"r|abort|done": 1} == server.counts()
        assert [] == list((server.run_dir / orders.FOLDER).iterdir())
        (line,) = server.audit()
        assert ("r", "probe far above 0.5", "abort", "done", "cmpl-1-0", False) == tuple(
            line[key] for key in ("rule", "condition", "action", "outcome", "request_id", "dry_run")
        )
        (act,) = acts_of(server.run_dir, ("0", "cmpl-1-0-00000001", None))
        assert ("r", "abort", "done") == (act.rule, act.action, act.outcome)

    def test_nobody_answers(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        """After some seconds that is said, with the reason, and the order is taken back."""
        server.rule("abort", "tag")
        server.write(trace(running=True))
        server.look()
        server.now += ANSWER_S + 0.1
        server.look()
        # A tag is in record and span whatever becomes of the header.
        assert {"r|abort|failed": 1, "r|tag|done": 1} == server.counts()
        assert any("aborts failed: rule r: no API server of" in line for line in logged(caplog.records))
        assert [] == list((server.run_dir / orders.FOLDER).iterdir())

    def test_an_id_that_no_order_has_room_for(self, server: Server) -> None:
        """Nobody would read it, which is said at once."""
        server.rule("abort")
        long = trace(running=True, internal_id="x" * 600_000, request_id="x" * 600_000)
        (match,) = server.watch._book.judge(server.config().actions.rules, "x", {"r": 0.9}, 9, ended=False)
        server.acting.perform(match, long, {})
        assert {"r|abort|failed": 1} == server.counts()
        server.collect()
        assert "an order must have at most 1048576 bytes, got 1200" in server.audit()[0]["why"]

    def test_it_had_ended(self, server: Server) -> None:
        """A rule that applies only with the last token ends nothing, and says so."""
        server.rule("abort", "tag")
        server.end(trace())
        assert {"r|abort|late": 1, "r|tag|done": 1} == server.counts()
        assert [] == server.ordered()

    def test_others_wait_for_the_end(self, server: Server) -> None:
        """A rule that doesn't watch running requests is judged once they have ended."""
        server.rule("log")
        server.write(trace(running=True))
        server.look()
        assert {} == server.counts()
        server.end(trace())
        assert {"r|log|done": 1} == server.counts()

    def test_one_rank_has_ended(self, server: Server) -> None:
        """The other one's part is waited for: what has ended is not judged as if it ran, by half of its heads."""
        server.rule("abort")
        for rank in range(2):
            place = {"rank": rank, "head_offset": 3 * rank, "heads": 3, "total_heads": 6}
            write_snapshot(server.run_dir, make_snapshot(layers=(0, 3), instance=f"i{rank}", **place))
        server.write(trace(end_time_s=server.now))
        server.look()
        assert [] == server.ordered()
        server.write(trace(running=True))
        server.look()
        assert 1 == len(server.ordered()), "a running one is judged by what there is"

    def test_what_ended_before_the_rule(self, server: Server) -> None:
        """An edit that brings a rule, or a probe, does nothing about requests that had ended; a restart does."""
        server.rule("log")
        server.end(trace(end_time_s=server.now - 1))
        assert {} == server.counts()
        server.end(trace(end_time_s=server.now + 1))
        assert {"r|log|done": 1} == server.counts()
        again = ActionWatch(server.run_dir, server.config, lambda: [PROBE], server.errors, goes_on=True)
        old = trace(seed=2, end_time_s=server.now - 1)
        again.ended(old, scores_of(old, [PROBE]))
        assert {"r|log|done": 1} == dict(again.counts())
        again._acting.close(server.config().actions)

    def test_a_trace_that_cannot_be_scored(self, server: Server) -> None:
        """Others are judged all the same."""
        server.rule("log", when="running")
        broken = trace(seed=2, running=True)
        path = write_trace(traces_path(server.run_dir), broken)
        path.write_bytes(path.read_bytes()[:-40])
        server.write(trace(running=True))
        server.look()
        assert {"r|log|done": 1} == server.counts()


class TestHowFar:
    def test_a_dry_run(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        """Nothing is done, and it is said of each action."""
        server.rule("log", "tag", "abort", "webhook", dry_run=True)
        with WebhookReceiver() as receiver:
            server.rules[0]["webhook"] = {"url": receiver.url, "secret_file": str(server.secret)}
            server.write(trace(running=True))
            server.look()
            server.acting.close(server.config().actions)
            assert [] == receiver.received
        assert dict.fromkeys((f"r|{action}|dry_run" for action in ("log", "tag", "abort", "webhook")), 1) == (
            server.counts()
        )
        assert [] == server.ordered()
        told = logged(caplog.records)
        assert any("request cmpl-1-0 has probe far at 1, above 0.5. It is a dry run" in line for line in told)
        assert {True} == {line["dry_run"] for line in server.audit()}

    def test_per_minute(self, server: Server) -> None:
        """Beyond it rules are counted only, and say so."""
        server.rule("log", "abort", per_minute=1)
        for seed in range(3):
            server.write(trace(seed=seed, running=True))
        server.look()
        assert {"r|log|done": 1, "r|log|limited": 2, "r|abort|limited": 2} == server.counts()
        assert 1 == len(server.ordered())

    def test_edited_away(self, server: Server) -> None:
        """Without rules nothing happens; with others those are judged."""
        server.rule("log", when="running")
        rules, server.rules = server.rules, []
        server.write(trace(running=True))
        server.look()
        server.end(trace())
        assert {} == server.counts()
        server.rules = rules
        server.look()
        assert {"r|log|done": 1} == server.counts()


class TestAudit:
    def test_a_full_disk(self, server: Server) -> None:
        """What couldn't be written comes with what follows."""
        server.rule("log")
        with limited_file_size(100):
            server.end(trace())
        assert ([], 1) == (server.audit(), server.errors.counts()["audit"])
        server.end(trace(seed=2))
        assert ["cmpl-1-0", "cmpl-2-0"] == [line["request_id"] for line in server.audit()]
        assert 0o600 == server.audit_path.stat().st_mode & 0o777


class TestWebhooks:
    def wait(self, server: Server) -> None:
        """For an outcome."""
        end_s = time.monotonic() + 60
        while not server.counts() and time.monotonic() < end_s:
            server.collect()
            time.sleep(0.01)

    def perform(self, server: Server, one: RequestTrace, scores: dict[str, Any]) -> None:
        (match,) = server.watch._book.judge(server.config().actions.rules, "x", {"r": 0.9}, 9, ended=True)
        server.acting.perform(match, one, scores)
        self.wait(server)

    def test_what_is_told(self, server: Server) -> None:
        """Rule, number, request and scores; the number is none that JSON lacks."""
        with WebhookReceiver() as receiver:
            server.rule("webhook", webhook={"url": receiver.url, "secret_file": str(server.secret)})
            server.end(trace(num_generated=3))
            self.wait(server)
        assert {"r|webhook|done": 1} == server.counts()
        (got,) = receiver.received
        body = json.loads(got.body)
        assert ("glassbox.rule_applied", "r", 0.5) == (body["type"], body["data"]["rule"], body["data"]["threshold"])
        assert body["data"]["scores"]["probes"]["far"]["score"] == pytest.approx(1.0)
        assert got.headers["webhook-id"] == server.audit()[0]["event"]

    def test_more_scores_than_an_event_has_room_for(self, server: Server, caplog: pytest.LogCaptureFixture) -> None:
        """A request that asks for every signal doesn't get past a rule: its event comes without scores."""
        values = {f"signal_{number}": {"mean": 0.5, "max_at": [1, 2]} for number in range(2000)}
        with WebhookReceiver() as receiver:
            server.rule("webhook", webhook={"url": receiver.url, "secret_file": str(server.secret)})
            self.perform(server, trace(), {"probes": {}, "signals": {"spectral": {"values": values}}})
        assert {"r|webhook|done": 1} == server.counts()
        (got,) = receiver.received
        assert (None, "r") == tuple(json.loads(got.body)["data"][key] for key in ("scores", "rule"))
        (line,) = [line for line in logged(caplog.records) if "tells no scores" in line]
        assert "may have 65536. The request's trace has them; have fewer signals asked for" in line

    def test_an_id_that_an_event_has_no_room_for(self, server: Server) -> None:
        """It has failed, and why is said: nothing waited."""
        server.rule("webhook", webhook={"url": "http://127.0.0.1:9/", "secret_file": str(server.secret)})
        self.perform(server, replace(trace(), request_id="x" * MAX_BODY_BYTES), {"probes": {}, "signals": {}})
        server.collect()
        assert {"r|webhook|failed": 1} == server.counts()
        (line,) = server.audit()
        assert re.match(
            r"an event must have at most 65536 bytes, got \d+ without scores, .* bound X-Request-Id", line["why"]
        )
        assert 1 == server.errors.counts()["webhooks"]

    def test_ten_thousand_to_a_dead_address(self, server: Server) -> None:
        """Each is accounted for, the queue is bounded, and none takes long."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
            server.rule("webhook", per_minute=6000, webhook={"url": url, "secret_file": str(server.secret)})
            one = trace()
            scores = scores_of(one, [PROBE])
            (match,) = server.watch._book.judge(server.config().actions.rules, "x", {"r": 0.9}, 9, ended=True)
            began_s = time.thread_time()
            for number in range(10_000):
                server.acting.perform(match, one, scores.summary())
                if number % 100 == 0:
                    server.collect()
            used_s = time.thread_time() - began_s
            server.acting.close(server.config().actions)
        assert 10_000 <= sum(server.counts().values()) + 1  # the one that is being tried
        assert server.counts()["r|webhook|dropped"] >= 10_000 - MAX_WAITING - 1
        assert used_s < 20


class TestExporter:
    def test_with_its_other_sinks(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An ended request is scored, judged and recorded with what was done; counts go on after a restart."""
        monkeypatch.setattr(trace_sinks, "_LAST_SCORING_PATIENCE_S", 60.0)
        monkeypatch.setattr(sink_module, "PATIENCE_S", 120.0)
        write_snapshot(server.run_dir, make_snapshot())
        probe, records = tmp_path / "far.json", tmp_path / "records.jsonl"
        write_probe(probe, PROBE)
        server.rule("log", "tag")
        settings = {
            "probes": [{"file": str(probe)}],
            "actions": {"audit": {"path": str(server.audit_path)}, "rules": server.rules},
            "requests": {"records": {"path": str(records)}},
        }
        config = GlassboxConfig.model_validate(settings)
        for seed in (1, 2):
            sinks = Sinks(server.run_dir, lambda: config, {})
            sinks.apply()
            now_s = time.time()
            server.write(trace(seed=seed, start_time_s=now_s - 1, end_time_s=now_s))
            sinks.round(last=True)
            status = read_status(server.run_dir)
            sinks.close()
            assert status is not None
            assert {"r|log|done": seed, "r|tag|done": seed} == status.actions
            assert {} == status.errors
            shown = {
                (series.labels, series.value)
                for family in liveness_families(Life((), 5.0, True, [("r", ("log", "tag"))]), server.run_dir, now_s)
                if family.name == "glassbox_actions_total"
                for series in family.series
            }
            assert {(("r", "log", "done"), seed), (("r", "log", "failed"), 0)} <= shown
        told = [json.loads(line) for line in records.read_text().splitlines()]
        assert ["cmpl-1-0", "cmpl-2-0"] == [one["request_id"] for one in told]
        assert [["log", "tag"]] * 2 == [[act["action"] for act in one["scores"]["actions"]] for one in told]
        assert ["r"] == attributes(trace(), told[0]["scores"])["glassbox.rules"]
        assert 4 == len(server.audit())
