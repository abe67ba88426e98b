"""glassbox's own port on real sockets: who gets in, TLS, edits that can't be used, clients that hold on."""

import contextlib
import logging
import os
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import bcrypt
import httpx
import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger
from glassbox.export.family_source import FamilySource
from glassbox.export.prometheus import PrometheusCollector
from glassbox.processes.exporter import bounded_server
from glassbox.processes.exporter.own_port import OwnPort
from glassbox.store.snapshot import write_snapshot
from glassbox.store.trace_directory import traces_path
from glassbox.store.trace_record import write_trace
from glassbox.web.app import make_app
from tests.export_samples import logged, make_snapshot
from tests.ports import free_port
from tests.route_table import left_out
from tests.trace_samples import make_trace

TOKEN: Final = "0123456789abcdef0123456789abcdef"
OTHER: Final = "fedcba9876543210fedcba9876543210"
BEARER: Final = {"Authorization": f"Bearer {TOKEN}"}
DATA: Final = (
    "/glassbox/v1/snapshot",
    "/glassbox/v1/stream",
    "/glassbox/v1/requests",
    "/glassbox/v1/requests/cmpl-1-0",
)
SHELL: Final = ("/glassbox/", "/glassbox/page/main.js")


class Errors(ErrorCounter):
    """As the exporter's; remembers what was said."""

    def __init__(self) -> None:
        super().__init__(get_logger("glassbox.tests"), recovers=True, prefix="glassbox export to ")
        self.said: list[str] = []

    def count(self, stage: str, error: BaseException | str) -> None:
        self.said.append(f"{stage}: {error}")
        super().count(stage, error)


