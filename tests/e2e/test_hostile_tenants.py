"""Two tenants with keys of their own at one `vllm serve` of two API servers, and strangers at both of its ports.

Every route and method by itself is in tests/unit/web/test_tenants.py; here it is that vLLM hands on who asked,
whichever of its APIs and of its processes is asked, and that what a stranger sends or another program leaves in the run
directory neither shows nor stops anything.
"""

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.ports import free_port
from tests.serving import HOST, MODEL_NAME, GlassboxServer, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
CONFIG: dict[str, Any] = {
    "sample_rate": 0.0,
    "requests": {"isolate": True, "include_text": True, "keep": 40, "per_client": {"keep": 30}},
    "export": {"interval_s": 0.5},
}
TOKEN = "token-of-the-operator"
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
    """A server, its clients, and the port of its operators."""

    def __init__(self, server: GlassboxServer, own_port: int) -> None:
        self.server, self.own_port = server, own_port

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
    tokens = folder / "tokens"
    tokens.write_text(TOKEN)
    tokens.chmod(0o600)
    own_port = free_port()
    own = {"port": own_port, "host": HOST, "token_file": str(tokens), "max_connections": 64}
    config = {**CONFIG, "export": {**CONFIG["export"], "http": own}}
    env = {"VLLM_PLUGINS": "glassbox"}
    with GlassboxServer(demo_model_path, folder, config=config, args=args, env=env) as server:
        yield Tenants(server, own_port)


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
        wait_for(lambda: len(tenants.ids("bob")), lambda kept: 25 <= kept <= 31, 60.0, "what bob may keep")
        again = tenants.get("alice", f"/{request_id}").json()
        assert (again["internal_id"], again["others"]) == (first["internal_id"], [])
        assert tenants.ids("alice") == own
        attackers = tenants.get("bob", f"/{request_id}").json()
        times = [attackers["start_time_s"], *(other["start_time_s"] for other in attackers["others"])]
        assert times == sorted(times, reverse=True)
        assert first["internal_id"] not in json.dumps(attackers)

    def test_streams(self, tenants: Tenants) -> None:
        """Live numbers are the server's: whoever has a key or the token sees them, and nothing of a request in them."""
        request_id = tenants.ask("alice", "/v1/completions")
        ids = [*tenants.settled("alice", 1), request_id.partition("-")[2]]
        token = {"Authorization": f"Bearer {TOKEN}"}
        vllms, own = tenants.server.port, tenants.own_port
        for port, headers, code in (
            (vllms, headers_of("alice"), 200),
            (vllms, headers_of("bob"), 200),
            (vllms, token, 401),
            (vllms, {}, 401),
            (own, token, 200),
            (own, headers_of("alice"), 401),
            (own, {}, 401),
        ):
            url = f"http://{HOST}:{port}/glassbox/v1/stream?window=total"
            with httpx.stream("GET", url, headers=headers, timeout=60.0) as answer:
                assert code == answer.status_code, (port, headers)
                text = ""
                for line in answer.iter_lines():
                    text += f"{line}\n"
                    if '"engine":{' in line:
                        break
            assert (code == 200) == ("event: frame\n" in text)
            assert not [said for said in (*ids, SECRET, *KEYS.values()) if said in text]

    def test_what_lies_in_the_run_directory(self, tenants: Tenants) -> None:
        """No key is in it, and nobody else reads it."""
        for path in tenants.server.run_dir.rglob("*"):
            if path.is_file():
                assert 0 == path.stat().st_mode & 0o077, path
                assert not [key for key in KEYS.values() if key.encode() in path.read_bytes()], path
        assert not [key for key in KEYS.values() if f"Bearer {key}" in tenants.server.log_path.read_text()]


