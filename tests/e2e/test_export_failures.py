"""Whatever export meets, serving goes on: it is counted, logged once, and over when the cause is."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from glassbox.cli.doctor import served_metrics
from tests.doctor_findings import asked
from tests.e2e.samples import counts_against_rows, glassbox_samples
from tests.otlp_receiver import OtlpReceiver
from tests.ports import free_port
from tests.serving import GlassboxServer, own_cache, require_tool, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROWS = "glassbox_attention_rows_total"
ERRORS = "glassbox_errors_total"


@pytest.fixture(scope="module")
def _failing_server(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlassboxServer]:
    folder = tmp_path_factory.mktemp("failing")
    env = own_cache(folder, "echo 'error: out of order' >&2; exit 1")
    with GlassboxServer(demo_model_path, folder, env=env) as server:
        server.complete("Warm")
        yield server


@pytest.fixture
def failing_server(_failing_server: GlassboxServer) -> Iterator[GlassboxServer]:
    """A server of this module's own, whose export is disturbed and which has no compiler; its YAML is put back after
    each test."""
    yield _failing_server
    _failing_server.restore_config()


def export(**changes: Any) -> dict[str, Any]:
    """The section `export` of a configuration."""
    return {"interval_s": 1, **changes}


def errors(server: GlassboxServer, stage: str) -> float:
    return server.metric(ERRORS, stage=stage) or 0.0


def logged(server: GlassboxServer, text: str) -> int:
    """Lines of the server's log that hold `text`."""
    return sum(text in line for line in server.log_path.read_text(errors="replace").splitlines())


