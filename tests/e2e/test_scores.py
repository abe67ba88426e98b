"""Requests that the trace rate chooses are scored while they are served: measured no more than the probe reads, and
shown alike on the page, in the list, at vLLM's /metrics, in the record and by OTLP."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from glassbox.signals.probe import ProbeFeature
from tests import probe_samples
from tests.e2e.test_traced_requests import Shown
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.ports import free_port
from tests.serving import MODEL_NAME, GlassboxServer, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LAYERS, HEADS = [3, 20], [1, 5]
FEATURES = (
    ProbeFeature("answer_entropy_ratio_L3_H1", mean=0.5, scale=0.3, coefficient=0.8),
    ProbeFeature("prompt_sink_ratio_L20_H5", mean=0.6, scale=0.4, coefficient=-0.6),
)
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PROMPT = "The harbour master counted the boats twice before"


def of_rows(detail: dict[str, Any], statistic: str, layer: int, head: int, phase: str) -> list[float]:
    """A statistic's numbers of one layer and head, of the rows of a phase, as the JSON has them."""
    values = np.array(detail["statistics"][statistic], dtype=float)
    rows = [row for row, shown in enumerate(detail["phase"]) if shown == phase]
    return [float(values[row, detail["layers"].index(layer), detail["heads"].index(head)]) for row in rows]


def by_hand(detail: dict[str, Any]) -> float:
    """The score of FEATURES."""
    entropy = of_rows(detail, "entropy_ratio", 3, 1, "decode")
    sink = of_rows(detail, "sink_ratio", 20, 5, "prefill")[-1]
    z = 0.2 + 0.8 * (sum(entropy) / len(entropy) - 0.5) / 0.3 - 0.6 * (sink - 0.6) / 0.4
    return 1 / (1 + math.exp(-(1.25 * z - 0.1)))


