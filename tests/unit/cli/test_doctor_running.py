"""`glassbox doctor` on running servers: real processes, run directories, ports and a real Prometheus."""

import gzip
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from glassbox.cli.doctor import doors, plugin_loading, prometheus_targets, run_directories, served_metrics
from glassbox.cli.doctor.checks import RUNNING, examine
from glassbox.cli.doctor.finding import Finding, Status
from glassbox.cli.doctor.local_servers import LocalServer, listening_addresses, local_servers
from glassbox.cli.doctor.page import MetricsPage
from glassbox.cli.doctor.question import Question
from glassbox.cli.doctor.reading import get
from glassbox.config.load import load_config
from glassbox.processes.exporter.sinks import Sinks
from glassbox.store.api_server_note import write_note
from glassbox.store.exporter_lock import ExporterLock
from glassbox.store.exporter_status import ExporterStatus, write_status
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import changed, make_snapshot
from tests.metrics_pages import VLLM_LINES, metrics_page
from tests.prometheus_server import PrometheusServer, free_port
from tests.serving import require_tool, wait_for

KEY = "sesame"
Answers = Callable[[str, str | None], tuple[int, str]]


def told(findings: Iterable[Finding]) -> dict[str, Finding]:
    """By id; each at most once."""
    found = list(findings)
    by_id = {finding.id: finding for finding in found}
    assert len(found) == len(by_id), found
    return by_id


def statuses(findings: Iterable[Finding]) -> dict[str, str]:
    return {name: finding.status.value for name, finding in told(findings).items()}


def asked(**changes: Any) -> Question:
    """Of a shell without variables, by a user without servers."""
    return Question(**{"environ": {}, "servers": (), **changes})


