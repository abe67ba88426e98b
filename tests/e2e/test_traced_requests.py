"""Traced requests of a real OpenAI client: over HTTP, in records, as exemplars and as spans of the client's trace."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from glassbox.cli.dashboards import check, generated
from glassbox.cli.dashboards.stack import Stack
from glassbox.store.trace_directory import TraceDirectory
from tests.e2e.test_dashboard_queries import VALUES
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.ports import free_port
from tests.prometheus_server import PrometheusServer
from tests.serving import ALIAS, EFFECT_S, MODEL_NAME, GlassboxServer, require_tool, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SYSTEM, QUESTION = "You answer in one short sentence.", "Which harbour has the oldest lighthouse?"
MESSAGES: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
TRACE = {"glassbox": "trace"}
TOKENS = 12
ROOT = Path(__file__).resolve().parents[2]
STACK = Stack()


def ask(url: str, headers: dict[str, str] | None = None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120.0, max_retries=0, default_headers=headers)


def body(**xargs: Any) -> dict[str, Any]:
    """What the client sends beside OpenAI's own fields; the answer has a known length."""
    return {"ignore_eos": True, "vllm_xargs": xargs}


def answers(response: Any) -> Any:
    """All that a response says but its name and time."""
    return {name: value for name, value in response.model_dump().items() if name not in ("id", "created")}


def said(response: Any) -> str:
    """The text of a response, or of a part of a streamed one."""
    if not response.choices:
        return ""
    choice = response.choices[0]
    message = getattr(choice, "message", None) or getattr(choice, "delta", None)
    return str((message.content if message is not None else choice.text) or "")


class Shown:
    """The own port of a running server."""

    def __init__(self, server: GlassboxServer, **changes: Any) -> None:
        self.server = server
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/glassbox/v1/requests"
        server.edit_config(export={"interval_s": 1, "http": {"port": self.port}}, **changes)
        time.sleep(EFFECT_S)  # the worker's part, which nothing shows
        wait_for(lambda: up(self), what="the own port")

    def get(self, path: str = "", **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}{path}", params=parameters, timeout=60.0)
        return answer.raise_for_status().json()

    def ended(self, request_id: str) -> dict[str, Any]:
        """The document of a request, once the worker knows that it has ended.

        It hears of it with its next step, so an idle server is woken.
        """

        def look() -> dict[str, Any]:
            try:
                found: dict[str, Any] = self.get(f"/{request_id}")
            except (httpx.TransportError, httpx.HTTPStatusError):
                return {"status": "not there"}
            if found["status"] == "active":
                self.server.complete("Wake up", max_tokens=1)
            return found

        return wait_for(look, lambda found: found["status"] == "finished", 90.0, f"the trace of {request_id}")


@pytest.fixture
def shown(server: GlassboxServer) -> Shown:
    return Shown(server)


