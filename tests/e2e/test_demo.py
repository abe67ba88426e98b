"""`glassbox demo` from start to Ctrl-C, and the server under it: what it starts, it also ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from glassbox.cli.demo.vllm_server import HOST, ServerError, VllmServer
from tests.ports import free_port

pytestmark = pytest.mark.e2e

START_TO_TABLE_S = 600


def wait_for_line(process: "subprocess.Popen[str]", wanted: str, timeout_s: float) -> str:
    """Everything printed up to the line with `wanted`; fails the test if it doesn't come."""
    assert process.stdout is not None
    lines = []
    deadline = time.monotonic() + timeout_s
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
        if time.monotonic() > deadline:
            break
    pytest.fail(f"no line with {wanted!r}; printed:\n{''.join(lines)}")


class TestDemo:
    def test_shows_the_table_serves_on_and_ends_clean_at_ctrl_c(self, demo_model_path: Path, tmp_path: Path) -> None:
        """Every statistic has samples; the server answers afterwards; SIGINT ends all of it with status 0."""
        assert demo_model_path.is_dir()
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "glassbox.cli", "demo", "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        try:
            printed = wait_for_line(process, "Ctrl-C stops it.", START_TO_TABLE_S)
            family = psutil.Process(process.pid).children(recursive=True)
            metrics = httpx.get(f"http://{HOST}:{port}/metrics", follow_redirects=True, timeout=60.0).text
            page = httpx.get(f"http://{HOST}:{port}/glassbox/", timeout=60.0).text
            process.send_signal(signal.SIGINT)
            status = process.wait(180)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(180)
        assert "All 8 exported statistics had samples." in printed
        assert "glassbox_attention_rows_total" in metrics
        assert "<title>glassbox live</title>" in page
        assert 0 == status
        assert [] == [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert [] == list(tmp_path.glob("glassbox-demo-*"))


class TestServer:
    def test_a_server_that_cannot_start_is_an_error_with_its_log(self, tmp_path: Path) -> None:
        """The message has the reason out of the log; no process and no open port stay."""
        server = VllmServer(tmp_path / "no-model", log_path=tmp_path / "log.txt")
        with pytest.raises(ServerError, match=r"(?s)ended with exit status 1; its log:.*no-model"):
            server.start()
        assert not server.running
        assert [] == server.processes()
        with socket.socket() as probe:
            assert 0 != probe.connect_ex((HOST, server.port))

    def test_a_server_that_takes_too_long_is_stopped(self, demo_model_path: Path, tmp_path: Path) -> None:
        """When the time to start is over, what was started is ended."""
        before = set(psutil.Process().children(recursive=True))
        server = VllmServer(demo_model_path, log_path=tmp_path / "log.txt", start_timeout_s=3)
        with pytest.raises(ServerError, match="must be healthy within 3 s"):
            server.start()
        left = set(psutil.Process().children(recursive=True)) - before
        assert [] == [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