class Port:
    """An own port that follows `configure`, over a run directory with one engine and one traced request."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.number = folder / "run", free_port()
        write_snapshot(self.run_dir, make_snapshot())
        write_trace(traces_path(self.run_dir), make_trace())
        self.config = GlassboxConfig()
        self.source = FamilySource(self.run_dir, lambda: self.config)
        metrics = [PrometheusCollector(self.source)]
        self.errors = Errors()
        self.environ: dict[str, str] = {}

        def app(door: Any, shows_text: Callable[[], bool]) -> Any:
            return make_app(self.source, metrics=metrics, rules=lambda: door.rules, shows_text=shows_text)

        self.own = OwnPort(app, lambda: self.config, self.errors, self.environ)

    def configure(self, include_text: bool = False, **http: Any) -> None:
        """Take over an edit of `export.http`, as each round of the exporter does."""
        http = {"port": self.number, **http}
        self.config = GlassboxConfig.model_validate(
            {"export": {"http": http}, "requests": {"include_text": include_text}}
        )
        with self.errors.guard("http"):
            self.own.apply()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.number}{path}", timeout=20, **options)

    def status(self, path: str, **options: Any) -> int:
        """Of an answer, whose body may be endless."""
        with httpx.stream("GET", f"http://127.0.0.1:{self.number}{path}", timeout=20, **options) as answer:
            return answer.status_code


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    made = Port(tmp_path)
    yield made
    made.own.close()


def secret(path: Path, text: str, mode: int = 0o600) -> str:
    """A file, replaced by rename as editors and Kubernetes do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(mode)
    new.replace(path)
    return str(path)


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class TestTokens:
    def test_data_needs_one_of_them_and_the_shell_none(self, port: Port, tmp_path: Path) -> None:
        """Two tokens, as while one is replaced by another; comments aside."""
        port.configure(token_file=secret(tmp_path / "tokens", f"# old\n{TOKEN}\n\n{OTHER}\n"))
        routes = make_app(port.source, metrics=[PrometheusCollector(port.source)]).routes
        assert [] == left_out(routes, (*DATA, *SHELL, "/metrics", "/", "/glassbox"))
        for path in (*DATA, "/metrics"):
            assert 401 == port.status(path)
            assert 401 == port.status(path, headers={"Authorization": f"Bearer {TOKEN}x"})
            assert 401 == port.status(path, headers={"Authorization": TOKEN})
            for token in (TOKEN, OTHER):
                assert 200 == port.status(path, headers={"Authorization": f"Bearer {token}"})
        for path in SHELL:
            assert 200 == port.status(path)

    def test_the_refusal_says_what_to_send(self, port: Port, tmp_path: Path) -> None:
        """In JSON with a challenge; to a browser, as a page that asks."""
        port.configure(token_file=secret(tmp_path / "tokens", TOKEN))
        answer = port.get("/glassbox/v1/requests")
        assert {
            "error": "unauthorized; send Authorization: Bearer with a token of export.http.token_file"
        } == answer.json()
        assert 'Bearer realm="glassbox"' == answer.headers["WWW-Authenticate"]
        page = port.get("/glassbox/v1/requests/cmpl-1-0?format=html", headers={"Accept": "text/html"})
        assert (401, "text/html; charset=utf-8") == (page.status_code, page.headers["Content-Type"])
        assert "cmpl-1-0" not in page.text
        nobody = port.get("/glassbox/v1/requests/no-such-request", headers={"Accept": "text/html"})
        assert len(page.content) == len(nobody.content)

    def test_no_spelling_leads_round_it(self, port: Port, tmp_path: Path) -> None:
        """Nor another method: what isn't refused has no data."""
        port.configure(token_file=secret(tmp_path / "tokens", TOKEN))
        spelled = (
            "/glassbox//v1/requests", "//glassbox/v1/requests", "/glassbox/page/../v1/requests",
            "/GLASSBOX/v1/requests", "/glassbox/%76%31/requests", "/glassbox/v1/requests?", "/glassbox/v1/requests/",
            "/glassbox/v1/requests;x",
            "/glassbox/page/%2e%2e/v1/requests", "/./glassbox/v1/requests", "/glassbox/v1%2frequests", "/%6detrics",
        )  # fmt: skip
        for path in spelled:
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
                with socket.create_connection(("127.0.0.1", port.number), timeout=20) as client:
                    client.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                    answer = b"".join(iter(lambda: client.recv(65536), b""))
                assert int(answer.split()[1]) in {401, 404, 405, 307}, (method, path)
                assert b"cmpl-1" not in answer
                assert b"tiny" not in answer

    def test_metrics_may_be_opened_alone(self, port: Port, tmp_path: Path) -> None:
        """`open_metrics`: a Prometheus without a token gets them, and nothing else is open."""
        port.configure(token_file=secret(tmp_path / "tokens", TOKEN), open_metrics=True)
        assert 200 == port.status("/metrics")
        assert {401} == {port.status(path) for path in DATA}

    def test_an_edited_file_counts_from_the_next_second(self, port: Port, tmp_path: Path) -> None:
        """A bad one is said once, and the old tokens stay."""
        file = secret(tmp_path / "tokens", TOKEN)
        port.configure(token_file=file)
        assert 200 == port.status(DATA[0], headers=BEARER)
        secret(tmp_path / "tokens", OTHER)
        assert eventually(lambda: port.status(DATA[0], headers={"Authorization": f"Bearer {OTHER}"}) == 200)
        assert 401 == port.status(DATA[0], headers=BEARER)
        secret(tmp_path / "tokens", "short")
        assert eventually(lambda: port.errors.counts() == {"access": 1})
        secret(tmp_path / "tokens", OTHER, mode=0o644)
        assert eventually(lambda: port.errors.counts() == {"access": 2})
        assert 200 == port.status(DATA[0], headers={"Authorization": f"Bearer {OTHER}"})
        secret(tmp_path / "tokens", TOKEN)
        assert eventually(lambda: port.status(DATA[0], headers=BEARER) == 200)

    def test_a_bad_edit_of_the_configuration_leaves_the_listener(self, port: Port, tmp_path: Path) -> None:
        """It goes on with the old token; the error names key, file and remedy; no token is said."""
        port.configure(token_file=secret(tmp_path / "tokens", TOKEN))
        port.configure(token_file=str(tmp_path / "absent"))
        port.configure(token_file=secret(tmp_path / "weak", "pass word"))
        port.configure(cert_file=str(tmp_path / "absent"), key_file=str(tmp_path / "absent"))
        said = port.errors.said
        assert 3 == len(said)
        assert f"access: export.http.token_file ({tmp_path / 'absent'}) must be a file that can be read" in said[0]
        assert "make one with `openssl rand -hex 32`" in said[1]
        assert "pass word" not in said[1]
        assert (401, 200) == (port.status(DATA[0]), port.status(DATA[0], headers=BEARER))
        port.configure()
        assert 200 == port.status(DATA[0])

    @pytest.mark.parametrize(
        ("mode", "rule"),
        [(0o644, "must not be read or changed by others, got mode 0644; use chmod 600"), (0o640, ""), (0o400, "")],
    )
    def test_others_must_not_read_it(self, port: Port, tmp_path: Path, mode: int, rule: str) -> None:
        """The group may: Kubernetes mounts secrets so. What nobody can be let in by opens no port."""
        file = secret(tmp_path / "tokens", TOKEN, mode)
        port.configure(token_file=file)
        if rule:
            assert [f"http: export.http.token_file ({file}) {rule}"] == port.errors.said
            assert port.own.port is None
        else:
            assert [] == port.errors.said
            assert 401 == port.status("/metrics")

    def test_a_pipe_is_not_waited_for(self, port: Port, tmp_path: Path) -> None:
        """Nor is a directory or a file of somebody else taken."""
        os.mkfifo(tmp_path / "pipe", 0o600)
        port.configure(token_file=str(tmp_path / "pipe"))
        port.configure(token_file=str(tmp_path))
        file = secret(tmp_path / "tokens", TOKEN)
        if os.geteuid() == 0:
            os.chown(file, 4711, 4711)
            port.configure(token_file=file)
            assert "must belong to user 0 or root, got user 4711" in port.errors.said.pop()
        assert ["must be a regular file" in line for line in port.errors.said] == [True, True]