class TestClient:
    def test_chat(self, server: GlassboxServer, shown: Shown) -> None:
        """Every generated token but the last has a row; spans by message are the texts' tokens; masses are shares."""
        answer = ask(server.url).chat.completions.create(
            model=MODEL_NAME,
            messages=MESSAGES,
            max_tokens=TOKENS,
            extra_body=body(
                **TRACE,
                glassbox_top_k=3,
                glassbox_layers=[0, 29],
                glassbox_spans=["system=message:0", "question=message:-1"],
            ),
        )
        assert answer.usage is not None
        trace = shown.ended(answer.id)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
            trace["prompt_len"],
            trace["num_generated"],
        )
        assert [0, 29] == trace["layers"]
        tokens = trace["tokens"]
        decoded = [p for p, phase in zip(tokens["position"], tokens["phase"], strict=True) if phase == "decode"]
        first = answer.usage.prompt_tokens
        assert list(range(first, first + TOKENS - 1)) == decoded
        for name, said in (("system", SYSTEM), ("question", QUESTION)):
            start, end = trace["options"]["spans"][name]
            tokenized = {"model": MODEL_NAME, "messages": MESSAGES}
            ids = httpx.post(f"{server.url}/tokenize", json=tokenized, timeout=60.0).json()["tokens"]
            text = server.post("/detokenize", tokens=ids[start:end])["prompt"]
            assert said == text
            assert all(0 <= mass <= 1 for mass in tokens["spans"][name])
        detail = shown.get(f"/{answer.id}", layers="29", heads="4")["detail"]
        for row, position in enumerate(detail["position"]):
            keys, masses = detail["top_k"]["position"][row][0][0], detail["top_k"]["mass"][row][0][0]
            assert all(key <= position for key in keys)
            assert sorted(masses, reverse=True) == masses
            top1 = detail["statistics"]["top1_ratio"][row][0][0]
            assert masses[0] == pytest.approx(top1, rel=1e-2, abs=1e-3)

    def test_completions_and_responses(self, server: GlassboxServer, shown: Shown) -> None:
        """By the id that the client got; whole and streamed."""
        client = ask(server.url)
        completion = client.completions.create(
            model=MODEL_NAME, prompt="The lighthouse", max_tokens=4, extra_body=body(**TRACE)
        )
        chunks = list(
            client.completions.create(
                model=ALIAS, prompt="The pier", max_tokens=4, stream=True, extra_body=body(**TRACE)
            )
        )
        response = client.responses.create(
            model=ALIAS, input="The quay", max_output_tokens=4, extra_body={"vllm_xargs": TRACE}
        )
        for request_id, name in ((completion.id, MODEL_NAME), (chunks[0].id, ALIAS), (response.id, ALIAS)):
            trace = shown.ended(request_id)
            assert trace["num_generated"] >= 1
            assert (trace["model_name"], trace["requested_model"], trace["adapter"]) == (MODEL_NAME, name, None)

    def test_messages(self, server: GlassboxServer, shown: Shown) -> None:
        """A span by message is of the client's messages, of which the system prompt is none."""
        xargs = {**TRACE, "glassbox_spans": ["question=message:0"]}
        answer = server.post(
            "/v1/messages", model=ALIAS, system=SYSTEM, messages=MESSAGES[1:], max_tokens=4, vllm_xargs=xargs
        )
        trace = shown.ended(answer["id"])
        assert trace["requested_model"] == ALIAS
        ids = server.post("/tokenize", model=MODEL_NAME, messages=MESSAGES)["tokens"]
        start, end = trace["options"]["spans"]["question"]
        assert server.post("/detokenize", tokens=ids[start:end])["prompt"] == QUESTION

    def test_log_probabilities(self, server: GlassboxServer, shown: Shown) -> None:
        """Traces have those of each token, and a response holds what its client asked for; tokens stay the same."""
        client, signals = ask(server.url), {**TRACE, "glassbox_signals": ["rauq", "laplacian"]}
        chat: Any = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
        text: Any = {"model": MODEL_NAME, "prompt": QUESTION, "max_tokens": TOKENS, "temperature": 0}
        for create, asked, wanted in (
            (client.chat.completions.create, chat, {"logprobs": True, "top_logprobs": 1}),
            (client.completions.create, text, {"logprobs": 1}),
        ):
            plain, with_them = (create(**asked, **more, extra_body=body()) for more in ({}, wanted))
            traced = create(**asked, extra_body=body(**signals))
            streamed = list(create(**asked, stream=True, extra_body=body(**signals)))
            both = create(**asked, **wanted, extra_body=body(**signals))
            assert answers(plain) == answers(traced)
            assert answers(with_them) == answers(both)
            assert said(plain) == "".join(map(said, streamed))
            assert all(chunk.choices[0].logprobs is None for chunk in streamed if chunk.choices)
            expected = with_them.choices[0].logprobs
            content = getattr(expected, "content", None)
            logprobs = [one.logprob for one in content] if content else expected.token_logprobs
            for request_id in (traced.id, streamed[0].id, both.id):
                shown.ended(request_id)
                (trace,) = TraceDirectory(server.run_dir).traces(request_id)
                assert logprobs == pytest.approx(trace.logprobs.tolist(), abs=1e-5)
                assert (trace.prompt_len, ()) == (int(trace.decode().argmax()), trace.notes)

    def test_off_and_nothing(self, server: GlassboxServer, shown: Shown) -> None:
        """Requests that say off, or nothing, leave no trace."""
        client = ask(server.url)

        def complete(xargs: dict[str, str]) -> str:
            answer = client.completions.create(model=MODEL_NAME, prompt="Fog", max_tokens=2, extra_body=body(**xargs))
            return answer.id

        silent = [complete({"glassbox": "off"}), complete({})]
        shown.ended(complete(TRACE))
        for request_id in silent:
            assert 404 == httpx.get(f"{shown.url}/{request_id}", timeout=60.0).status_code

    def test_samples(self, server: GlassboxServer, shown: Shown) -> None:
        """With n = 3 each sample has its trace."""
        answer = ask(server.url).chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, n=3, max_tokens=3, temperature=1.0, extra_body=body(**TRACE)
        )
        shown.ended(answer.id)
        wait_for(lambda: len(shown.get(f"/{answer.id}")["others"]), lambda count: count == 2, 90.0, "three traces")

    def test_text_only_with_the_setting(self, server: GlassboxServer) -> None:
        """The page shows the answer with `include_text: true`, and positions alone without."""
        for include_text in (True, False):
            shown = Shown(server, requests={"include_text": include_text})
            answer = ask(server.url).chat.completions.create(
                model=MODEL_NAME, messages=MESSAGES, max_tokens=TOKENS, extra_body=body(**TRACE, glassbox_top_k=2)
            )
            trace = shown.ended(answer.id)
            page = httpx.get(f"{shown.url}/{answer.id}", params={"format": "html"}, timeout=60.0).raise_for_status()
            assert include_text == ("text" in trace)
            assert include_text == ("lighthouse" in page.text)
            if include_text:
                said = "".join(trace["text"]["tokens"][trace["prompt_len"] :])
                assert said.startswith(str(answer.choices[0].message.content))

    def test_records(self, server: GlassboxServer, tmp_path: Path) -> None:
        """One line of JSON with the request's id and signals, in the YAML's file."""
        path = tmp_path / "records.jsonl"
        shown = Shown(server, requests={"records": {"path": str(path)}})
        # The exporter opens the file with its next round, and takes what ends from then on.
        wait_for(lambda: httpx.get(shown.url, timeout=60.0).status_code if up(shown) else 0, lambda code: code == 200)
        answer = ask(server.url).chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, max_tokens=4, extra_body=body(**TRACE)
        )
        shown.ended(answer.id)

        def lines() -> list[dict[str, Any]]:
            written = path.read_text().splitlines() if path.exists() else []
            return [one for one in map(json.loads, written) if one["request_id"] == answer.id]

        (record,) = wait_for(lines, bool, 90.0, "the record")
        assert record["signals"]


