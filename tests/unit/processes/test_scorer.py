"""Traces are scored once, by every probe and signal that is asked for, and whatever fails keeps nothing else back."""

import json
import threading
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import export_errors
from glassbox.core.logs import get_logger
from glassbox.core.trace_options import TraceOptions
from glassbox.processes.exporter import scorer as scorer_module
from glassbox.processes.exporter import sink as sink_module
from glassbox.processes.exporter import trace_sinks
from glassbox.processes.exporter.trace_sinks import WAIT_FOR_SCORES_S, TraceSinks
from glassbox.signals.probe import Probe, ProbeScore
from glassbox.signals.scores import Scores
from glassbox.store.awaited_ranks import WAIT_FOR_RANKS_S
from glassbox.store.llm_spans import write as write_span
from glassbox.store.score_files import ScoreFiles
from glassbox.store.score_totals import read_totals
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import RequestTrace, trace_name, write_trace
from tests import probe_samples
from tests.export_samples import limited_file_size, make_snapshot
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.trace_samples import make_trace
from tests.unit.store.test_llm_spans import make_span
from tests.waiting import wait_for

ENGINE = ("tiny/model", "0")


class Exporter:
    """The trace sinks of a server."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.records = folder / "run", folder / "records.jsonl"
        self.run_dir.mkdir()
        self.now = 1_700_000_100.0
        self.scored: list[Scores] = []
        self.settings: dict[str, Any] = {
            "probes": [{"file": str(probe_samples.write(folder))}],
            "requests": {"records": {"path": str(self.records)}},
        }
        self.errors = export_errors(get_logger("glassbox.tests"))
        self.sinks = self.start()

    def start(self) -> TraceSinks:
        config = lambda: GlassboxConfig.model_validate(self.settings)  # noqa: E731
        on_scored = lambda _, scores: self.scored.append(scores)  # noqa: E731
        return TraceSinks(self.run_dir, config, self.errors, {}, lambda: self.now, on_scored=on_scored)

    def trace(self, seed: int = 1, **changes: Any) -> RequestTrace:
        trace = make_trace(seed=seed, request_id=f"cmpl-{seed}-0", **changes)
        write_trace(traces_path(self.run_dir), trace)
        return trace

    def round(self, skip_present: bool = False, last: bool = False) -> None:
        self.sinks.apply(skip_present)
        self.sinks.round(last)

    def written(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.records.read_text().splitlines()] if self.records.exists() else []

    def outcomes(self, probe: str = "drift") -> dict[str, int]:
        totals = read_totals(self.run_dir)
        assert totals is not None
        found = totals.engines[ENGINE].probes[probe].outcomes
        return {outcome: count for outcome, count in found.items() if count}

    def is_scored(self, trace: RequestTrace) -> bool:
        files = ScoreFiles(self.run_dir)
        files.refresh()
        return files.of((trace.engine, trace.internal_id, trace.client)) is not None

    def summary(self, trace: RequestTrace) -> dict[str, Any]:
        files = ScoreFiles(self.run_dir)
        files.refresh()
        stored = files.of((trace.engine, trace.internal_id, trace.client))
        assert stored is not None
        return stored.summary


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporter]:
    """Each round of which ends with all that it scores, however long a busy machine takes."""
    for name in ("_SCORING_PATIENCE_S", "_LAST_SCORING_PATIENCE_S"):
        monkeypatch.setattr(trace_sinks, name, 60.0)
    monkeypatch.setattr(trace_sinks, "_FLUSH_TIMEOUT_S", 60.0)
    monkeypatch.setattr(sink_module, "PATIENCE_S", 120.0)
    exporter = Exporter(tmp_path)
    yield exporter
    exporter.sinks.close()
    threads = lambda: [thread for thread in threading.enumerate() if thread.name == "glassbox-scoring"]  # noqa: E731
    wait_for(lambda: not threads(), what="the thread to end")


class TestScores:
    def test_the_score_is_that_of_the_traces_numbers(self, exporter: Exporter) -> None:
        """In the file, the record of the same round, and the counts."""
        traces = [exporter.trace(seed) for seed in range(8)]
        exporter.round()
        true = {trace.request_id: probe_samples.score_of(trace) for trace in traces}
        assert 0.05 < min(true.values()) < max(true.values()) < 0.95
        assert pytest.approx(true, rel=1e-5) == {
            record["request_id"]: record["scores"]["probes"]["drift"]["score"] for record in exporter.written()
        }
        above = sum(score >= 0.5 for score in true.values())
        assert {"above": above, "below": 8 - above} == exporter.outcomes()
        totals = read_totals(exporter.run_dir)
        assert totals is not None
        found = totals.engines[ENGINE].probes["drift"]
        assert pytest.approx(sum(true.values())) == found.total
        bounds = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
        up_to = [sum(score <= bound for score in true.values()) for bound in bounds]
        assert [*up_to, 8] == list(accumulate(found.buckets))

    def test_once(self, exporter: Exporter) -> None:
        """Also after a restart, which goes on counting; what ended in between is scored."""
        exporter.trace(1)
        exporter.round()
        exporter.round()
        exporter.sinks.close()
        exporter.trace(2)
        exporter.sinks = exporter.start()
        exporter.round(skip_present=True)
        assert 2 == sum(exporter.outcomes().values()) == len(exporter.scored)
        assert 2 == len(exporter.written())

    def test_a_probe_of_an_edit(self, exporter: Exporter, tmp_path: Path) -> None:
        """It scores what ends from then on, and has series before that."""
        before, exporter.settings["probes"] = exporter.settings["probes"], []
        exporter.trace(1)
        exporter.round()
        exporter.settings["probes"] = before
        exporter.round(skip_present=True)
        totals = read_totals(exporter.run_dir)
        assert totals is not None
        assert (("drift",), {}) == (totals.names, totals.engines)
        exporter.trace(2)
        exporter.round(skip_present=True)
        assert 1 == sum(exporter.outcomes().values())

    def test_signals_that_a_client_asked_for(self, exporter: Exporter) -> None:
        """Without any probe: computed, or refused in words, and counted."""
        exporter.settings["probes"] = []
        trace = exporter.trace(1, options=TraceOptions(signals=("focus", "spectral")))
        exporter.trace(2)
        exporter.round(skip_present=True)
        signals = exporter.summary(trace)["signals"]
        assert {"mass", "mass_system", "mass_user"} == signals["focus"]["values"].keys()
        assert "refused" not in signals["focus"]
        assert "rows of 4 of 9 tokens are missing" in signals["spectral"]["refused"]
        totals = read_totals(exporter.run_dir)
        assert totals is not None
        assert {
            "focus": {"computed": 1, "refused": 0},
            "spectral": {"computed": 0, "refused": 1},
        } == totals.engines[ENGINE].signals
        assert 1 == len(exporter.scored)

    def test_files_go_with_their_traces(self, exporter: Exporter) -> None:
        """No score is kept longer than its trace."""
        trace = exporter.trace(1)
        exporter.trace(2)
        exporter.round()
        name = trace_name(trace.engine, trace.rank, trace.instance, trace.client, trace.internal_id)
        (traces_path(exporter.run_dir) / name).unlink()
        exporter.round()
        assert 1 == len(list((exporter.run_dir / "scores").iterdir()))


class TestFailures:
    def test_a_probe_that_fails(self, exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is counted and said; the other probe's score and the record are there."""
        exporter.settings["probes"].append({"file": str(probe_samples.write(tmp_path, "other"))})
        true = Probe.score

        def fail(probe: Probe, *of_trace: Any) -> ProbeScore | None:
            if probe.name == "drift":
                raise ArithmeticError("odd")
            return true(probe, *of_trace)

        monkeypatch.setattr(Probe, "score", fail)
        trace = exporter.trace(1)
        exporter.round()
        (record,) = exporter.written()
        assert {"score": None, "reason": "ArithmeticError: odd"} == record["scores"]["probes"]["drift"]
        assert pytest.approx(probe_samples.score_of(trace), rel=1e-5) == record["scores"]["probes"]["other"]["score"]
        assert {"failed": 1} == exporter.outcomes()
        assert {"scores": 1} == exporter.errors.counts()

    def test_a_trace_without_what_a_probe_reads(self, exporter: Exporter) -> None:
        """No score, a reason, and a count."""
        trace = exporter.trace(1, layers=(3, 4))
        exporter.round()
        assert exporter.summary(trace)["probes"]["drift"] == {
            "score": None,
            "reason": "the request has no value of any of its features",
        }
        assert {"no_value": 1} == exporter.outcomes()
        assert {} == exporter.errors.counts()

    def test_a_trace_without_a_part_of_it(self, exporter: Exporter) -> None:
        """The score says which feature its mean stood for."""
        trace = exporter.trace(1, heads=(0, 2))
        exporter.round()
        found = exporter.summary(trace)["probes"]["drift"]
        assert (1, ["answer_lookback_ratio_L0_H1"]) == (found["missing"], found["missing_features"])
        totals = read_totals(exporter.run_dir)
        assert totals is not None
        assert 1 == totals.engines[ENGINE].probes["drift"].missing

    def test_a_full_disk(self, exporter: Exporter) -> None:
        """The trace comes again, and counts once."""
        exporter.round()
        exporter.trace(1)
        with limited_file_size(10):
            exporter.round()
        assert 0 < exporter.errors.counts()["scores"]
        exporter.round()
        assert 1 == sum(exporter.outcomes().values())

    def test_a_file_that_breaks_while_serving(self, exporter: Exporter) -> None:
        """The probe that was read last goes on, and it is said once; a mended one takes its place."""
        path = Path(exporter.settings["probes"][0]["file"])
        good = path.read_text()
        exporter.round()
        path.write_text("{")
        exporter.trace(1)
        exporter.round()
        exporter.round()
        assert 1 == sum(exporter.outcomes().values())
        assert {"scores": 1} == exporter.errors.counts()
        path.write_text(good.replace('"threshold": 0.5', '"threshold": 0.0'))
        trace = exporter.trace(2)
        exporter.round()
        assert exporter.summary(trace)["probes"]["drift"]["above"]

    def test_a_signal_that_takes_long_holds_nothing_up(
        self, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rounds go on; a record waits for its scores for a while, and then goes without."""
        go_on, true = threading.Event(), scorer_module.scores_of

        def slow(*args: Any, **options: Any) -> Scores:
            assert go_on.wait(120)
            return true(*args, **options)

        monkeypatch.setattr(scorer_module, "scores_of", slow)
        monkeypatch.setattr(trace_sinks, "_SCORING_PATIENCE_S", 0.5)
        # Written after its end only: with a long export.interval_s, or as the last rank's part.
        exporter.trace(1, end_time_s=exporter.now - 2 * WAIT_FOR_SCORES_S)
        exporter.round()
        exporter.round()
        assert [] == exporter.written()
        exporter.now += WAIT_FOR_SCORES_S
        exporter.round()
        (record,) = exporter.written()
        assert not record["scores"]["final"]
        assert {} == exporter.errors.counts()
        go_on.set()
        exporter.sinks.scores.give(lambda scorer: scorer.look(60))
        assert 1 == sum(exporter.outcomes().values())


class TestRanks:
    def test_the_last_one_is_waited_for(self, exporter: Exporter) -> None:
        """Each writes when its own interval is over; only then is the request scored and recorded, with the heads of
        both. Of one that never writes the others' part is taken in the end."""
        heads = (0, 1), (2, 3)
        for rank, of_rank in enumerate(heads):
            place = {"rank": rank, "head_offset": of_rank[0], "total_heads": 4}
            write_snapshot(exporter.run_dir, make_snapshot(layers=(0, 3), instance=f"i{rank}", **place))

        def write(rank: int, seed: int) -> RequestTrace:
            at = {"rank": rank, "instance": f"i{rank}", "heads": heads[rank]}
            return exporter.trace(seed, end_time_s=exporter.now - 1, **at)

        write(0, 1)
        exporter.round()
        assert ([], []) == (exporter.scored, exporter.written())
        write(1, 1)
        exporter.round()
        assert [[0, 1, 2, 3]] == [one["heads"] for one in exporter.written()]
        assert 1 == len(exporter.scored)
        write(0, 2)
        exporter.round()
        exporter.now += WAIT_FOR_RANKS_S
        exporter.round()
        assert [[0, 1, 2, 3]] == [one["heads"] for one in exporter.written()], "it may write after its interval only"
        exporter.now += 5.0
        exporter.round()
        assert [[0, 1, 2, 3], [0, 1]] == [one["heads"] for one in exporter.written()]
        write(1, 3)
        exporter.round(last=True)
        assert 3 == len(exporter.scored)
        assert ["finished"] * 3 == [one["status"] for one in exporter.written()]


class TestManyDearOnes:
    def test_cheap_ones_and_other_clients_first(self, exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of one client's many requests with signals on demand none holds up a request of another."""
        order, true = [], scorer_module.scores_of

        def note(trace: RequestTrace, *args: Any, **options: Any) -> Scores:
            order.append(trace.request_id)
            return true(trace, *args, **options)

        monkeypatch.setattr(scorer_module, "scores_of", note)
        dear = TraceOptions(signals=("tracker",))
        for seed in range(1, 7):
            exporter.trace(10 + seed, options=dear, client="0" * 24)
        exporter.trace(1, options=dear, client="1" * 24)
        exporter.trace(2, client="1" * 24)
        exporter.round()
        assert "cmpl-2-0" == order[0]
        assert "cmpl-1-0" in order[1:3]
        assert 8 == len(order)

    def test_what_ends_meanwhile(self, exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is scored before the dear ones that were there, once the round's time is up; each is scored once."""
        monkeypatch.setattr(scorer_module, "ROUND_S", 0.0)
        dear = [exporter.trace(seed, options=TraceOptions(signals=("tracker",))) for seed in (1, 2)]
        exporter.round()
        assert 1 == sum(exporter.is_scored(trace) for trace in dear)
        cheap = exporter.trace(3)
        exporter.round()
        assert exporter.is_scored(cheap)
        assert 1 == sum(exporter.is_scored(trace) for trace in dear)
        exporter.round()
        exporter.round()
        assert all(exporter.is_scored(trace) for trace in dear)
        assert 3 == len(exporter.scored) == sum(exporter.outcomes().values())


class TestSpans:
    def test_a_receiver_gets_span_score_and_event(self, exporter: Exporter) -> None:
        """In the same round: the score as attribute of the span, and as an event with the conventions' names."""
        with OtlpReceiver() as receiver:
            exporter.settings["export"] = {
                "otel": {"enabled": True, "endpoint": receiver.grpc_endpoint, "metrics": False}
            }
            trace = exporter.trace(1)
            exporter.round()
            exporter.sinks.close()
            (span,) = receiver.spans()
        score = pytest.approx(probe_samples.score_of(trace), rel=1e-5)
        said = attributes(span.attributes)
        assert score == said["glassbox.probe.drift.score"]
        (event,) = (event for event in span.events if event.name == "gen_ai.evaluation.result")
        found = attributes(event.attributes)
        explanation = found.pop("gen_ai.evaluation.explanation")
        assert explanation == "probability of 'lost' by attention; the threshold is 0.5"
        label = "lost" if probe_samples.score_of(trace) >= 0.5 else "not lost"
        assert label == said["glassbox.probe.drift.label"]
        assert found == {
            "gen_ai.evaluation.name": "drift",
            "gen_ai.evaluation.score.value": score,
            "gen_ai.evaluation.score.label": label,
            "gen_ai.response.id": "cmpl-1-0",
        }

    @pytest.mark.parametrize("protocol", ["grpc", "http"])
    def test_the_event_as_a_log_record(self, exporter: Exporter, protocol: str) -> None:
        """As the conventions have it: named, in the trace, of the operation's span; then the span has no such event."""
        with OtlpReceiver() as receiver:
            otel = {"enabled": True, "endpoint": receiver.endpoint(protocol), "protocol": protocol, "metrics": False}
            exporter.settings["export"] = {"otel": {**otel, "logs": True}}
            trace = exporter.trace(1)
            write_span(exporter.run_dir, make_span(7, "cmpl-2-0"))
            exporter.trace(2)
            exporter.round()
            exporter.sinks.close()
            spans = {attributes(span.attributes)["gen_ai.request.id"]: span for span in receiver.spans()}
            records = {attributes(one.attributes)["gen_ai.response.id"]: one for one in receiver.log_records()}
        assert {"cmpl-1-0", "cmpl-2-0"} == spans.keys() == records.keys()
        for request_id, span in spans.items():
            assert ["glassbox.tokens"] == [event.name for event in span.events]
            assert "gen_ai.evaluation.result" == records[request_id].event_name
            assert span.trace_id == records[request_id].trace_id
        assert spans["cmpl-1-0"].span_id == records["cmpl-1-0"].span_id
        assert f"{7:016x}" == records["cmpl-2-0"].span_id.hex() == spans["cmpl-2-0"].parent_span_id.hex()
        found = attributes(records["cmpl-1-0"].attributes)
        assert "drift" == found["gen_ai.evaluation.name"]
        assert pytest.approx(probe_samples.score_of(trace), rel=1e-5) == found["gen_ai.evaluation.score.value"]
        assert {} == exporter.errors.counts()

    def test_a_collector_without_logs(self, exporter: Exporter) -> None:
        """It is counted; the spans are there."""
        with OtlpReceiver() as receiver:
            otel = {"enabled": True, "endpoint": receiver.http_endpoint, "protocol": "http", "metrics": False}
            exporter.settings["export"] = {"otel": {**otel, "logs": True}}
            receiver.refuses = "/v1/logs"
            exporter.trace(1)
            exporter.round()
            exporter.sinks.close()
            assert 1 == len(list(receiver.spans()))
        assert {"otel_traces": 1} == exporter.errors.counts()
