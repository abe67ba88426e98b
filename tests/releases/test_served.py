"""Every supported release that runs on this machine serves over HTTP with all that glassbox adds to it."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.releases.conftest import vllm_environment
from tests.releases.future import VERSION, make_future
from tests.serving import MODEL_NAME, GlassboxServer, wait_for
from tools.vllm_releases import Release, folder_of, runnable

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.releases, pytest.mark.timeout(600)]

SYSTEM, QUESTION = "You answer in one short sentence.", "Which harbour has the oldest lighthouse?"
MESSAGES: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
TOKENS = 12
TRACE = {"glassbox": "trace", "glassbox_top_k": 3, "glassbox_layers": [0, 29]}
MESSAGE_SPANS = {"glassbox_spans": ["system=message:0", "question=message:-1"]}


def chat(server: GlassboxServer, **xargs: Any) -> httpx.Response:
    body = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": TOKENS, "ignore_eos": True, "vllm_xargs": xargs}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120.0)


def ended(server: GlassboxServer, request_id: str) -> dict[str, Any]:
    """The document of a request, once the worker knows that it has ended: an idle server is woken."""

    def look() -> dict[str, Any]:
        answer = httpx.get(f"{server.url}/glassbox/v1/requests/{request_id}", timeout=60.0)
        found = dict(answer.json()) if answer.is_success else {"status": answer.status_code}
        if found["status"] == "active":
            server.complete("Wake up", max_tokens=1)
        return found

    return wait_for(look, lambda found: found["status"] == "finished", 90.0, f"the trace of {request_id}")


@pytest.mark.check("served", "cpu")
@pytest.mark.parametrize("release", runnable(), ids=lambda release: release.name)
def test_served(release: Release, demo_model_path: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A traced chat with spans by message and a summary, bad options, the live page, and metrics of every layer."""
    variables = vllm_environment(folder_of(release, whole=True), pytestconfig.rootpath, VLLM_PLUGINS="glassbox")
    with GlassboxServer(demo_model_path, tmp_path, env=variables) as server:
        assert release.version in httpx.get(f"{server.url}/version", timeout=60.0).text
        answer = chat(server, **TRACE, **MESSAGE_SPANS, glassbox_respond=1).raise_for_status().json()
        trace = ended(server, answer["id"])
        (said,) = answer["glassbox"]["choices"]
        assert (trace["internal_id"], trace["signals"]) == (said["internal_id"], said["signals"])
        usage = answer["usage"]
        assert (usage["prompt_tokens"], TOKENS) == (trace["prompt_len"], trace["num_generated"])
        assert [0, 29] == trace["layers"]
        decoded = [phase for phase in trace["tokens"]["phase"] if phase == "decode"]
        assert TOKENS - 1 == len(decoded)
        rendered = httpx.post(f"{server.url}/tokenize", json={"model": MODEL_NAME, "messages": MESSAGES}, timeout=60.0)
        ids = rendered.json()["tokens"]
        for name, said in (("system", SYSTEM), ("question", QUESTION)):
            start, end = trace["options"]["spans"][name]
            assert said == server.post("/detokenize", tokens=ids[start:end])["prompt"]
            assert all(0 <= mass <= 1 for mass in trace["tokens"]["spans"][name])

        refused = chat(server, glassbox="trace", glassbox_top_k="many")
        assert (400, True) == (refused.status_code, "glassbox_top_k" in refused.text)

        page = httpx.get(f"{server.url}/glassbox/", timeout=60.0)
        assert (200, True) == (page.status_code, page.headers["content-type"].startswith("text/html"))
        assert server.settled_rows() > 0
        assert 30 == server.metric("glassbox_layers_observed")
        assert 0 == (server.metric("glassbox_layers_bypassed") or 0)
        assert 0 == (server.metric("glassbox_errors_total") or 0)
        (engine,) = httpx.get(f"{server.url}/glassbox/v1/snapshot", timeout=60.0).raise_for_status().json()["engines"]
        assert release.version in json.dumps(engine["build"])


def test_a_future_without_what_spans_by_message_need(
    demo_model_path: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Requests that don't ask for them are traced as ever; who asks is told, and the log names what is gone."""
    vllm = make_future(tmp_path / "tree", "optional")
    variables = vllm_environment(vllm, pytestconfig.rootpath, VLLM_PLUGINS="glassbox")
    with GlassboxServer(demo_model_path, tmp_path, env=variables) as server:
        assert VERSION in httpx.get(f"{server.url}/version", timeout=60.0).text
        answer = chat(server, **TRACE, glassbox_spans=["head=0:4"]).raise_for_status().json()
        trace = ended(server, answer["id"])
        assert (TOKENS, {"head": [0, 4]}) == (trace["num_generated"], trace["options"]["spans"])
        refused = chat(server, **TRACE, **MESSAGE_SPANS)
        assert (400, True) == (refused.status_code, "message" in refused.text)
        for name in ("OpenAIServingChat.render_chat_request", "CachedRequestState.output_token_ids"):
            assert name in server.log_path.read_text(encoding="utf-8")