def up(shown: Shown) -> bool:
    try:
        return httpx.get(shown.url, timeout=60.0).is_success
    except httpx.TransportError:
        return False


class TestExemplars:
    def test_prometheus_returns_them(self, server: GlassboxServer, tmp_path: Path) -> None:
        """With the request's id and the client's trace, from a real Prometheus that stores exemplars."""
        require_tool("prometheus", "prometheus")
        shown = Shown(server)
        trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
        client = ask(server.url, {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})
        answer = client.chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, max_tokens=4, extra_body=body(**TRACE)
        )
        shown.ended(answer.id)
        with PrometheusServer(
            tmp_path, [f"127.0.0.1:{shown.port}"], interval_s=3, features=["exemplar-storage"]
        ) as prometheus:

            def exemplars() -> list[dict[str, str]]:
                found = prometheus.api(
                    "query_exemplars", query="glassbox_attention_entropy_ratio_bucket", start="0", end="4102444800"
                )
                stored = [exemplar["labels"] for series in found for exemplar in series["exemplars"]]
                return [labels for labels in stored if labels["request_id"] == answer.id]

            assert {trace_id} == {labels["trace_id"] for labels in wait_for(exemplars, bool, 90.0, "exemplars")}

    def test_lead_from_the_dashboard_to_the_request(self, server: GlassboxServer, tmp_path: Path) -> None:
        """With the stack's own jobs: nothing is there twice, and a dot of a panel opens the page of its request."""
        require_tool("prometheus", "prometheus")
        shown = Shown(server)
        answer = ask(server.url).chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, max_tokens=TOKENS, extra_body=body(**TRACE)
        )
        shown.ended(answer.id)
        ports = {f"vllm:{STACK.vllm_port}": server.url.removeprefix("http://"),
                 f"vllm:{STACK.glassbox_port}": f"127.0.0.1:{shown.port}"}  # fmt: skip
        text = (ROOT / "deploy/prometheus/prometheus.yaml").read_text()
        for inside, here in ports.items():
            text = text.replace(inside, here)
        jobs = [job for job in yaml.safe_load(text)["scrape_configs"] if job["job_name"] in {"vllm", "glassbox"}]
        asked = [
            target["expr"]
            for panel in check.panels(generated.dashboards()["glassbox-requests"])
            for target in panel.get("targets", ())
            if target.get("exemplar") and "glassbox_probe" not in target["expr"]  # there is no probe
        ]
        assert len(asked) == 3
        with PrometheusServer(
            tmp_path, [], interval_s=3, scrape_configs=jobs, features=["exemplar-storage"]
        ) as prometheus:

            def dots() -> list[set[str]]:
                """Requests behind the dots of each panel, asked for as Grafana does: with the panel's expression."""
                answers = [
                    prometheus.api("query_exemplars", query=check.plain(one, VALUES), start="0", end="4102444800")
                    for one in asked
                ]
                return [
                    {exemplar["labels"]["request_id"] for series in found for exemplar in series["exemplars"]}
                    for found in answers
                ]

            wait_for(dots, lambda found: all(answer.id in ids for ids in found), 90.0, "dots on every panel")
            wait_for(lambda: prometheus.query("vllm:num_requests_running"), bool, 90.0, "vLLM's own metrics")
            (targets,) = prometheus.query("count(count by (instance) (glassbox_steps_total))").values()
            assert 1 == targets
            assert {"vllm"} == {dict(labels)["job"] for labels in prometheus.query("glassbox_steps_total")}
        source, _ = yaml.safe_load((ROOT / "dashboards/provisioning/datasources/prometheus.yaml").read_text())[
            "datasources"
        ]
        link = next(one for one in source["jsonData"]["exemplarTraceIdDestinations"] if one["name"] == "request_id")
        url = link["url"].replace("$${__value.raw}", answer.id).replace(f":{STACK.glassbox_port}/", f":{shown.port}/")
        page = httpx.get(url, timeout=60.0).raise_for_status()
        assert answer.id in page.text