class TestUsers:
    def users(self, folder: Path, **passwords: str) -> str:
        lines = [f"{n}:{bcrypt.hashpw(p.encode(), bcrypt.gensalt(4)).decode()}" for n, p in passwords.items()]
        # As htpasswd -B writes it.
        return secret(folder / "users", "\n".join(lines).replace("$2b$", "$2y$"))

    def test_their_passwords_let_in(self, port: Port, tmp_path: Path) -> None:
        """A browser is asked before it loads anything, so the shell is closed as well."""
        port.configure(users_file=self.users(tmp_path, ann="a:colon", bob="ünï"))
        for path in (*DATA, *SHELL, "/metrics"):
            assert 401 == port.status(path)
            assert 200 == port.status(path, auth=("ann", "a:colon"))
            assert 200 == port.status(path, auth=httpx.BasicAuth("bob", "ünï"))
            for wrong in (("ann", "ünï"), ("eve", "a:colon"), ("ann", ""), ("", ""), ("ann", "x" * 500), ("ann", "\0")):
                assert 401 == port.status(path, auth=wrong)
        for junk in ("Basic", "Basic !", "Basic YQ==", "Basic " + "A" * 5000):
            assert 401 == port.status(DATA[0], headers={"Authorization": junk})
        assert 'Basic realm="glassbox"' == port.get("/").headers["WWW-Authenticate"]

    def test_a_password_that_was_right_costs_nothing_again(self, port: Port, tmp_path: Path) -> None:
        """bcrypt runs once for a client that scrapes, and each time for one that guesses."""
        port.configure(users_file=self.users(tmp_path, ann="secret"))
        with pytest.MonkeyPatch.context() as patch:
            checked: list[bytes] = []
            check = bcrypt.checkpw
            patch.setattr(bcrypt, "checkpw", lambda *given: checked.append(given[0]) or check(*given))
            for _ in range(5):
                assert 200 == port.status("/metrics", auth=("ann", "secret"))
                assert 401 == port.status("/metrics", auth=("ann", "guess"))
        assert (1, 5) == (checked.count(b"secret"), checked.count(b"guess"))

    def test_tokens_and_users_together(self, port: Port, tmp_path: Path) -> None:
        """Either lets in."""
        port.configure(users_file=self.users(tmp_path, ann="x"), token_file=secret(tmp_path / "tokens", TOKEN))
        assert 200 == port.status("/metrics", auth=("ann", "x"))
        assert 200 == port.status("/metrics", headers=BEARER)
        assert 401 == port.status("/metrics")
        assert ["Bearer", "Basic"] == [
            value.split()[0] for value in port.get("/metrics").headers.get_list("WWW-Authenticate")
        ]

    def test_a_plain_password_is_no_hash(self, port: Port, tmp_path: Path) -> None:
        """The error doesn't repeat it."""
        port.configure(users_file=secret(tmp_path / "users", "ann:hunter2"))
        assert "make one with `htpasswd -nB NAME`" in port.errors.said[0]
        assert "hunter2" not in port.errors.said[0]