class TestProbe:
    def test_one_request_everywhere(self, server: GlassboxServer, tmp_path: Path) -> None:
        """Its score is that of the numbers which the page's JSON shows of its rows."""
        probe = probe_samples.write(tmp_path, "harbour", features=FEATURES)
        records, port = tmp_path / "records.jsonl", free_port()
        with OtlpReceiver() as receiver:
            otel = {"enabled": True, "endpoint": receiver.grpc_endpoint}
            server.edit_config(
                probes=[{"file": str(probe), "threshold": 0.0}],
                requests={"trace_rate": 1, "records": {"path": str(records)}},
                export={"interval_s": 1, "http": {"port": port}, "otel": otel},
            )
            wait_for(
                lambda: server.metric("glassbox_probe_score_count", probe="harbour"),
                lambda count: count == 0,
                what="the probe's series",
            )
            asked = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 12, "ignore_eos": True}
            headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
            answer = httpx.post(f"{server.url}/v1/completions", json=asked, headers=headers, timeout=120.0).json()
            list_url = f"http://127.0.0.1:{port}/glassbox/v1/requests"
            shown = self.scored(server, list_url, answer["id"])
            score = shown["scores"]["probes"]["harbour"]
            assert (LAYERS, HEADS, "sampled") == (shown["layers"], shown["heads"], shown["why"])
            assert pytest.approx(by_hand(shown["detail"]), rel=1e-4) == score["score"]
            assert (True, 0) == (score["above"], score["missing"])
            value = score["score"]
            listed = httpx.get(list_url, timeout=60.0).json()["requests"]
            assert [({"harbour": value}, ["harbour"])] == [
                (one["scores"], one["flagged"]) for one in listed if one["internal_id"] == shown["internal_id"]
            ]
            wait_for(
                lambda: server.metric("glassbox_probe_requests_total", probe="harbour", outcome="above"),
                bool,
                what="the request's count at vLLM's port",
            )
            page = httpx.get(f"{list_url}/{answer['id']}", params={"format": "html"}, timeout=60.0).text
            assert '"harbour"' in page
            spans = wait_for(
                lambda: [
                    span
                    for span in receiver.spans()
                    if shown["request_id"] == attributes(span.attributes).get("gen_ai.request.id")
                ],
                bool,
                timeout_s=60.0,
                what="the request's span",
            )
            receiver.wait_until(lambda got: "glassbox.probe.score" in got.metrics(), 60.0)
        (span,) = spans
        assert (TRACE_ID, "00f067aa0ba902b7") == (span.trace_id.hex(), span.parent_span_id.hex())
        assert pytest.approx(value) == attributes(span.attributes)["glassbox.probe.harbour.score"]
        (event,) = (event for event in span.events if event.name == "gen_ai.evaluation.result")
        said = attributes(event.attributes)
        assert ("harbour", "lost") == (said["gen_ai.evaluation.name"], said["gen_ai.evaluation.score.label"])
        assert pytest.approx(value) == said["gen_ai.evaluation.score.value"]

        def recorded() -> list[float]:
            written = [json.loads(line) for line in records.read_text().splitlines()]
            found = [one["scores"] for one in written if one["internal_id"] == shown["internal_id"]]
            return [scores["probes"]["harbour"]["score"] for scores in found]

        assert [value] == wait_for(recorded, what="the record")

    def scored(self, server: GlassboxServer, url: str, request_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            try:
                answer = httpx.get(f"{url}/{request_id}", params={"layers": "all"}, timeout=60.0)
            except httpx.TransportError:
                return {}
            found: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
            if found.get("status") == "active":
                server.complete("Wake up", max_tokens=1)
            return found

        return wait_for(look, lambda found: bool(found.get("scores", {}).get("final")), 90.0, "the request's scores")


class TestSignals:
    def test_of_requests_that_the_rate_chooses(self, server: GlassboxServer) -> None:
        """Every row of the prompt is there although an equal one was served before."""
        shown = Shown(server, requests={"trace_rate": 1, "signals": ["selfattn", "rauq"]})
        prompt = f"{PROMPT} the tide came in. " * 6
        for _ in range(2):
            answer = server.post("/v1/completions", prompt=prompt, max_tokens=6, ignore_eos=True)
        document = shown.ended(answer["id"])
        assert document["prompt_len"] + 5 == document["num_rows"]
        document = wait_for(
            lambda: shown.get(f"/{answer['id']}", layers="3", heads="1"),
            lambda found: found["scores"]["final"],
            what="the signals",
        )
        signals = document["scores"]["signals"]
        assert [] == [one["refused"] for one in signals.values() if "refused" in one]
        assert 0 < signals["rauq"]["values"]["score"] < 20
        own = np.array(document["detail"]["statistics"]["self_logprob"], dtype=float)[:, 0, 0]
        place = document["layers"].index(3), document["heads"].index(1)
        shown_mean = document["scores"]["places"]["selfattn"]["attn_diag_logmean"][place[0]][place[1]]
        assert pytest.approx(own.mean(), rel=1e-3) == shown_mean

    def test_on_demand(self, server: GlassboxServer) -> None:
        """A client's are made after its response, by a process that comes last, and is gone when nothing is due."""
        shown = Shown(server)
        asked = {
            "glassbox": "trace", "glassbox_prompt": "all", "glassbox_signals": ["tracker", "cyclic"],
            "glassbox_layers": [3], "glassbox_heads": [1, 5],
        }  # fmt: skip
        answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=6, ignore_eos=True, vllm_xargs=asked)
        tokens = shown.ended(answer["id"])["num_rows"]
        made_at: set[int] = set()

        def look() -> dict[str, Any]:
            made_at.update(priorities(server))
            scores: dict[str, Any] = shown.get(f"/{answer['id']}")["scores"]
            return scores

        scores = wait_for(look, lambda found: found["final"], 90.0, "the signals")
        assert [] == [one["refused"] for one in scores["signals"].values() if "refused" in one]
        cycles = np.array(scores["places"]["cyclic"]["T_cyc"])
        assert (1, 2) == cycles.shape
        assert np.all((cycles >= 0) & (cycles == np.round(cycles)) & (cycles <= math.comb(tokens, 3) / 4 + tokens**2))
        assert 0 < scores["signals"]["tracker"]["values"]["sv1"]["min"]
        assert 19 in made_at, "it begins as its parent is, and gives way at once"
        wait_for(lambda: priorities(server), lambda found: found == [], what="the end of the process")


def priorities(server: GlassboxServer) -> list[int]:
    """Of the processes that make signals on demand."""
    found = []
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "glassbox.processes.exporter.signal_process" in process.cmdline():
                found.append(process.nice())
    return found