class TestOneTrace:
    @pytest.fixture
    def receiver(self) -> Iterator[OtlpReceiver]:
        with OtlpReceiver() as receiver:
            yield receiver

    def test_from_the_client_to_the_attention(
        self, start_server: Callable[..., GlassboxServer], receiver: OtlpReceiver
    ) -> None:
        """Client span -> llm_request -> glassbox.attention, with two API servers that tell nobody where spans go."""
        collector = receiver.grpc_endpoint.removeprefix("http://")
        server = start_server(
            config={"sample_rate": 1.0, "export": {"interval_s": 1, "otel": {"enabled": True, "metrics": False}}},
            args=("--otlp-traces-endpoint", collector, "--api-server-count", "2"),
            env={"OTEL_BSP_SCHEDULE_DELAY": "500"},  # vLLM's own spans would come up to 5 s later
        )
        tracer = TracerProvider(shutdown_on_exit=False).get_tracer("client")
        wanted: dict[str, str] = {}
        for number in range(4):
            with tracer.start_as_current_span(f"question {number}") as span:
                headers: dict[str, str] = {}
                TraceContextTextMapPropagator().inject(headers)
                # A connection each, so that both API servers get some.
                with ask(server.url, headers) as client:
                    answer = client.chat.completions.create(
                        model=MODEL_NAME, messages=MESSAGES, max_tokens=6, extra_body=body(**TRACE)
                    )
                context = span.get_span_context()
                wanted[answer.id] = f"{context.trace_id:032x}/{context.span_id:016x}"
        server.complete("Wake up", max_tokens=2)

        def spans(received: OtlpReceiver, name: str) -> list[Span]:
            return [span for span in received.spans() if span.name == name]

        receiver.wait_until(lambda received: len(spans(received, "glassbox.attention")) >= len(wanted), 40.0)
        # One more: that of the request that woke the server.
        receiver.wait_until(lambda received: len(spans(received, "llm_request")) > len(wanted), 40.0)
        parents = {span.span_id: span for span in spans(receiver, "llm_request")}
        found = {}
        for span in spans(receiver, "glassbox.attention"):
            parent = parents[span.parent_span_id]
            said = attributes(span.attributes)
            assert said["gen_ai.request.id"] == attributes(parent.attributes)["gen_ai.request.id"]
            assert span.trace_id == parent.trace_id
            assert said["glassbox.status"] == "finished"
            assert span.events
            found[said["gen_ai.request.id"]] = f"{span.trace_id.hex()}/{parent.parent_span_id.hex()}"
        assert wanted == found