# Ways to write a path that proxies, frameworks and guards have disagreed on.
SPELLINGS: Final = (
    "/glassbox/v1/requests",
    "/glassbox/v1/requests/",
    "//glassbox/v1/requests",
    "/glassbox//v1/requests",
    "/glassbox/./v1/requests",
    "/glassbox/page/../v1/requests",
    "/v1/../glassbox/v1/requests",
    "/%67lassbox/v1/requests",
    "/glassbox%2Fv1%2Frequests",
    "/glassbox/v1/requests%00",
    "/glassbox/v1/requests;/v1/models",
    "/GLASSBOX/v1/requests",
    "/glassbox/v1/requests?api_key=key-of-alice",
    "/glassbox/v1/requests?authorization=Bearer%20key-of-alice",
    "http://localhost/glassbox/v1/requests",
    "/glassbox/v1/snapshot",
    "/glassbox/v1/stream",
)
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY")
# What is nobody's key, though it looks like one.
NO_PROOFS: Final[tuple[dict[str, str], ...]] = (
    {},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer key-of-alic"},
    {"Authorization": "Bearer key-of-alice2"},
    {"Authorization": "Bearer key-of-alice,key-of-bob"},
    {"Authorization": "Basic a2V5LW9mLWFsaWNl"},
    {"Authorization": "key-of-alice"},
    {"X-Api-Key": "key-of-alice"},
    {"Cookie": "glassbox_key=key-of-alice; Authorization=Bearer key-of-alice"},
    {"X-Forwarded-For": "127.0.0.1", "X-Original-URL": "/v1/models", "X-Forwarded-Host": "localhost"},
)


