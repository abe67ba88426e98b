"""The span of a traced request, as a real OTLP receiver gets it: whose child, what it says, and within what bounds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from glassbox.config.load import OtelConfig
from glassbox.core.errors import export_errors
from glassbox.core.logs import get_logger
from glassbox.core.statistics import INDEX
from glassbox.export import attention_spans
from glassbox.export.attention_spans import MAX_EVENTS, MAX_SIGNALS, AttentionSpans, attributes, end_of, events
from glassbox.store.llm_spans import LlmSpan
from glassbox.store.trace_record import RequestTrace
from tests.otlp_receiver import OtlpReceiver
from tests.otlp_receiver import attributes as received_attributes
from tests.trace_samples import make_trace, with_arrays
from tests.unit.store.test_llm_spans import make_span


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def sent(
    receiver: OtlpReceiver,
    run_dir: Path,
    trace: RequestTrace,
    llm_span: LlmSpan | None = None,
    config: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    vllm_endpoint: str | None = None,
) -> list[Span]:
    """What arrives of one trace."""
    otel = OtelConfig.model_validate({"endpoint": receiver.grpc_endpoint} if config is None else config)
    errors = export_errors(get_logger("glassbox.tests"))
    sink = AttentionSpans(otel, run_dir, errors, vllm_endpoint, environ or {})
    sink.send(trace, llm_span)
    sink.close(5.0)
    assert {} == errors.counts()
    return list(receiver.spans())


class TestParent:
    def test_child_of_vllms_span(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """Whatever the client sent: vLLM's span lies in between."""
        (span,) = sent(receiver, tmp_path, make_trace(), make_span(0xABC))
        assert (f"{0xABC:032x}", f"{0xABC:016x}") == (span.trace_id.hex(), span.parent_span_id.hex())
        assert "glassbox.attention" == span.name

    def test_child_of_the_clients_span(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """Without vLLM's tracing."""
        (span,) = sent(receiver, tmp_path, make_trace())
        assert "0af7651916cd43dd8448eb211c80319c" == span.trace_id.hex()
        assert "b7ad6b7169203331" == span.parent_span_id.hex()

    def test_a_trace_of_its_own(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """A client that sends no trace context."""
        (span,) = sent(receiver, tmp_path, make_trace(traceparent=None))
        assert b"" == span.parent_span_id

    def test_what_the_client_does_not_sample(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """Isn't sent: the rest of its trace would be missing."""
        unsampled = make_trace(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
        assert [] == sent(receiver, tmp_path, unsampled)
        assert [] == sent(receiver, tmp_path, make_trace(), make_span(flags=0))


class TestSpan:
    def test_what_it_says(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """Scalars: the request's id by its GenAI name, the signals under glassbox."""
        (span,) = sent(receiver, tmp_path, make_trace())
        found = received_attributes(span.attributes)
        assert "cmpl-1-0" == found["gen_ai.request.id"]
        assert ("tiny", "poet") == (found["gen_ai.request.model"], found["glassbox.adapter"])
        assert ("opt_in", "finished", False) == tuple(found[f"glassbox.{n}"] for n in ("why", "status", "truncated"))
        assert (6, 4, 5) == tuple(found[f"glassbox.{n}"] for n in ("prompt_tokens", "generated_tokens", "rows"))
        assert all(isinstance(value, str | bool | int | float) for value in found.values())
        assert [name for name in found if "entropy" in name]
        (resource,) = receiver.requests[0].message.resource_spans
        assert "vllm" == received_attributes(resource.resource.attributes)["service.name"]

    def test_without_an_adapter(self) -> None:
        """The attribute is left out."""
        assert "glassbox.adapter" not in attributes(make_trace(adapter=None))

    def test_its_time(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """From the request's first step to its end."""
        (span,) = sent(receiver, tmp_path, make_trace())
        assert (1_700_000_000_500_000_000, 1_700_000_002_500_000_000) == (
            span.start_time_unix_nano,
            span.end_time_unix_nano,
        )

    def test_it_ends_no_later_than_vllms(self) -> None:
        """The worker hears of a request's end with its next step, which may be an hour later."""
        trace = make_trace(end_time_s=1_700_003_600.0)
        assert 1_700_000_003.0 == end_of(trace, make_span(3))
        assert 1_700_003_600.0 == end_of(trace, None)
        assert trace.start_time_s == end_of(trace, make_span(0, end_time_s=1.0))

    def test_events(self) -> None:
        """Means of the generated tokens, in runs; the last one is at the end."""
        trace = make_trace()
        ((found, time_s),) = events(trace, 1_700_000_002.5)
        assert (6, 8) == (found["glassbox.first_position"], found["glassbox.last_position"])
        true = trace.stats[2:, ..., INDEX["sink_ratio"]].mean()
        assert pytest.approx(true) == found["glassbox.sink_ratio"]
        assert 1_700_000_002.5 == time_s


class TestBounds:
    def test_signals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A value per layer becomes three numbers; there are never more than so many."""
        many = {str(layer): float(layer) for layer in range(80)}
        monkeypatch.setattr(attention_spans, "request_signals", lambda _: {"by_layer": many, "one": 1.0})
        found = attributes(make_trace())
        assert (0.0, 39.5, 79.0) == tuple(found[f"glassbox.by_layer.{name}"] for name in ("min", "mean", "max"))
        assert 1.0 == found["glassbox.one"]
        monkeypatch.setattr(attention_spans, "request_signals", lambda _: {f"s{i}": 1.0 for i in range(500)})
        assert MAX_SIGNALS == sum(
            name.startswith("glassbox.s") and name[10:].isdigit() for name in attributes(make_trace())
        )

    @pytest.mark.parametrize("count", [1, 32, 33, 5000])
    def test_events_of_long_answers(self, count: int) -> None:
        """At most 32, of at least 32 tokens, without a gap."""
        trace = make_trace(
            positions=tuple(range(6, 6 + count)), layers=(0,), heads=(0,), top_k=0, spans=(), attention=False
        )
        found = [event for event, _ in events(trace, trace.start_time_s + 1)]
        assert MAX_EVENTS >= len(found)
        assert 6 == found[0]["glassbox.first_position"]
        assert 6 + count - 1 == found[-1]["glassbox.last_position"]
        lasts = [event["glassbox.last_position"] for event in found]
        assert [int(str(last)) + 1 for last in lasts[:-1]] == [event["glassbox.first_position"] for event in found[1:]]

    def test_no_generated_token(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """A request that was aborted in its prompt has a span without events."""
        trace = make_trace(positions=(2, 5), status="aborted")
        (span,) = sent(receiver, tmp_path, replace(trace, num_generated=0))
        assert [] == list(span.events)

    def test_values_that_are_not_finite(self) -> None:
        """Are left out."""
        trace = make_trace()
        blank = with_arrays(trace, stats=np.full_like(trace.stats, np.nan))
        ((found, _),) = events(blank, 1_700_000_002.5)
        assert {"glassbox.first_position", "glassbox.last_position"} == found.keys()


class TestEndpoint:
    @pytest.mark.parametrize(
        ("config", "environ", "protocol"),
        [
            ({"endpoint": "{host}:{grpc}"}, {}, "grpc"),
            ({"endpoint": "http://{host}:{http}", "protocol": "http"}, {}, "http"),
            ({"protocol": "grpc"}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://{host}:{grpc}"}, "grpc"),
            # As vLLM sets it for its children.
            ({}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "{host}:{grpc}"}, "grpc"),
            (
                {},
                {
                    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://{host}:{http}/v1/traces",
                    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                },
                "http",
            ),
        ],
    )
    def test_where_spans_go(
        self,
        receiver: OtlpReceiver,
        tmp_path: Path,
        config: dict[str, str],
        environ: dict[str, str],
        protocol: str,
    ) -> None:
        """The YAML's endpoint, else that of the variables, with or without a scheme."""
        ports = {
            "host": "127.0.0.1",
            "grpc": receiver.grpc_endpoint.rpartition(":")[2],
            "http": receiver.http_endpoint.rpartition(":")[2],
        }
        filled = {name: value.format(**ports) for name, value in config.items()}
        variables = {name: value.format(**ports) for name, value in environ.items()}
        assert 1 == len(sent(receiver, tmp_path, make_trace(), config=filled, environ=variables))
        assert protocol == receiver.requests[0].protocol

    def test_vllms_own_endpoint(self, receiver: OtlpReceiver, tmp_path: Path) -> None:
        """If neither says anything: several API servers pass no variable on."""
        host = receiver.grpc_endpoint.removeprefix("http://")
        assert 1 == len(sent(receiver, tmp_path, make_trace(), config={}, vllm_endpoint=host))

    def test_a_collector_that_is_away(self, tmp_path: Path) -> None:
        """It is counted, and closing doesn't wait for it."""
        errors = export_errors(get_logger("glassbox.tests"))
        sink = AttentionSpans(OtelConfig(endpoint="http://127.0.0.1:9", protocol="http"), tmp_path, errors, None, {})
        sink.send(make_trace(), None)
        sink.close(0.2)
        assert {"otel_traces": 1} == errors.counts()
