"""A small OTLP receiver for tests: real gRPC and real HTTP on loopback, on `opentelemetry-proto`; keeps what it gets.

with OtlpReceiver() as receiver:
    ... export to receiver.grpc_endpoint or receiver.http_endpoint ...
    receiver.wait_for_metrics()
"""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

_HTTP_PATHS: dict[str, tuple[Any, Any]] = {
    "/v1/metrics": (
        metrics_service_pb2.ExportMetricsServiceRequest,
        metrics_service_pb2.ExportMetricsServiceResponse,
    ),
    "/v1/traces": (trace_service_pb2.ExportTraceServiceRequest, trace_service_pb2.ExportTraceServiceResponse),
    "/v1/logs": (logs_service_pb2.ExportLogsServiceRequest, logs_service_pb2.ExportLogsServiceResponse),
}


def plain(value: AnyValue) -> Any:
    """An OTLP attribute value as a Python value."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def attributes(pairs: Any) -> dict[str, Any]:
    """OTLP attributes as a dict."""
    items: list[KeyValue] = list(pairs)
    return {item.key: plain(item.value) for item in items}


@dataclass
class Request:
    """One export request: message, protocol (grpc | http), path of HTTP, and headers (lower case)."""

    message: Any
    protocol: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)


class OtlpReceiver:
    """Receives OTLP metrics, traces and logs by gRPC and by HTTP/protobuf (below any path) on 127.0.0.1, at free ports.

    Attributes:
        requests: everything received, in order; `message` is the protobuf request of metrics, traces or logs.
        delay_s: how long each answer is held back, to play a slow collector.
        refuses: path of HTTP that is answered with 404, to play one that lacks a signal.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.delay_s = 0.0
        self.refuses = ""
        outer = self
        self._changed = threading.Condition()
        self._grpc = grpc.server(ThreadPoolExecutor(max_workers=2, thread_name_prefix="otlp-receiver"))
        receive = self._receive

        class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                receive(Request(request, "grpc", "", dict(context.invocation_metadata())))
                return metrics_service_pb2.ExportMetricsServiceResponse()

        class Traces(trace_service_pb2_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                receive(Request(request, "grpc", "", dict(context.invocation_metadata())))
                return trace_service_pb2.ExportTraceServiceResponse()

        class Logs(logs_service_pb2_grpc.LogsServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:
                receive(Request(request, "grpc", "", dict(context.invocation_metadata())))
                return logs_service_pb2.ExportLogsServiceResponse()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                signal = next((path for path in _HTTP_PATHS if self.path.endswith(path)), None)
                if signal is None or signal == outer.refuses:
                    self.send_error(404)
                    return
                request, response = _HTTP_PATHS[signal]
                headers = {name.lower(): value for name, value in self.headers.items()}
                receive(Request(request.FromString(body), "http", self.path, headers))
                answer = response().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), self._grpc)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), self._grpc)
        logs_service_pb2_grpc.add_LogsServiceServicer_to_server(Logs(), self._grpc)
        self.grpc_endpoint = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.http_endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._http_thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    def endpoint(self, protocol: str) -> str:
        """The endpoint of `grpc` or `http`, without a path."""
        return {"grpc": self.grpc_endpoint, "http": self.http_endpoint}[protocol]

    def __enter__(self) -> Self:
        self._grpc.start()
        self._http_thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._http_thread.join()
        self._grpc.stop(grace=0).wait()

    def _receive(self, request: Request) -> None:
        time.sleep(self.delay_s)
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def wait_until(self, condition: Callable[["OtlpReceiver"], bool], timeout_s: float = 30.0) -> None:
        """Wait until `condition(self)` holds after some request.

        Raises:
            TimeoutError: if it does not within `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), timeout_s):
                raise TimeoutError(f"{len(self.requests)} requests came, but not what was waited for")

    def wait_for_metrics(self, timeout_s: float = 30.0) -> dict[str, Metric]:
        """Wait for a request with metrics; the newest metrics by name."""
        self.wait_until(lambda receiver: bool(receiver.metrics()), timeout_s)
        return self.metrics()

    def metrics(self) -> dict[str, Metric]:
        """The newest of each metric received so far, by name (of one request; larger exports come in several)."""
        found: dict[str, Metric] = {}
        for request in list(self.requests):
            for resource in getattr(request.message, "resource_metrics", ()):
                for scope in resource.scope_metrics:
                    found.update({metric.name: metric for metric in scope.metrics})
        return found

    def spans(self) -> Iterator[Span]:
        """All spans received so far."""
        for request in list(self.requests):
            for resource in getattr(request.message, "resource_spans", ()):
                for scope in resource.scope_spans:
                    yield from scope.spans

    def log_records(self) -> Iterator[LogRecord]:
        """All log records received so far."""
        for request in list(self.requests):
            for resource in getattr(request.message, "resource_logs", ()):
                for scope in resource.scope_logs:
                    yield from scope.log_records