def write_yaml(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


@contextmanager
def answering(answers: Answers, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server on loopback that answers as the function says, from path and Authorization; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name http.server asks for
            status, body = answers(self.path, self.headers["Authorization"])
            self.send_response_only(status)
            for name, value in (headers or {"Server": "uvicorn"}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=running.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@contextmanager
def sending(*parts: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """A server that sends these bytes to whoever connects, each after a pause; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with connection:
                try:
                    for part in parts:
                        time.sleep(pause_s)
                        connection.sendall(part)
                except OSError:  # nobody listens any more
                    pass

    thread = Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def page_findings(page: str, headers: Mapping[str, str] | None = None, status: int = 200) -> list[Finding]:
    """What is told of a server with such a /metrics."""
    checks = [check for check in RUNNING if check.__module__ == served_metrics.__name__]
    with answering(lambda *_: (status, page), headers) as url:
        return list(examine(asked(url=url), checks))


def good_page(**numbers: Any) -> str:
    """Of a server that is well but for the changes to its engine's numbers."""
    well = {"layers_bypassed": {}, "errors": {}, **numbers}
    return metrics_page([changed(make_snapshot(), **well)], "layer")


class TestReading:
    def test_an_answer_that_drips_ends_in_time(self) -> None:
        """In the head as in the body, where each part comes before httpx's own limit."""
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        for parts in ([bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 500], [head, *[b"a"] * 500]):
            with sending(*parts, pause_s=0.05) as url:
                begin = time.monotonic()
                assert None is get(url, timeout_s=1.0).status
                assert time.monotonic() - begin < 5

    def test_a_large_answer_is_cut_off(self) -> None:
        """And what came is read."""
        with answering(lambda *_: (200, "a" * 100_000)) as url:
            answer = get(url, max_bytes=1000)
        assert (200, 1000, False) == (answer.status, len(answer.body), answer.whole)

    def test_a_packed_answer_is_not_unpacked(self) -> None:
        """It was not asked for."""
        packed = gzip.compress(b"glassbox_x 1\n" * 1_000_000)
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
        with sending(head + packed) as url:
            answer = get(url)
        assert (None, b"") == (answer.status, answer.body)
        assert "not asked for" in answer.why

    def test_no_redirect_is_followed(self) -> None:
        """A server must not send doctor to others with the key."""
        asked_for: list[str] = []
        with answering(lambda path, _: (asked_for.append(path) or 307, ""), {"Location": "/other"}) as url:
            assert 307 == get(f"{url}/a", KEY).status
        assert ["/a"] == asked_for


class TestPage:
    def test_a_server_that_is_well(self) -> None:
        """Its answer, metrics, version, YAML, layers, certificate, samples and errors."""
        found = statuses(page_findings(good_page()))
        expected = ("reachable", "metrics", "version", "config", "layers", "certified", "sampling", "errors")
        assert {"server.age": "unknown", **{f"server.{name}": "ok" for name in expected}} == found

    def test_a_server_that_is_not_there(self) -> None:
        """Its port is closed; nothing else is told of it."""
        (found,) = page_findings("", status=500)
        assert ("server.reachable", Status.ERROR) == (found.id, found.status)
        (found,) = served_metrics.reachable(asked(url=f"http://127.0.0.1:{free_port()}"))
        assert Status.ERROR is found.status
        assert {"server.reachable": "unknown"} == statuses(served_metrics.reachable(asked()))

    def test_a_page_that_asks_for_a_key(self) -> None:
        """The remedy is to give it, and it is sent."""

        def answers(_: str, given: str | None) -> tuple[int, str]:
            return (200, good_page()) if given == f"Bearer {KEY}" else (401, "")

        with answering(answers) as url:
            (found,) = served_metrics.reachable(asked(url=url))
            assert (Status.ERROR, True) == (found.status, "GLASSBOX_API_KEY" in (found.remedy or ""))
            assert {"server.reachable": "ok"} == statuses(served_metrics.reachable(asked(url=url, api_key=KEY)))

    @pytest.mark.parametrize(
        ("page", "headers", "seen"),
        [
            (VLLM_LINES, {"Server": "uvicorn"}, "has vLLM's metrics and none of glassbox"),
            (VLLM_LINES, {}, "vLLM's Rust front end"),
            (VLLM_LINES + "dynamo_component_uptime 3.0\n", {}, "Dynamo"),
            ("up 1\n", {"Server": "uvicorn"}, "neither vLLM nor glassbox"),
        ],
    )
    def test_measured_but_nobody_can_see_it(self, page: str, headers: Mapping[str, str], seen: str) -> None:
        """Who hides it is named, with what helps."""
        found = told(page_findings(page, headers or {"X-Front-End": "axum"}))
        assert ["server.reachable", "server.metrics"] == list(found)
        assert (Status.ERROR, True) == (found["server.metrics"].status, seen in found["server.metrics"].seen)
        if seen in {"Dynamo", "vLLM's Rust front end"}:
            assert "set export.prometheus.port" in (found["server.metrics"].remedy or "")

    def test_a_hostile_page(self) -> None:
        """Metrics that are none, labels with escape sequences: a finding, and nothing of it reaches the terminal."""
        assert "error" == statuses(page_findings("glassbox_steps_total{ what\n"))["server.metrics"]
        page = good_page() + 'glassbox_errors_total{engine="0",model_name="m",stage="\x1b[2J"} 3\n'
        assert all("\x1b" not in f"{finding.seen}{finding.remedy}" for finding in page_findings(page))

    def test_layers_that_are_not_observed(self) -> None:
        """By reason, with its meaning."""
        some = told(page_findings(good_page(layers_bypassed={"encoder": 3})))["server.layers"]
        none = told(page_findings(good_page(layers_bypassed={"sparse": 2}, layers_observed=0)))["server.layers"]
        assert (Status.WARNING, Status.ERROR) == (some.status, none.status)
        assert "2 layers are observed; not observed: 3 encoder (encoder attention sees" in some.seen
        assert "no layer is observed: 2 sparse (its attention is sparse" in none.seen

    @pytest.mark.parametrize(
        ("numbers", "status"),
        [
            ({"layers_bypassed": {"not_reproduced": 1}}, "error"),
            ({"layers_bypassed": {"not_certified": 1}}, "warning"),
            ({"canary_rows": {}}, "unknown"),
        ],
    )
    def test_layers_that_are_not_certified(self, numbers: Mapping[str, Any], status: str) -> None:
        """Wrong output, none that could be checked, nothing served yet."""
        assert status == statuses(page_findings(good_page(**numbers)))["server.certified"]

    @pytest.mark.parametrize(
        ("numbers", "status"),
        [({"sample_rate": 0.0}, "warning"), ({"steps": 0, "sampled_steps": 0}, "unknown")],
    )
    def test_sampling(self, numbers: Mapping[str, Any], status: str) -> None:
        """Switched off, or not begun."""
        assert status == statuses(page_findings(good_page(**numbers)))["server.sampling"]

    def test_steps_without_rows(self) -> None:
        """Many steps at a rate that should have given some."""
        lines = (line for line in good_page().splitlines() if not line.startswith("glassbox_attention_rows_total"))
        assert "error" == statuses(page_findings("\n".join([*lines, ""])))["server.sampling"]

    def test_a_bad_edit_and_errors(self) -> None:
        """Each with its remedy."""
        found = told(page_findings(good_page(reload_successful=False, errors={"http": 2})))
        assert (Status.ERROR, Status.WARNING) == (found["server.config"].status, found["server.errors"].status)
        assert "someone else listens there" in (found["server.errors"].remedy or "")

    def test_another_version(self) -> None:
        """Of glassbox, in the server."""
        build = {"version": "0.0.1", "vllm_version": "0.32.0", "backend": "CPU_ATTN"}
        found = told(page_findings(good_page(build=build)))["server.version"]
        assert (Status.WARNING, True) == (found.status, "glassbox 0.0.1, vLLM 0.32.0, CPU_ATTN" in found.seen)

    @pytest.mark.parametrize(("age_s", "status"), [(3.0, "ok"), (600.0, "error")])
    def test_ages(self, age_s: float, status: str) -> None:
        """Of snapshots, and of what the sinks last took."""
        more = (
            f'glassbox_snapshot_age_seconds{{engine="0",model_name="m",rank="0"}} {age_s}\n'
            f'glassbox_sink_last_success_timestamp_seconds{{sink="otel"}} {time.time() - age_s}\n'
        )
        found = statuses(page_findings(good_page() + more))
        assert (status, status) == (found["server.age"], found["server.sinks"])

    def test_what_waits_for_a_long_interval_is_not_old(self) -> None:
        """As long as the server's own interval allows."""
        more = 'glassbox_snapshot_age_seconds{engine="0"} 600\nglassbox_export_interval_seconds 300\n'
        assert "ok" == statuses(page_findings(good_page() + more))["server.age"]

    def test_an_exporter_that_is_gone(self) -> None:
        """As the server that shows the page tells it."""
        found = told(page_findings(good_page() + "glassbox_exporter_up 0\nglassbox_exporter_silence_seconds 90\n"))
        assert "no sign of life for 1 min 30 s" in found["server.exporter"].seen

    def test_a_cut_page_is_read_as_far_as_it_goes(self) -> None:
        """Its last line is no number."""
        with answering(lambda *_: (200, "glassbox_a 1\nglassbox_b 12345\n")) as url:
            page = MetricsPage(get(url, max_bytes=25))
        assert (1.0, None, "") == (page.total("a"), page.total("b"), page.unreadable)


class TestDoors:
    @pytest.fixture
    def own_port(self, tmp_path: Path) -> Iterator[tuple[str, Path]]:
        """URL and YAML of a real port of glassbox's own, on loopback."""
        run_dir = tmp_path / "run"
        write_snapshot(run_dir, make_snapshot(time_s=time.time()))
        port = free_port()
        path = write_yaml(tmp_path / "a.yaml", export={"prometheus": {"port": port}})
        config = load_config(path)
        sinks = Sinks(run_dir, lambda: config, {"GLASSBOX_HTTP_ADDR": "127.0.0.1"})
        try:
            sinks.round()
            yield f"http://127.0.0.1:{port}", path
        finally:
            sinks.close()

    def test_open_to_this_machine_alone(self, own_port: tuple[str, Path]) -> None:
        """Is no fault; glassbox's own port is known by its page, and by the YAML beside vLLM's."""
        url, path = own_port
        assert {"door.own_port": "ok"} == statuses(
            examine(asked(url=url, config=path), [doors.vllm_port, doors.own_port])
        )
        with answering(lambda *_: (404, "")) as vllm:
            question = asked(url=vllm, config=path)
            found = statuses(examine(question, [doors.vllm_port, doors.own_port]))
        assert {"door.vllm": "ok", "door.own_port": "ok"} == found

    def test_open_beyond_this_machine(self, own_port: tuple[str, Path]) -> None:
        """Whoever reaches the address sees it; with texts of requests that is an error."""
        url, path = own_port
        url = url.replace("127.0.0.1", "[::ffff:127.0.0.1]")  # an address that doctor doesn't know as this machine's
        (found,) = doors.vllm_port(asked(url=url, config=path))
        assert ("door.own_port", Status.WARNING) == (found.id, found.status)
        write_yaml(path, requests={"include_text": True})
        found_text = statuses(doors.vllm_port(asked(url=url, config=path)))
        assert {"door.text": "error", "door.own_port": "warning"} == found_text

    def test_an_own_port_that_nobody_serves(self, tmp_path: Path) -> None:
        """Though the YAML asks for it."""
        path = write_yaml(tmp_path / "a.yaml", export={"prometheus": {"port": free_port()}})
        found = statuses(doors.own_port(asked(url="http://127.0.0.1:1", config=path)))
        assert {"door.own_port": "error"} == found

    def test_routes_beside_vllms_key(self) -> None:
        """vLLM asks for a key, glassbox's routes don't."""
        with answering(lambda path, _: (401 if path == "/v1/models" else 200, "")) as url:
            (found,) = doors.vllm_port(asked(url=url))
        assert (Status.ERROR, "door.vllm") == (found.status, found.id)
        assert "/glassbox/v1/requests, /glassbox/v1/snapshot, /glassbox/v1/stream" in found.seen

    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            (None, {"door.vllm": "ok"}),
            (KEY, {"door.vllm": "ok", "door.vllm_key": "ok"}),
            ("wrong", {"door.vllm": "ok", "door.vllm_key": "error"}),
        ],
    )
    def test_behind_a_key(self, key: str | None, expected: dict[str, str]) -> None:
        """It is well, and the given key is tried."""
        with answering(lambda _, given: (200 if given == f"Bearer {KEY}" else 401, "")) as url:
            assert expected == statuses(doors.vllm_port(asked(url=url, api_key=key)))

    def test_an_own_port_with_another_token(self, tmp_path: Path) -> None:
        """It may have one; that the key isn't taken there is no fault."""
        with answering(lambda *_: (401, "")) as url:
            path = write_yaml(tmp_path / "a.yaml", export={"prometheus": {"port": int(url.rpartition(":")[2])}})
            found = statuses(doors.own_port(asked(url="http://127.0.0.1:1", config=path, api_key=KEY)))
        assert {"door.own_port": "ok", "door.own_port_key": "unknown"} == found

    def test_who_listens_where(self) -> None:
        """As the kernel has it, for both families."""
        with socket.create_server(("127.0.0.5", 0)) as four:
            port = four.getsockname()[1]
            assert ["127.0.0.5"] == listening_addresses(port)
            with socket.socket(socket.AF_INET6) as six:
                six.bind(("::1", port))
                assert ["127.0.0.5"] == listening_addresses(port)  # bound is not listening
                six.listen()
                assert ["127.0.0.5", "::1"] == listening_addresses(port)
        assert [] == listening_addresses(port)


class TestRunDirectory:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Of a server whose worker has just written, and whose API server shows it."""
        folder = tmp_path / "run"
        write_snapshot(folder, make_snapshot(time_s=time.time()))
        write_note(folder)
        return folder

    def look(self, folder: Path) -> dict[str, str]:
        return statuses(run_directories.directories(asked(run_dir=folder)))

    def test_a_server_that_is_well(self, folder: Path) -> None:
        """With and without an exporter."""
        well = {"run.trust": "ok", "run.snapshots": "ok", "run.steps": "ok", "run.exporter": "ok"}
        assert well == self.look(folder)
        lock = ExporterLock.acquire(folder)
        assert lock is not None
        write_status(folder, ExporterStatus(os.getpid(), time.time(), {}))
        assert {**well, "run.errors": "ok"} == self.look(folder)
        lock.release()

    def test_no_directory(self, tmp_path: Path) -> None:
        """None is named, or it is gone."""
        assert {"run.snapshots": "unknown"} == statuses(run_directories.directories(asked()))
        assert {"run.snapshots": "error"} == self.look(tmp_path / "gone")

    def test_nothing_new_for_long(self, folder: Path) -> None:
        """A full disk, or a worker that hangs."""
        write_snapshot(folder, make_snapshot(time_s=time.time() - 300))
        assert "error" == self.look(folder)["run.snapshots"]
        write_snapshot(folder, make_snapshot(time_s=time.time(), instance="other"))
        assert "warning" == self.look(folder)["run.snapshots"]

    def test_no_worker_yet(self, tmp_path: Path) -> None:
        """The server starts, or nothing is observed."""
        tmp_path.chmod(0o700)
        assert "warning" == self.look(tmp_path)["run.snapshots"]

    def test_measured_but_nobody_can_see_it(self, folder: Path) -> None:
        """As of Ray's workers on another node: no API server reads it, and no exporter runs."""
        (folder / "api_server").unlink()
        (found,) = [one for one in run_directories.directories(asked(run_dir=folder)) if one.id == "run.exporter"]
        assert (Status.ERROR, True) == (found.status, "nobody can see it" in found.seen)
        assert "GLASSBOX_CONFIG names on this node" in (found.remedy or "")

    def test_exporters_that_ended_or_hang(self, folder: Path) -> None:
        """The lock tells whether it lives, its status when it last did something."""
        write_status(folder, ExporterStatus(os.getpid(), time.time(), {"otel": 3}))
        assert ("error", "warning") == (self.look(folder)["run.exporter"], self.look(folder)["run.errors"])
        lock = ExporterLock.acquire(folder)
        assert lock is not None
        write_status(folder, ExporterStatus(os.getpid(), time.time() - 300, {}))
        assert "error" == self.look(folder)["run.exporter"]
        lock.release()

    def test_a_snapshot_that_can_not_be_read(self, folder: Path) -> None:
        """Of another version, or damaged."""
        (folder / "worker-0-1-x.npz").write_bytes(b"damaged")
        assert "error" == self.look(folder)["run.readable"]

    def test_what_others_could_have_put_there(self, folder: Path, tmp_path: Path) -> None:
        """A link, a pipe that would be waited for, a directory that others may write: said, and not read."""
        link = tmp_path / "link"
        link.symlink_to(folder)
        assert {"run.trust": "error"} == self.look(link)
        os.mkfifo(folder / "worker-0-0-pipe.npz")
        assert {"run.trust": "error"} == self.look(folder)
        (folder / "worker-0-0-pipe.npz").unlink()
        folder.chmod(0o777)
        assert {"run.trust": "error"} == self.look(folder)


class TestLocalServers:
    @contextmanager
    def serving(self, tmp_path: Path, *words: str, **variables: str) -> Iterator[LocalServer]:
        """A process that was started like a server's first, and has started one with the run directory's name."""
        program = tmp_path / "vllm"
        program.write_text(
            "import os, subprocess, sys, time\n"
            "child = {**os.environ, 'GLASSBOX_RUN_DIR': os.environ.pop('CHILD', '/nowhere')}\n"
            "waits = [sys.executable, '-c', 'import sys; sys.stdin.read()']\n"
            "subprocess.Popen(waits, env=child, stdin=subprocess.PIPE)\n"
            "print('started', flush=True)\n"
            "sys.stdin.read()\n"
        )
        environ = {"PATH": os.environ["PATH"], **variables}
        command = [sys.executable, str(program), "serve", "some/model", *words]
        process = subprocess.Popen(
            command, env=environ, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            (found,) = [one for one in local_servers() if one.pid == process.pid]
            yield found
        finally:
            process.communicate("")

    def test_how_it_was_started(self, tmp_path: Path) -> None:
        """Port, host, YAML, run directory (by its child, since the plugin chooses it later)."""
        with self.serving(tmp_path, "--port=18123", "--host", "::", CHILD="/run/somewhere") as found:
            assert (18123, "http://[::1]:18123", tmp_path) == (found.port, found.url, found.cwd)
            assert Path("/run/somewhere") == found.run_dir
            assert found.config_path is not None
            assert "configs" == found.config_path.parent.name
            own = write_yaml(tmp_path / "glassbox.yaml", export={"prometheus": {"port": 19123}})
            assert (own, 19123) == (found.config_path, found.own_port)
            for url in (found.url, "http://localhost:19123"):
                question = asked(url=url, servers=[found])
                assert (found, own) == (question.server, question.config_path)
            other = asked(url="http://localhost:1", servers=[found])
            assert (None, []) == (other.server, other.examined)
            assert found.url == asked(servers=[found]).or_only_server().url

    def test_its_variables_count(self, tmp_path: Path) -> None:
        """Not only those of the shell."""
        variables = {"VLLM_PLUGINS": "other", "GLASSBOX_DISABLE": "1"}
        with self.serving(tmp_path, **variables) as found:
            question = asked(servers=[found])
            named = [one.status.value for one in plugin_loading.named(question)]
            disabled = [one.status.value for one in plugin_loading.switched_off(question)]
        assert (["ok", "error"], ["ok", "warning"]) == (named, disabled)

    @pytest.mark.parametrize(
        ("words", "variables", "front_end"),
        [([], {"VLLM_USE_RUST_FRONTEND": "1"}, "Rust"), (["--grpc"], {}, "gRPC")],
    )
    def test_behind_a_front_end_that_shows_nothing(
        self, tmp_path: Path, words: Sequence[str], variables: Mapping[str, str], front_end: str
    ) -> None:
        """An error, unless a port of glassbox's own or OTLP shows it."""
        with self.serving(tmp_path, *words, **variables) as found:
            hidden = told(run_directories.servers(asked(servers=[found])))
            write_yaml(tmp_path / "glassbox.yaml", export={"otel": {"enabled": True}})
            shown = statuses(run_directories.servers(asked(servers=[found])))
        assert (Status.ERROR, True) == (hidden["run.front_end"].status, front_end in hidden["run.front_end"].seen)
        assert {"run.servers": "ok", "run.front_end": "ok"} == shown


class TestPrometheus:
    def look(self, prometheus_url: str, **changes: Any) -> dict[str, str]:
        return statuses(prometheus_targets.scraping(asked(prometheus=prometheus_url, **changes)))

    def test_a_real_one(self, tmp_path: Path) -> None:
        """It scrapes the server, has its series and alerts, one of which fires; another server is no target of it."""
        require_tool("prometheus", "prometheus")
        rules = tmp_path / "rules.yaml"
        alerts = [{"alert": "GlassboxErrors", "expr": "vector(1)"}, {"alert": "GlassboxDrift", "expr": "vector(1) > 2"}]
        rules.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": alerts}]}))
        with (
            answering(lambda *_: (200, good_page())) as url,
            PrometheusServer(tmp_path, [url.removeprefix("http://")], rule_files=[rules]) as running,
        ):
            running.wait_for("glassbox_build_info")
            running.wait_for("ALERTS")
            well = dict.fromkeys(("reachable", "targets", "series", "alerts"), "ok")
            expected = {
                **{f"prometheus.{name}": status for name, status in well.items()},
                "prometheus.firing": "warning",
            }
            assert expected == self.look(running.url, url=url)
            assert "warning" == self.look(running.url, url="http://localhost:1")["prometheus.targets"]
            assert "unknown" == self.look(running.url)["prometheus.targets"]
        assert {"prometheus.reachable": "error"} == self.look(running.url)

    def test_a_target_that_is_down(self, tmp_path: Path) -> None:
        """Without series or alerts either."""
        require_tool("prometheus", "prometheus")
        target = f"127.0.0.1:{free_port()}"
        with PrometheusServer(tmp_path, [target]) as running:
            wait_for(
                lambda: running.api("targets")["activeTargets"], lambda found: bool(found and found[0]["lastError"])
            )
            found = self.look(running.url, url=f"http://{target}")
        failed = {"prometheus.targets": "error", "prometheus.series": "error", "prometheus.alerts": "warning"}
        assert {"prometheus.reachable": "ok", **failed} == found

    @pytest.mark.parametrize("body", ["no json", "[]", '{"data": 3}', '{"data": {"activeTargets": [3]}}', "[" * 9000])
    def test_something_else(self, body: str) -> None:
        """Answers, but as no Prometheus does."""
        with answering(lambda *_: (200, body)) as url:
            assert {"prometheus.reachable": "error"} == self.look(url)

    def test_none_was_named(self) -> None:
        """Says how to."""
        assert {"prometheus.reachable": "unknown"} == statuses(prometheus_targets.scraping(asked()))
