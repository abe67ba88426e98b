"""Traced requests of a running server: they end when their client goes, count as they should, and may be refused."""

from typing import TYPE_CHECKING

import httpx
import pytest

from glassbox.store.trace_directory import TraceDirectory, TraceSummary
from tests.serving import MODEL_NAME, wait_for

if TYPE_CHECKING:
    from tests.serving import GlassboxServer

pytestmark = pytest.mark.e2e


def ended(server: "GlassboxServer", request_id: str) -> list[TraceSummary]:
    """Summaries of a request's traces that have ended; completions have a number per prompt behind their id."""
    found = TraceDirectory(server.run_dir).summaries()
    return [s for s in found if s.request_id.startswith(request_id) and s.status != "active"]


def wait_trace(server: "GlassboxServer", request_id: str) -> list[TraceSummary]:
    return wait_for(lambda: ended(server, request_id), bool, 90.0, f"a trace of {request_id}")


class TestEnds:
    def test_a_client_that_goes(self, server: "GlassboxServer") -> None:
        """The trace of an aborted stream ends, says so, and no request stays behind."""
        body = {
            "model": MODEL_NAME, "prompt": "Once upon a time", "max_tokens": 1500, "stream": True, "ignore_eos": True,
            "temperature": 0, "vllm_xargs": {"glassbox": "trace"},
        }  # fmt: skip
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as reply:
            line = next(line for line in reply.iter_lines() if line.startswith("data: {"))
        request_id = line.split('"id":"')[1].split('"')[0]
        (summary,) = wait_trace(server, request_id)
        assert summary.status == "aborted"
        assert 0 < summary.num_generated < 1500
        server.wait_metric("glassbox_traced_requests_active", lambda value: value == 0, 90.0)


class TestOff:
    def test_in_no_statistics(self, server: "GlassboxServer") -> None:
        """Every step is measured, and a request that wants to be left out adds no row."""
        server.complete("One two three", 4)
        before = server.settled_rows()
        server.complete("One two three four", 4, vllm_xargs={"glassbox": "off"})
        steps = server.metric("glassbox_steps_total")
        assert before == server.settled_rows()
        assert steps
        server.complete("One two three five", 4)
        assert server.settled_rows() > before


class TestRefusals:
    def test_served_and_counted(self, server: "GlassboxServer") -> None:
        """A request that may not be traced is answered as any other."""
        name, labels = "glassbox_trace_refused_total", {"reason": "opt_in_off"}
        before = server.metric(name, **labels) or 0.0
        server.edit_config(requests={"opt_in": False})

        def refused() -> float:
            assert server.complete("One two three", 2, vllm_xargs={"glassbox": "trace"})
            return server.metric(name, **labels) or 0.0

        assert wait_for(refused, lambda value: value > before, 90.0, "a refusal") > before

    def test_sampled_by_rate(self, server: "GlassboxServer") -> None:
        """With trace_rate 1 nobody has to ask."""
        server.edit_config(requests={"trace_rate": 1.0})

        def sampled() -> list[TraceSummary]:
            server.complete("One two three", 3)
            return [s for s in TraceDirectory(server.run_dir).summaries() if s.why == "sampled"]

        assert wait_for(sampled, bool, 90.0, "a sampled request")