def assert_serves(server: GlassboxServer) -> None:
    """A completion of the right length comes back."""
    answer = server.post("/v1/completions", prompt="The wind", max_tokens=6, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 6


def assert_counts_rows(server: GlassboxServer) -> None:
    """Rows served now arrive at /metrics, whole: 6 tokens are 5 decode rows in each of 30 x 9 heads."""
    before = server.settled_rows()
    decode = server.metric(ROWS, phase="decode") or 0.0
    assert_serves(server)
    server.wait_metric(ROWS, lambda rows: rows == decode + 5 * 30 * 9, timeout_s=60.0, phase="decode")
    assert server.settled_rows() > before
    assert counts_against_rows(glassbox_samples(server.metrics())) == {}


def exporters(server: GlassboxServer) -> list[psutil.Process]:
    return [process for process in server.processes() if "glassbox.processes.exporter" in process.cmdline()]


class TestKernel:
    def test_a_kernel_that_cannot_be_compiled(self, failing_server: GlassboxServer) -> None:
        """torch measures every row; it is counted, logged once with the reason, and doctor says what helps."""
        server = failing_server
        server.wait_metric(ERRORS, lambda count: count == 1, stage="kernel")
        assert logged(server, "kernel failed: rows are measured by torch") == 1
        assert logged(server, "can't compile row_stats.cpp: error: out of order") == 1
        assert_counts_rows(server)
        found = {finding.seen: finding.remedy or "" for finding in served_metrics.errors(asked(url=server.url))}
        assert "install g++" in found["1 errors in stage kernel since the start"]


class TestMissingCollector:
    def test_a_missing_collector_is_counted_and_logged_once_until_it_comes(
        self, failing_server: GlassboxServer
    ) -> None:
        """Each failed export raises errors_total{stage="otel"}; one line says so, another that it works again."""
        server = failing_server
        with OtlpReceiver() as receiver:
            away = f"http://127.0.0.1:{free_port()}"
            begin, lines = errors(server, "otel"), logged(server, "export to otel failed")
            server.edit_config(export=export(otel={"enabled": True, "protocol": "http", "endpoint": away}))
            server.wait_metric(ERRORS, lambda count: (count or 0) >= begin + 2, timeout_s=90.0, stage="otel")
            assert_serves(server)
            assert logged(server, "export to otel failed") == lines + 1
            here = receiver.http_endpoint
            server.edit_config(export=export(otel={"enabled": True, "protocol": "http", "endpoint": here}))
            receiver.wait_for_metrics(timeout_s=90.0)
            wait_for(lambda: logged(server, "export to otel works again"), lambda count: count == 1, what="a log line")
            assert_counts_rows(server)


class TestRunDirectory:
    def test_a_deleted_run_directory_comes_back_with_all_numbers(self, failing_server: GlassboxServer) -> None:
        """It is made anew by the worker, and because snapshots are cumulative nothing is lost."""
        server = failing_server
        before = server.settled_rows()
        shutil.rmtree(server.run_dir)
        assert_serves(server)
        server.wait_metric(ROWS, lambda rows: rows is not None and rows > before, timeout_s=90.0)
        assert_counts_rows(server)

    def test_a_full_disk_stops_export_but_not_serving(self, failing_server: GlassboxServer) -> None:
        """The last good numbers stay at /metrics; with room again, the rows of the meantime are in them."""
        server = failing_server
        before = server.settled_rows()
        decode = server.metric(ROWS, phase="decode") or 0.0
        lines = logged(server, "snapshot failed")
        with full_disk(server.run_dir):
            assert_serves(server)
            wait_for(lambda: logged(server, "snapshot failed"), lambda n: n == lines + 1, 90.0, "the error in the log")
            assert_serves(server)
            assert (server.metric(ROWS) or 0.0) in {0.0, before}
        server.wait_metric(ERRORS, bool, timeout_s=90.0, stage="snapshot")
        server.wait_metric(ROWS, lambda rows: rows == decode + 2 * 5 * 30 * 9, timeout_s=60.0, phase="decode")
        assert logged(server, "snapshot failed") == lines + 1
        assert_counts_rows(server)


@contextlib.contextmanager
def full_disk(run_dir: Path) -> Iterator[None]:
    """A small, full file system in the place of the run directory, as long as the block lasts."""
    mount, umount = require_tool("mount", "mount"), require_tool("umount", "mount")
    command = [mount, "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(run_dir)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        with contextlib.suppress(OSError):
            (run_dir / "filler").write_bytes(b"\0" * 65536)
        yield
    finally:
        # Lazy: the server may have a file of it open.
        subprocess.run([umount, "-l", str(run_dir)], check=True)


class TestExporterProcess:
    def test_a_killed_exporter_is_started_again(self, failing_server: GlassboxServer, tmp_path: Path) -> None:
        """Its death is counted and logged once, another one takes over, and JSONL goes on."""
        server = failing_server
        path = tmp_path / "windows.jsonl"
        server.edit_config(export=export(jsonl={"path": str(path)}))
        (exporter,) = wait_for(lambda: exporters(server), bool, what="an exporter")

        def windows() -> int:
            # An exporter that takes over begins with what comes after its first look: so there is always more to come.
            assert_serves(server)
            return len(path.read_text().splitlines()) if path.exists() else 0

        wait_for(windows, bool, 90.0, "a window in the file")
        begin = errors(server, "exporter")
        exporter.send_signal(signal.SIGKILL)
        (successor,) = wait_for(
            lambda: exporters(server),
            lambda found: bool(found) and found[0].pid != exporter.pid,
            timeout_s=90.0,
            what="another exporter",
        )
        assert successor.is_running()
        server.wait_metric(ERRORS, lambda count: count == begin + 1, timeout_s=60.0, stage="exporter")
        assert logged(server, "exporter failed") == 1
        before = len(path.read_text().splitlines())
        server.settled_rows()
        wait_for(windows, lambda n: n > before, 90.0, "another window")
        assert_counts_rows(server)


class TestOwnPort:
    def test_a_taken_port_is_tried_until_it_is_free(self, failing_server: GlassboxServer) -> None:
        """Taken: counted, logged once. Free again: glassbox's own /metrics is there."""
        server = failing_server
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
            begin = errors(server, "http")
            server.edit_config(export=export(http={"port": port}))
            server.wait_metric(ERRORS, lambda count: (count or 0) >= begin + 2, timeout_s=90.0, stage="http")
            assert_serves(server)
            assert logged(server, "export to http failed") == 1

        def shown() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return ROWS in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60.0).text
            return False

        wait_for(shown, bool, timeout_s=60.0, what="glassbox's own port")


class TestJsonl:
    def test_a_full_disk_under_the_jsonl_file_is_counted(self, failing_server: GlassboxServer, tmp_path: Path) -> None:
        """/dev/full is what it is called; with another path it works again, with the windows since then."""
        server = failing_server
        begin = errors(server, "jsonl")
        server.edit_config(export=export(jsonl={"path": "/dev/full"}))
        wait_for(lambda: exporters(server), bool, what="an exporter")

        def fail_once_more() -> float:
            assert_serves(server)
            return errors(server, "jsonl")

        wait_for(fail_once_more, lambda count: count >= begin + 2, timeout_s=90.0, what="two failed windows")
        assert logged(server, "export to jsonl failed") == 1
        path = tmp_path / "windows.jsonl"
        server.edit_config(export=export(jsonl={"path": str(path)}))

        def serve_until_written() -> bool:
            assert_serves(server)
            return path.exists() and "\n" in path.read_text()

        wait_for(serve_until_written, bool, timeout_s=90.0, what="the other file")
        assert json.loads(path.read_text().splitlines()[0])["places"]

    def test_the_file_rotates_at_its_size(self, failing_server: GlassboxServer, tmp_path: Path) -> None:
        """No file is larger than max_mb, older ones are numbered, and every line of all of them is whole."""
        server = failing_server
        path = tmp_path / "windows.jsonl"
        # At detail head a window takes some 300 kB, so that 1 MB is reached soon.
        changes = export(jsonl={"path": str(path), "max_mb": 1}, prometheus={"detail": "head", "max_series": 200_000})
        server.edit_config(export=changes)

        def serve_until_rotated() -> bool:
            assert_serves(server)
            return path.with_name("windows.jsonl.1").exists()

        wait_for(serve_until_rotated, bool, timeout_s=60.0, what="the file to rotate")
        files = sorted(tmp_path.glob("windows.jsonl*"))
        for file in files:
            assert 0 < file.stat().st_size <= 1_000_000
        windows = [json.loads(line) for file in files for line in file.read_text().splitlines() if line]
        assert {len(window["places"]) <= 2 * 30 * 9 for window in windows} == {True}