class Authority:
    """Signs certificates for 127.0.0.1, with the openssl command."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.cert, self.key = folder / f"{name}-ca.pem", folder / f"{name}-ca.key"
        self._make(name, self.cert, self.key)

    def _make(self, name: str, cert: Path, key: Path, *args: str) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(cert), *args]
        subprocess.run(command, check=True, capture_output=True)

    def sign(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        extensions = ("subjectAltName=IP:127.0.0.1", "basicConstraints=critical,CA:FALSE")
        named = [part for extension in extensions for part in ("-addext", extension)]
        self._make(name, cert, key, *named, "-CA", str(self.cert), "-CAkey", str(self.key))
        key.chmod(0o600)
        return cert, key

    def context(self, client: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """Of a client that trusts this authority."""
        made = ssl.create_default_context(cafile=str(self.cert))
        if client is not None:
            made.load_cert_chain(*client)
        return made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "glassbox-test")


class TestTls:
    def names(self, port: Port, context: ssl.SSLContext) -> str:
        """Common name of the certificate that is shown."""
        with (
            socket.create_connection(("127.0.0.1", port.number), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as client,
        ):
            return str(dict(pair[0] for pair in client.getpeercert()["subject"])["commonName"])  # type: ignore[index]

    def test_it_is_all_there_is(self, port: Port, authority: Authority) -> None:
        """HTTPS answers with the token, HTTP gets nothing; TLS 1.1 and older are refused."""
        cert, key = authority.sign("first")
        port.configure(cert_file=str(cert), key_file=str(key))
        answer = httpx.get(f"https://127.0.0.1:{port.number}/metrics", verify=authority.context(), timeout=20)
        assert (200, "HTTP/1.1") == (answer.status_code, answer.http_version)
        with pytest.raises(httpx.TransportError):
            port.get("/metrics")
        old = authority.context()
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            self.names(port, old)
        assert port.own.port == port.number

    def test_a_renewed_certificate_is_shown_without_a_restart(self, port: Port, authority: Authority) -> None:
        """Half of a pair is said and not taken."""
        cert, key = authority.sign("renewed")
        port.configure(cert_file=str(cert), key_file=str(key))
        assert "renewed" == self.names(port, authority.context())
        later, later_key = authority.sign("later")
        later.replace(cert)
        assert eventually(lambda: port.errors.counts().get("access", 0) >= 1)
        assert "renewed" == self.names(port, authority.context())
        later_key.replace(key)
        assert eventually(lambda: self.names(port, authority.context()) == "later")

    def test_clients_need_a_certificate(self, port: Port, authority: Authority, tmp_path: Path) -> None:
        """`client_ca_file`: one of that authority, and no other's; it counts as authentication."""
        stranger = Authority(tmp_path, "stranger")
        cert, key = authority.sign("server")
        port.configure(
            include_text=True,
            host="0.0.0.0",
            cert_file=str(cert),
            key_file=str(key),
            client_ca_file=str(authority.cert),
        )
        url = f"https://127.0.0.1:{port.number}/metrics"
        assert 200 == httpx.get(url, verify=authority.context(authority.sign("client")), timeout=20).status_code
        for context in (authority.context(), authority.context(stranger.sign("eve"))):
            with pytest.raises(httpx.TransportError):
                httpx.get(url, verify=context, timeout=20)
        assert {} == port.errors.counts()

    def test_it_can_be_switched_on_and_off_by_an_edit(self, port: Port, authority: Authority) -> None:
        """The listener stays the same."""
        cert, key = authority.sign("edit")
        port.configure()
        assert 200 == port.status("/metrics")
        port.configure(cert_file=str(cert), key_file=str(key))
        assert "edit" == self.names(port, authority.context())
        port.configure()
        assert 200 == port.status("/metrics")


