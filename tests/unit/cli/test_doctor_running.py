"""`glassbox doctor` on running servers: real processes, run directories, ports and a real Prometheus."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from glassbox.cli.doctor import plugin_loading, prometheus_targets, protection, run_directories
from glassbox.cli.doctor.checks import examine
from glassbox.cli.doctor.finding import Status
from glassbox.cli.doctor.local_servers import LocalServer, listening_addresses, local_servers
from glassbox.config.load import load_config
from glassbox.processes.exporter.sinks import Sinks
from glassbox.store.api_server_note import write_note
from glassbox.store.exporter_lock import ExporterLock
from glassbox.store.exporter_status import ExporterStatus, write_status
from glassbox.store.snapshot import write_snapshot
from tests.doctor_findings import KEY, answering, asked, good_page, statuses, told, write_yaml
from tests.export_samples import make_snapshot
from tests.ports import free_port
from tests.prometheus_server import PrometheusServer
from tests.serving import require_tool, wait_for


class TestDoors:
    @pytest.fixture(params=["127.0.0.1"])
    def own_port(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
        """URL and YAML of a real port of glassbox's own; by default loopback alone reaches it."""
        run_dir = tmp_path / "run"
        write_snapshot(run_dir, make_snapshot(time_s=time.time()))
        port = free_port()
        path = write_yaml(tmp_path / "a.yaml", export={"http": {"port": port, "host": request.param}})
        config = load_config(path)
        sinks = Sinks(run_dir, lambda: config, {})
        try:
            sinks.round()
            yield f"http://127.0.0.1:{port}", path
        finally:
            sinks.close()

    def test_open_to_this_machine_alone(self, own_port: tuple[str, Path]) -> None:
        """Is no fault; glassbox's own port is known by its page, and by the YAML beside vLLM's."""
        url, path = own_port
        assert {"door.own_port": "ok"} == statuses(
            examine(asked(url=url, config=path), [protection.vllm_port, protection.own_port])
        )
        with answering(lambda *_: (404, "")) as vllm:
            question = asked(url=vllm, config=path)
            found = statuses(examine(question, [protection.vllm_port, protection.own_port]))
        assert {"door.vllm": "ok", "door.own_port": "ok"} == found

    @pytest.mark.parametrize("own_port", ["0.0.0.0"], indirect=True)
    def test_open_beyond_this_machine(self, own_port: tuple[str, Path]) -> None:
        """Whoever reaches the address sees it; with texts of requests that is an error."""
        url, path = own_port
        url = url.replace("127.0.0.1", "[::ffff:127.0.0.1]")  # an address that doctor doesn't know as this machine's
        (found,) = protection.vllm_port(asked(url=url, config=path))
        assert ("door.own_port", Status.WARNING) == (found.id, found.status)
        write_yaml(path, requests={"include_text": True})
        found_text = statuses(protection.vllm_port(asked(url=url, config=path)))
        assert {"door.text": "error", "door.own_port": "warning"} == found_text

    def test_an_own_port_that_nobody_serves(self, tmp_path: Path) -> None:
        """Though the YAML asks for it."""
        path = write_yaml(tmp_path / "a.yaml", export={"prometheus": {"port": free_port()}})
        found = statuses(protection.own_port(asked(url="http://127.0.0.1:1", config=path)))
        assert {"door.own_port": "error"} == found

    def test_routes_beside_vllms_key(self) -> None:
        """vLLM asks for a key, glassbox's routes don't."""
        with answering(lambda path, _: (401 if path == "/v1/models" else 200, "")) as url:
            (found,) = protection.vllm_port(asked(url=url))
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
            assert expected == statuses(protection.vllm_port(asked(url=url, api_key=key)))

    def test_an_own_port_with_another_token(self, tmp_path: Path) -> None:
        """It may have one; that the key isn't taken there is no fault."""
        with answering(lambda *_: (401, "")) as url:
            path = write_yaml(tmp_path / "a.yaml", export={"prometheus": {"port": int(url.rpartition(":")[2])}})
            found = statuses(protection.own_port(asked(url="http://127.0.0.1:1", config=path, api_key=KEY)))
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

    def test_two_in_one_directory(self) -> None:
        """An error, of the run directory and of prometheus_client's."""
        files = {"PROMETHEUS_MULTIPROC_DIR": "/run/files"}
        servers = [LocalServer(pid, (), environ, None, Path(run_dir)) for pid, environ, run_dir in (
            (1, files, "/run/a"), (2, {}, "/run/a"), (3, files, "/run/b"),
        )]  # fmt: skip
        found = [(one.status, one.seen.partition(":")[0]) for one in run_directories.shared(asked(servers=servers))]
        assert [
            (Status.ERROR, "the servers 1 and 2 share /run/a"),
            (Status.ERROR, "the servers 1 and 3 share /run/files"),
        ] == found
        assert [] == list(run_directories.shared(asked(servers=servers[1:])))


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
            PrometheusServer(tmp_path, [url.removeprefix("http://")], interval_s=3, rule_files=[rules]) as running,
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
