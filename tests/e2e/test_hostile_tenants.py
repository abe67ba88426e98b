"""Two tenants with keys of their own at one `vllm serve` of two API servers: what they ask, and what they are shown.

Every route and method by itself is in tests/unit/web/test_tenants.py; here it is that vLLM hands on who asked,
whichever of its APIs and of its processes is asked.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import MODEL_NAME, GlassboxServer, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
CONFIG: dict[str, Any] = {
    "sample_rate": 0.0,
    "requests": {"isolate": True, "include_text": True, "keep": 40, "per_client": {"keep": 30}},
    "export": {"interval_s": 0.5},
}
SECRET = "The harbour's secret is blue"
MESSAGES = [{"role": "user", "content": SECRET}]
TRACE = {"glassbox": "trace"}
LIST = "/glassbox/v1/requests"
# Each API of vLLM's that takes keys.
ASKED = {
    "/v1/completions": {"prompt": SECRET, "max_tokens": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/chat/completions?streamed": {"messages": MESSAGES, "max_tokens": 2, "stream": True},
    "/v1/completions?samples": {"prompt": [SECRET, SECRET], "max_tokens": 2, "n": 2, "temperature": 1.0},
    "/v1/responses": {"input": SECRET, "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
}


def headers_of(name: str | None, **more: str) -> dict[str, str]:
    return more if name is None else {"Authorization": f"Bearer {KEYS[name]}", **more}


class Tenants:
    def __init__(self, server: GlassboxServer) -> None:
        self.server = server

    def ask(self, name: str, path: str, **headers: str) -> str:
        """Ask for a traced answer; returns the id that the client gets."""
        body = {"model": MODEL_NAME, "vllm_xargs": TRACE, **ASKED[path]}
        url = f"{self.server.url}{path.partition('?')[0]}"
        answer = httpx.post(url, json=body, headers=headers_of(name, **headers), timeout=120.0).raise_for_status()
        text = answer.text.partition("data: ")[2].partition("\n")[0] if "streamed" in path else answer.text
        return str(json.loads(text)["id"])

    def get(self, name: str | None, path: str = "") -> httpx.Response:
        return httpx.get(f"{self.server.url}{LIST}{path}", headers=headers_of(name), timeout=60.0)

    def ids(self, name: str) -> list[str]:
        return [one["request_id"] for one in self.get(name).raise_for_status().json()["requests"]]

    def settled(self, name: str, number: int) -> list[str]:
        """Ids of a tenant's traces once it has so many."""
        return wait_for(lambda: self.ids(name), lambda found: len(found) >= number, 60.0, f"{number} traces of {name}")


@pytest.fixture(scope="module")
def tenants(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    args = ("--api-server-count", "2", "--api-key", *KEYS.values())
    folder = tmp_path_factory.mktemp("tenants")
    env = {"VLLM_PLUGINS": "glassbox"}
    with GlassboxServer(demo_model_path, folder, config=CONFIG, args=args, env=env) as server:
        yield Tenants(server)


class TestTenants:
    def test_whichever_api_is_asked(self, tenants: Tenants) -> None:
        """Its client finds the trace by the id that it got, with its own text; the other tenant finds nothing."""
        asked = {path: tenants.ask("alice", path) for path in ASKED}
        tenants.settled("alice", len(ASKED) + 3)  # two prompts with two samples each
        for path, request_id in asked.items():
            own = tenants.get("alice", f"/{request_id}")
            assert own.status_code == 200, (path, own.text)
            assert "secret is blue" in "".join(own.json()["text"]["tokens"]), path
            for other, code in (("bob", 404), (None, 403)):
                # From either of the API servers: connections are shared out by the kernel.
                codes = {tenants.get(other, f"/{request_id}").status_code for _ in range(4)}
                assert codes == {code} or (other is None and codes == {401}), (path, other)
        assert tenants.ids("bob") == []
        client = {one["client"] for one in tenants.get("alice").json()["requests"]}
        assert len(client) == 1
        assert client != {"anonymous"}

    def test_a_victims_id_and_many_of_them(self, tenants: Tenants) -> None:
        """Sixty requests under it neither replace the victim's trace nor push any of its traces out."""
        before = tenants.ids("alice")
        named = {"X-Request-Id": "victim"}
        request_id = tenants.ask("alice", "/v1/completions", **named)
        own = tenants.settled("alice", len(before) + 1)
        first = tenants.get("alice", f"/{request_id}").json()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: tenants.ask("bob", "/v1/completions", **named), range(60)))
        tenants.ask("bob", "/v1/completions")  # the worker hears of an end with its next step
        assert len(tenants.settled("bob", 25)) <= 31
        again = tenants.get("alice", f"/{request_id}").json()
        assert (again["internal_id"], again["others"]) == (first["internal_id"], [])
        assert tenants.ids("alice") == own
        attackers = tenants.get("bob", f"/{request_id}").json()
        times = [attackers["start_time_s"], *(other["start_time_s"] for other in attackers["others"])]
        assert times == sorted(times, reverse=True)
        assert first["internal_id"] not in json.dumps(attackers)

    def test_what_lies_in_the_run_directory(self, tenants: Tenants) -> None:
        """No key is in it, and nobody else reads it."""
        for path in tenants.server.run_dir.rglob("*"):
            if path.is_file():
                assert 0 == path.stat().st_mode & 0o077, path
                assert not [key for key in KEYS.values() if key.encode() in path.read_bytes()], path
        assert not [key for key in KEYS.values() if f"Bearer {key}" in tenants.server.log_path.read_text()]