def status_and_body(port: int, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """Of an answer to exactly these bytes, which a client library would have tidied; at most the first 64 KiB."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30.0)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, b"" if answer.getheader("Content-Type", "").startswith("text/event") else answer.read(
            65536
        )
    finally:
        connection.close()


class TestStrangers:
    """Without a key, or with what is none."""

    def ports(self, tenants: Tenants) -> tuple[int, int]:
        return tenants.server.port, tenants.own_port

    def assert_nothing_shown(self, tenants: Tenants, ids: list[str], method: str, path: str, **headers: str) -> None:
        for port in self.ports(tenants):
            status, body = status_and_body(port, method, path, headers)
            assert status in {307, 308, 400, 401, 403, 404, 405, 421}, (port, method, path, headers, status)
            assert SECRET.encode() not in body, (method, path)
            assert not [one for one in ids if one.encode() in body and one not in path], (method, path)

    def test_no_spelling_of_a_path_leads_past_the_guard(self, tenants: Tenants) -> None:
        tenants.ask("alice", "/v1/completions")
        ids = tenants.settled("alice", 1)
        for path in (*SPELLINGS, f"/glassbox/v1/requests/{ids[0]}", f"/glassbox/v1/requests/{ids[0]}%2F.."):
            self.assert_nothing_shown(tenants, ids, "GET", path)

    def test_nor_does_a_method(self, tenants: Tenants) -> None:
        ids = tenants.settled("alice", 1)
        for method in METHODS[1:]:
            self.assert_nothing_shown(tenants, ids, method, f"/glassbox/v1/requests/{ids[0]}")

    def test_nor_does_what_is_no_proof(self, tenants: Tenants) -> None:
        ids = tenants.settled("alice", 1)
        for headers in NO_PROOFS:
            self.assert_nothing_shown(tenants, ids, "GET", "/glassbox/v1/requests", **headers)

    def test_a_key_of_one_port_is_none_of_the_other(self, tenants: Tenants) -> None:
        token, key = {"Authorization": f"Bearer {TOKEN}"}, headers_of("alice")
        assert 401 == status_and_body(tenants.server.port, "GET", LIST, token)[0]
        assert 401 == status_and_body(tenants.own_port, "GET", LIST, key)[0]
        assert 200 == status_and_body(tenants.own_port, "GET", LIST, token)[0]
        assert 200 == status_and_body(tenants.server.port, "GET", LIST, key)[0]


class TestIds:
    """An id is whatever a client says, and leads to its own traces alone."""

    def test_the_internal_id_of_another(self, tenants: Tenants) -> None:
        """Asked for by the name that vLLM gave the victim's: with and without the suffix that it appends."""
        request_id = tenants.ask("alice", "/v1/completions", **{"X-Request-Id": "precious"})
        tenants.ask("alice", "/v1/completions")  # the worker hears of an end with its next step
        own = wait_for(
            lambda: tenants.get("alice", f"/{request_id}").json(),
            lambda found: found.get("status") == "finished",
            60.0,
            "alice's trace",
        )
        for said in (own["internal_id"], own["internal_id"][: -len("-01234567")], f"0_{own['internal_id']}"):
            tenants.ask("bob", "/v1/completions", **{"X-Request-Id": said})
        tenants.ask("bob", "/v1/completions")
        assert tenants.get("alice", f"/{request_id}").json()["internal_id"] == own["internal_id"]
        for name in (own["internal_id"], request_id):
            answer = tenants.get("bob", f"/{name}")
            assert answer.status_code == 404 or answer.json()["internal_id"] != own["internal_id"]

    @pytest.mark.parametrize("said", ["../../../etc/passwd", "a" * 4000, "%00%0d%0aX-Key: 1", "<script>", "."])
    def test_one_that_is_no_name(self, tenants: Tenants, said: str) -> None:
        """It is served and traced, and nothing is written but in the run directory."""
        request_id = tenants.ask("bob", "/v1/completions", **{"X-Request-Id": said})
        tenants.ask("bob", "/v1/completions")  # the worker hears of an end with its next step
        found = wait_for(
            lambda: tenants.ids("bob"), lambda ids: any(one.startswith(request_id) for one in ids), 60.0, "bob's trace"
        )
        assert len(found) <= 31
        server = tenants.server
        assert [] == [path for path in server.folder.rglob("*passwd*") if server.run_dir not in path.parents]


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def _for_all(path: Path) -> None:
    path.write_bytes(os.urandom(4096))
    path.chmod(0o666)


class TestRunDirectory:
    """What another program leaves there is neither waited for nor believed."""

    @pytest.mark.parametrize("put", [_endless, _folder, _sparse, _socket, _for_all])
    @pytest.mark.parametrize("name", ["worker-0-7-forged.npz", "metrics-page.forged"])
    def test_things_that_are_no_files_of_ours(self, tenants: Tenants, put: Callable[[Path], None], name: str) -> None:
        path = tenants.server.run_dir / name
        put(path)
        try:
            page = wait_for(
                lambda: httpx.get(f"{tenants.server.url}/metrics", timeout=60.0).raise_for_status().text,
                lambda text: "glassbox_steps_total" in text,
                90.0,
                "glassbox's metrics",
            )
            assert 'rank="7"' not in page
            assert "alice" not in page
            assert 200 == status_and_body(tenants.own_port, "GET", LIST, {"Authorization": f"Bearer {TOKEN}"})[0]
        finally:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


class TestReaders:
    """Connections that never end, at the operators' port: whoever has a token still gets in, and exports go on."""

    @pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"\x16\x03\x01\x02"])
    def test_three_hundred_of_them(self, tenants: Tenants, sent: bytes) -> None:
        """Silent ones, such with half a request's head, and such that speak TLS to a port without."""
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    connection = stack.enter_context(socket.create_connection((HOST, tenants.own_port), timeout=30.0))
                    connection.sendall(sent)
            proof = {"Authorization": f"Bearer {TOKEN}"}

            def scraped() -> str:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    return status_and_body(tenants.own_port, "GET", "/metrics", proof)[1].decode()
                return ""

            assert wait_for(scraped, lambda page: "glassbox_" in page, 90.0, "a page in spite of them")
        errors = tenants.server.metric("glassbox_errors_total", stage="http")
        assert not errors