class TestText:
    """`requests.include_text` and a listener that everybody reaches."""

    def text(self, port: Port, **options: Any) -> Any:
        """Of the traced request; its ids are no text of any tokenizer, so that there is an empty list."""
        return port.get("/glassbox/v1/requests/cmpl-1-0", **options).json().get("text")

    @pytest.mark.parametrize("at_start", [True, False])
    def test_nobody_reads_it_without_proof(self, port: Port, tmp_path: Path, at_start: bool) -> None:
        """At the start as at an edit: counted once, with the remedy; everything else is served."""
        if not at_start:
            port.configure(host="0.0.0.0")
        port.configure(include_text=True, host="0.0.0.0")
        port.configure(include_text=True, host="0.0.0.0")
        assert {"access": 1} == port.errors.counts()
        assert "must not show prompts to everybody on the network" in port.errors.said[0]
        assert "until export.http has a token_file" in port.errors.said[0]
        assert self.text(port) is None
        assert 200 == port.status("/metrics")
        port.configure(include_text=True, host="0.0.0.0", token_file=secret(tmp_path / "tokens", TOKEN))
        assert self.text(port, headers=BEARER) is not None
        assert {"access": 1} == port.errors.counts()

    def test_this_host_alone_may(self, port: Port) -> None:
        """On loopback nothing is hidden, and $GLASSBOX_HTTP_ADDR counts as the host does."""
        port.configure(include_text=True)
        assert self.text(port) is not None
        port.environ["GLASSBOX_HTTP_ADDR"] = "0.0.0.0"
        port.configure(include_text=True)
        assert self.text(port) is None


class TestHost:
    def test_on_loopback_only_its_own_names_are_answered(self, port: Port) -> None:
        """A page of somebody else whose name points here gets nothing (DNS rebinding)."""
        port.configure(allowed_hosts=["Glassbox.Example.org"])
        n = port.number
        for host in (
            "localhost",
            f"LOCALHOST.:{n}",
            "127.0.0.1",
            f"127.8.8.8:{n}",
            f"[::1]:{n}",
            "glassbox.example.org:80",
        ):
            assert 200 == port.status("/metrics", headers={"Host": host}), host
        for host in (
            "evil.example",
            f"evil.example:{n}",
            "127.0.0.1.evil.example",
            "0.0.0.0",
            "10.0.0.1",
            "",
            "[::2]",
            "localhost@e",
        ):
            for path in ("/metrics", "/", *DATA, *SHELL):
                assert 421 == port.status(path, headers={"Host": host}), host
        answer = port.get("/metrics", headers={"Host": "evil.example"})
        assert "got 'evil.example'; if the name is yours, add it to export.http.allowed_hosts" in answer.json()["error"]

    def test_on_every_interface_names_are_checked_if_some_are_given(self, port: Port) -> None:
        """How a service is called in a cluster isn't known; an address is nobody's name."""
        port.configure(host="0.0.0.0")
        assert 200 == port.status("/metrics", headers={"Host": "vllm.svc.cluster.local:9464"})
        port.configure(host="0.0.0.0", allowed_hosts=["vllm"])
        assert [200, 200, 421] == [
            port.status("/metrics", headers={"Host": host}) for host in ("vllm:9464", "10.1.2.3:9464", "evil.example")
        ]


class TestListener:
    def test_another_address_of_the_same_port(self, port: Port) -> None:
        """The edit takes effect; what can't be listened on leaves the listener as it was."""
        port.configure()
        port.configure(host="0.0.0.0")
        assert 200 == port.status("/metrics", headers={"Host": "anything"})
        port.configure(host="no-such-host.invalid")
        assert 200 == port.status("/metrics")
        assert {"http": 1} == port.errors.counts()
        port.configure(host="::1")
        assert 200 == httpx.get(f"http://[::1]:{port.number}/metrics", timeout=20).status_code

    def test_a_port_that_is_taken_leaves_the_old_one(self, port: Port, caplog: pytest.LogCaptureFixture) -> None:
        """The error names port, address and key."""
        port.configure()
        with socket.create_server(("127.0.0.1", 0)) as holder, caplog.at_level(logging.WARNING, "glassbox"):
            taken = holder.getsockname()[1]
            port.configure(port=taken)
        assert 200 == port.status("/metrics")
        (line,) = [line for line in logged(caplog.records) if "http failed" in line]
        assert f"export.http.port {taken} is taken: another process listens on 127.0.0.1:{taken}" in line

    def test_the_old_key_opens_it_and_says_what_replaces_it(self, port: Port, caplog: pytest.LogCaptureFixture) -> None:
        """Once; it listens on loopback."""
        port.config = GlassboxConfig.model_validate({"export": {"prometheus": {"port": port.number}}})
        with caplog.at_level(logging.WARNING, "glassbox"):
            port.own.apply()
            port.own.apply()
        assert 200 == port.status("/metrics")
        (line,) = [line for line in logged(caplog.records) if "replaced" in line]
        assert f"write export.http: {{port: {port.number}, host: 0.0.0.0, token_file: PATH}}" in line


