"""Each ended trace reaches each sink once: also after a restart, a failure, an edit, or a span that comes late."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import export_errors
from glassbox.core.logs import get_logger
from glassbox.processes.exporter import sink as sink_module
from glassbox.processes.exporter import trace_sinks
from glassbox.processes.exporter.launch import wants_records, wants_spans
from glassbox.processes.exporter.trace_sinks import WAIT_FOR_LLM_SPAN_S, TraceSinks
from glassbox.store.llm_spans import write
from glassbox.store.tokenizer_note import write_source
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import write_trace
from tests.export_samples import limited_file_size
from tests.otlp_receiver import OtlpReceiver
from tests.trace_samples import make_trace
from tests.unit.export.test_token_text import make_tokenizer
from tests.unit.store.test_llm_spans import make_span


class Exporter:
    """The trace sinks of a server, with a clock and a configuration of the test's."""

    def __init__(self, run_dir: Path, **requests: Any) -> None:
        self.run_dir = run_dir
        self.now = 1_700_000_100.0
        self.settings: dict[str, Any] = {"requests": requests}
        self.errors = export_errors(get_logger("glassbox.tests"))
        self.sinks = self.start()

    def start(self) -> TraceSinks:
        config = lambda: GlassboxConfig.model_validate(self.settings)  # noqa: E731
        return TraceSinks(self.run_dir, config, self.errors, {}, lambda: self.now)

    def trace(self, seed: int, **changes: Any) -> None:
        write_trace(traces_path(self.run_dir), make_trace(seed=seed, request_id=f"cmpl-{seed}-0", **changes))

    def round(self, skip_present: bool = False, last: bool = False) -> None:
        self.sinks.apply(skip_present)
        self.sinks.round(last)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent in the end arrives, however long a busy machine takes."""
    monkeypatch.setattr(trace_sinks, "_FLUSH_TIMEOUT_S", 60.0)
    monkeypatch.setattr(sink_module, "PATIENCE_S", 120.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "traces.jsonl"


@pytest.fixture
def exporter(tmp_path: Path, path: Path) -> Exporter:
    (tmp_path / "run").mkdir()
    return Exporter(tmp_path / "run", records={"path": str(path)})


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def written(path: Path) -> list[str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["request_id"] for line in lines]


class TestRecords:
    def test_once_each(self, exporter: Exporter, path: Path) -> None:
        """In the order of their ends; active ones when they have ended."""
        exporter.trace(2)
        exporter.trace(1)
        exporter.trace(3, status="active", end_time_s=None)
        for _ in range(2):
            exporter.round()
        assert ["cmpl-1-0", "cmpl-2-0"] == written(path)
        exporter.trace(3, status="aborted")
        exporter.round()
        assert ["cmpl-1-0", "cmpl-2-0", "cmpl-3-0"] == written(path)

    def test_after_a_restart(self, exporter: Exporter, path: Path) -> None:
        """A new exporter goes on where the other ended: what ended in between isn't lost."""
        exporter.trace(1)
        exporter.round()
        exporter.trace(2)
        exporter.sinks = exporter.start()
        exporter.round(skip_present=True)
        assert ["cmpl-1-0", "cmpl-2-0"] == written(path)

    def test_opened_by_an_edit(self, exporter: Exporter, path: Path) -> None:
        """It gets what ends from then on; switched off and on again, too."""
        exporter.trace(1)
        exporter.round(skip_present=True)
        exporter.trace(2)
        exporter.round()
        exporter.settings["requests"] = {}
        exporter.round()
        exporter.trace(3)
        exporter.settings["requests"] = {"records": {"path": str(path)}}
        exporter.round(skip_present=True)
        exporter.trace(4)
        exporter.round()
        assert ["cmpl-2-0", "cmpl-4-0"] == written(path)

    def test_another_path(self, exporter: Exporter, path: Path) -> None:
        """The new file goes on where the old one ended."""
        exporter.trace(1)
        exporter.round()
        exporter.trace(2)
        other = path.with_name("other.jsonl")
        exporter.settings["requests"]["records"]["path"] = str(other)
        exporter.round(skip_present=True)
        assert (["cmpl-1-0"], ["cmpl-2-0"]) == (written(path), written(other))

    def test_a_full_disk(self, exporter: Exporter, path: Path) -> None:
        """It is counted, and the trace comes again."""
        exporter.trace(1)
        exporter.sinks.apply(False)
        with limited_file_size(10):
            exporter.sinks.round()
        assert {"records": 1} == exporter.errors.counts()
        exporter.round()
        assert ["cmpl-1-0"] == written(path)

    def test_a_trace_that_is_no_record(self, exporter: Exporter, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is counted and left out; those after it are written."""
        true = trace_sinks.document

        def fail(trace: Any, *parts: Any) -> Any:
            if trace.request_id == "cmpl-1-0":
                raise ValueError("odd")
            return true(trace, *parts)

        monkeypatch.setattr(trace_sinks, "document", fail)
        exporter.trace(1)
        exporter.trace(2)
        for _ in range(2):
            exporter.round()
        assert ["cmpl-2-0"] == written(path)
        assert {"records": 1} == exporter.errors.counts()

    def test_parquet_is_flushed_at_the_end(self, exporter: Exporter, path: Path) -> None:
        """The last round writes what waits."""
        pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra `tables`")
        exporter.settings["requests"]["records"] = {"path": str(path), "format": "parquet"}
        exporter.trace(1)
        exporter.round()
        assert not path.exists()
        exporter.round(last=True)
        exporter.sinks.close()
        assert ["cmpl-1-0"] == pq.read_table(path)["request_id"].to_pylist()

    @pytest.mark.parametrize("include_text", [False, True])
    def test_text_only_if_the_yaml_says_so(
        self, exporter: Exporter, path: Path, tmp_path: Path, include_text: bool
    ) -> None:
        """Although the trace holds ids, from when it was allowed."""
        pytest.importorskip("tokenizers", reason="comes with vLLM")
        write_source(exporter.run_dir, str(make_tokenizer(tmp_path / "model")), None)
        exporter.settings["requests"]["include_text"] = include_text
        exporter.trace(1)
        exporter.round()
        assert include_text == ("text" in json.loads(path.read_text()))


class TestSpans:
    @pytest.fixture
    def exporter(self, tmp_path: Path, receiver: OtlpReceiver) -> Exporter:
        made = Exporter(tmp_path)
        made.settings["export"] = {"otel": {"enabled": True, "endpoint": receiver.grpc_endpoint, "metrics": False}}
        return made

    def arrived(self, exporter: Exporter, receiver: OtlpReceiver, count: int) -> list[str]:
        """Ids of the parents of the spans, after all were sent."""
        exporter.sinks.close()
        spans = list(receiver.spans())
        assert count == len(spans)
        assert {} == exporter.errors.counts()
        return [span.parent_span_id.hex() for span in spans]

    def test_the_parent_is_there(self, exporter: Exporter, receiver: OtlpReceiver) -> None:
        """The span goes out at once, and only once."""
        write(exporter.run_dir, make_span(7, "cmpl-1-0"))
        exporter.trace(1)
        for _ in range(2):
            exporter.round()
        assert [f"{7:016x}"] == self.arrived(exporter, receiver, 1)

    def test_the_parent_comes_late(self, exporter: Exporter, receiver: OtlpReceiver) -> None:
        """It is waited for, a little."""
        exporter.trace(1, end_time_s=exporter.now)
        exporter.round()
        write(exporter.run_dir, make_span(7, "cmpl-1-0"))
        exporter.now += 1
        exporter.round()
        assert [f"{7:016x}"] == self.arrived(exporter, receiver, 1)

    @pytest.mark.parametrize(
        ("status", "waited_s", "last"),
        [
            ("finished", WAIT_FOR_LLM_SPAN_S, False),
            ("finished", 0.0, True),
            ("aborted", 0.0, False),
            ("lost", 0.0, False),
        ],
    )
    def test_no_parent_comes(
        self, exporter: Exporter, receiver: OtlpReceiver, status: Any, waited_s: float, last: bool
    ) -> None:
        """Not for long, not at the server's end, and not for requests that vLLM makes no span for."""
        exporter.trace(1, end_time_s=exporter.now, status=status)
        exporter.now += waited_s
        exporter.round(last=last)
        assert ["b7ad6b7169203331"] == self.arrived(exporter, receiver, 1)

    def test_samples_of_one_request(self, exporter: Exporter, receiver: OtlpReceiver) -> None:
        """With n > 1 each has a span of vLLM's, and gets a child."""
        for number in (1, 2):
            write(exporter.run_dir, make_span(number, "cmpl-5-0"))
            trace = make_trace(seed=number, request_id="cmpl-5-0")
            write_trace(traces_path(exporter.run_dir), replace(trace, internal_id=f"{number}_cmpl-5-0-abcdef00"))
        exporter.round()
        assert [f"{n:016x}" for n in (1, 2)] == sorted(self.arrived(exporter, receiver, 2))

    def test_another_request_with_the_same_id(self, exporter: Exporter, receiver: OtlpReceiver) -> None:
        """Its spans are not taken for this one's: the one that ended with the request is."""
        trace = make_trace(seed=1, request_id="cmpl-5-0")
        assert trace.end_time_s is not None
        for number, late_s in ((1, -30.0), (2, -0.02), (3, 20.0)):
            write(exporter.run_dir, make_span(number, "cmpl-5-0", end_time_s=trace.end_time_s + late_s))
        write_trace(traces_path(exporter.run_dir), trace)
        exporter.round()
        assert [f"{2:016x}"] == self.arrived(exporter, receiver, 1)

    def test_vllms_endpoint_is_told_late(self, exporter: Exporter, receiver: OtlpReceiver) -> None:
        """By the first request's span, when its trace is there already: nothing is lost by going over to it."""
        exporter.settings["export"]["otel"]["endpoint"] = None
        exporter.round()
        exporter.trace(1)
        write(exporter.run_dir, make_span(7, "cmpl-1-0", endpoint=receiver.grpc_endpoint.removeprefix("http://")))
        exporter.round(skip_present=True)
        assert [f"{7:016x}"] == self.arrived(exporter, receiver, 1)

    def test_a_broken_endpoint(self, exporter: Exporter) -> None:
        """It is counted and tried again; records are not affected."""
        exporter.settings["export"]["otel"]["endpoint"] = "http://127.0.0.1:1"
        exporter.settings["requests"] = {"records": {"path": str(exporter.run_dir / "r.jsonl")}}
        exporter.trace(1)
        exporter.round()
        exporter.sinks.close()
        assert ["cmpl-1-0"] == written(exporter.run_dir / "r.jsonl")
        assert {"otel_traces"} == exporter.errors.counts().keys()


class TestWants:
    @pytest.mark.parametrize(
        ("settings", "records", "spans"),
        [
            ({}, False, False),
            ({"requests": {"records": {"path": "x"}}}, True, False),
            ({"export": {"otel": {"enabled": True}}}, False, True),
            ({"export": {"otel": {"enabled": True, "traces": False}}}, False, False),
            ({"export": {"otel": {"enabled": True}}, "requests": {"opt_in": False}}, False, False),
            ({"export": {"otel": {"enabled": True}}, "requests": {"opt_in": False, "trace_rate": 0.1}}, False, True),
            (
                {"enabled": False, "requests": {"records": {"path": "x"}}, "export": {"otel": {"enabled": True}}},
                False,
                False,
            ),
        ],
    )
    def test_what_the_yaml_asks_for(self, settings: dict[str, Any], records: bool, spans: bool) -> None:
        """Spans only where requests can be traced."""
        config = GlassboxConfig.model_validate(settings)
        assert (records, spans) == (wants_records(config), wants_spans(config))