class TestBounds:
    """Clients that hold on, against a listener of four connections."""

    @pytest.fixture
    def few(self, port: Port) -> Port:
        port.configure(max_connections=4)
        return port

    def open(self, port: Port, count: int, sent: bytes = b"") -> list[socket.socket]:
        clients = [socket.create_connection(("127.0.0.1", port.number), timeout=20) for _ in range(count)]
        for client in clients:
            if sent:
                client.sendall(sent)
        return clients

    def test_half_open_connections_shut_nobody_out(self, few: Port) -> None:
        """However many: the listener holds four descriptors, and a scrape is answered meanwhile."""
        before = len(os.listdir("/proc/self/fd"))
        held = self.open(few, 300, b"GET /metrics HTTP/1.1\r\nHost: local")
        assert 200 == few.status("/metrics")
        assert eventually(lambda: len(os.listdir("/proc/self/fd")) - before - len(held) <= 5)
        for client in held:
            client.close()
        assert few.errors.counts()["connections"] >= 1

    def test_a_handshake_that_never_comes_is_one_of_them(self, port: Port, authority: Authority) -> None:
        """TLS: whoever says nothing is closed for whoever does."""
        cert, key = authority.sign("bounds")
        port.configure(max_connections=4, cert_file=str(cert), key_file=str(key))
        held = self.open(port, 40)
        answer = httpx.get(f"https://127.0.0.1:{port.number}/metrics", verify=authority.context(), timeout=20)
        assert 200 == answer.status_code
        for client in held:
            client.close()

    def test_the_fifth_while_four_are_answered_is_told_so(self, few: Port) -> None:
        """503; a place is free as soon as one goes."""
        held = self.open(few, 4, b"GET /glassbox/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for client in held:
            assert b"200 OK" in client.recv(64)
        with socket.create_connection(("127.0.0.1", few.number), timeout=20) as fifth:
            assert fifth.recv(64).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        for client in held:
            client.close()

        def answered() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return few.status("/metrics") == 200
            return False

        assert eventually(answered)

    def test_a_head_that_drips_is_given_up(self, few: Port, monkeypatch: pytest.MonkeyPatch) -> None:
        """A byte now and then doesn't prolong it; also on a connection that has asked before."""
        monkeypatch.setattr(bounded_server, "HEAD_S", 1.0)
        (first,) = self.open(few, 1)
        (second,) = self.open(few, 1, b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert second.recv(65536).startswith(b"HTTP/1.1 404")
        for client in (first, second):
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - began < 15:
                    client.sendall(b"G")
                    time.sleep(0.2)
            assert time.monotonic() - began < 10
            client.close()

    def test_who_reads_nothing_is_given_up(self, few: Port, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its answers wait in no memory of ours."""
        monkeypatch.setattr(bounded_server, "SEND_S", 1.0)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", few.number))
        # More answers than buffers of the system hold.
        asked = b"GET /glassbox/page/vendor/uplot/uPlot.iife.min.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400

        def ask_on() -> None:
            while True:
                client.sendall(asked)

        with pytest.raises(ConnectionError):
            ask_on()
        client.close()

    def test_a_large_head_is_refused(self, few: Port) -> None:
        """16 KiB; neither a long address nor many headers get further."""
        for head in (b"GET /" + b"a" * 70_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12_000):
            with (
                socket.create_connection(("127.0.0.1", few.number), timeout=20) as client,
                contextlib.suppress(OSError),
            ):
                client.sendall(head)
                answer = client.recv(64)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 400")

    def test_exports_keep_their_descriptors(self, port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever may be connected, of 1,024 files of a process 128 are not for clients."""
        monkeypatch.setattr(resource, "getrlimit", lambda _: (132, 1024))
        port.configure(max_connections=64)
        held = self.open(port, 4, b"GET /glassbox/v1/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for client in held:
            assert b"200 OK" in client.recv(64)
        with socket.create_connection(("127.0.0.1", port.number), timeout=20) as fifth:
            assert fifth.recv(64).startswith(b"HTTP/1.1 503")
        for client in held:
            client.close()
