"""The exporter process: alone, only where needed, live to edits, gone with its parent, unimpressed by failing sinks."""

import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from glassbox.config.load import GlassboxConfig, load_config
from glassbox.core.logs import get_logger
from glassbox.export.liveness import Liveness
from glassbox.processes.exporter import launch, loop
from glassbox.processes.exporter.launch import ExporterProcess, is_needed
from glassbox.processes.exporter.log_relay import _Sender, open_relay
from glassbox.processes.exporter.loop import main
from glassbox.processes.exporter.sinks import Sinks
from glassbox.store.exporter_lock import ExporterLock
from glassbox.store.exporter_status import read_status
from glassbox.store.metrics_page import FRONT_S, NAME, note_front, open_page
from glassbox.store.score_files import AWAITED_S, note_awaited
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import limited_file_size, make_snapshot, write_config
from tests.otlp_receiver import OtlpReceiver
from tests.ports import free_port
from tests.waiting import ATTEMPTS, crowding, require_within, seconds_of, wait_for

ROOT = Path(__file__).resolve().parents[3]


def scrape(port: int) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError):
        return None


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OTEL_", "PROMETHEUS_", "GLASSBOX_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GLASSBOX_HTTP_ADDR", "127.0.0.1")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    write_snapshot(directory, make_snapshot())
    return directory


@pytest.fixture
def start(run_dir: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts `python -m glassbox.processes.exporter`, by default as a child of this test; ends what is left."""
    started: list[subprocess.Popen[bytes]] = []

    def start(directory: Path = run_dir, parent_pid: int | None = None, **export: Any) -> subprocess.Popen[bytes]:
        if export:
            write_config(tmp_path / "glassbox.yaml", **export)
        command = [sys.executable, "-P", "-m", "glassbox.processes.exporter", "--run-dir", str(directory)]
        command += ["--config", str(tmp_path / "glassbox.yaml"), "--parent-pid", str(parent_pid or os.getpid())]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def config(**export: Any) -> GlassboxConfig:
    return GlassboxConfig.model_validate({"export": export})


class TestIsNeeded:
    @pytest.mark.parametrize(
        ("export", "environ", "expected"),
        [
            ({}, {}, False),
            ({"http": {"port": 9464}}, {}, True),
            ({"http": {"port": 9464}, "prometheus": {"enabled": False}}, {}, True),
            ({"prometheus": {"port": 9464}}, {}, True),
            ({"prometheus": {"port": 9464, "enabled": False}}, {}, False),
            ({}, {"PROMETHEUS_MULTIPROC_DIR": "/x"}, True),
            ({"prometheus": {"enabled": False}}, {"PROMETHEUS_MULTIPROC_DIR": "/x"}, False),
            ({"otel": {"enabled": True}}, {}, True),
            ({"otel": {"enabled": True, "metrics": False, "traces": False}}, {}, False),
            ({"otel": {"enabled": True, "metrics": False}}, {}, True),
            ({"jsonl": {"path": "/x"}}, {}, True),
        ],
    )
    def test_only_if_something_asks_for_it(
        self, export: dict[str, Any], environ: dict[str, str], expected: bool
    ) -> None:
        """With one API server and no push, vLLM's own /metrics is enough."""
        assert is_needed(config(**export), environ) is expected

    def test_multiprocess_files_are_of_the_first_process_machine(self) -> None:
        """Ray takes both variables to other nodes, where nobody reads such files."""
        elsewhere = "/run/glassbox-0-42-4711-4026531836-00000000-0123456789abcdef"
        environ = {"PROMETHEUS_MULTIPROC_DIR": "/x", "GLASSBOX_RUN_DIR": elsewhere}
        assert is_needed(config(), environ) is False
        assert is_needed(config(prometheus={"port": 9464}), environ) is True

    def test_the_page_of_vllms_port(self, tmp_path: Path) -> None:
        """Once an API server of this node hands it out, and unless it is not wanted there."""
        assert is_needed(config(), {}, tmp_path) is False
        note_front(tmp_path)
        assert is_needed(config(), {}, tmp_path) is True
        assert is_needed(config(prometheus={"on_vllm_port": False}), {}, tmp_path) is False
        (note,) = tmp_path.iterdir()
        os.utime(note, (time.time() - FRONT_S - 1,) * 2)  # nobody has scraped since
        assert is_needed(config(), {}, tmp_path) is False

    def test_signals_that_somebody_awaits(self, tmp_path: Path) -> None:
        """A server that nobody scrapes makes those on demand, too, once a client has looked for them."""
        assert is_needed(config(), {}, tmp_path) is False
        note_awaited(tmp_path)
        assert is_needed(config(), {}, tmp_path) is True
        (note,) = tmp_path.iterdir()
        os.utime(note, (time.time() - AWAITED_S - 1,) * 2)
        assert is_needed(config(), {}, tmp_path) is False

    def test_own_port_only(self) -> None:
        """Without vLLM's port multiprocess files are wanted by nobody."""
        environ = {"PROMETHEUS_MULTIPROC_DIR": "/x"}
        assert is_needed(config(prometheus={"on_vllm_port": False}), environ) is False
        assert is_needed(config(prometheus={"on_vllm_port": False, "port": 9464}), environ) is True

    def test_never_if_switched_off(self) -> None:
        """`enabled: false` means nothing runs."""
        off = GlassboxConfig.model_validate({"enabled": False, "export": {"jsonl": {"path": "/x"}}})
        assert is_needed(off, {}) is False


class TestLock:
    def test_one_holder(self, tmp_path: Path) -> None:
        """Who holds it is the only one, until it gives it back."""
        assert not ExporterLock.is_held(tmp_path)
        lock = ExporterLock.acquire(tmp_path)
        assert lock is not None
        assert ExporterLock.is_held(tmp_path)
        assert ExporterLock.acquire(tmp_path) is None
        lock.release()
        assert not ExporterLock.is_held(tmp_path)

    def test_a_removed_file_is_made_again(self, tmp_path: Path) -> None:
        """A cleaner of /tmp does not make room for a second exporter."""
        lock = ExporterLock.acquire(tmp_path)
        assert lock is not None
        (tmp_path / "exporter.lock").unlink()
        assert lock.renew()
        assert ExporterLock.is_held(tmp_path)
        (tmp_path / "exporter.lock").unlink()
        other = ExporterLock.acquire(tmp_path)
        assert other is not None
        assert not lock.renew()
        other.release()
        lock.release()


class TestSinks:
    """In this process, round by round."""

    @pytest.fixture
    def current(self) -> dict[str, GlassboxConfig]:
        return {"config": config()}

    @pytest.fixture
    def clock(self) -> list[float]:
        """Seconds, of which the time between attempts is taken."""
        return [0.0]

    @pytest.fixture
    def sinks(self, run_dir: Path, current: dict[str, GlassboxConfig], clock: list[float]) -> Iterator[Sinks]:
        environ = {"GLASSBOX_HTTP_ADDR": "127.0.0.1"}
        sinks = Sinks(run_dir, lambda: current["config"], environ, monotonic=lambda: clock[0])
        yield sinks
        sinks.close()

    def test_nothing_asked_nothing_done(self, sinks: Sinks, run_dir: Path) -> None:
        """Only the status file is written."""
        sinks.round()
        assert sorted(path.name for path in run_dir.iterdir()) == ["exporter.json", "worker-0-0-i0.npz"]
        assert sinks.errors.counts() == {}

    def test_a_taken_port_is_counted_and_tried_again(
        self, sinks: Sinks, current: dict[str, GlassboxConfig], clock: list[float], tmp_path: Path
    ) -> None:
        """As soon as the port is free it is opened; the other sinks work meanwhile."""
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
            current["config"] = config(http={"port": port}, jsonl={"path": str(tmp_path / "a.jsonl")})
            for clock[0] in (0.0, 0.9, 1.0, 2.9):  # after 1 s, then after 2 s more
                sinks.round()
            assert sinks.errors.counts() == {"http": 2}
            assert sinks.http_port is None
            assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1
        clock[0] = 3.0
        sinks.round()
        assert "glassbox_steps_total" in (scrape(port) or "")
        text = scrape(port) or ""
        assert 'glassbox_errors_total{engine="0",model_name="tiny/model",stage="http"} 2.0' in text

    def test_the_own_port_has_page_and_snapshot(self, sinks: Sinks, current: dict[str, GlassboxConfig]) -> None:
        """Besides /metrics; they go with it when the port is taken out of the configuration."""
        port = free_port()
        current["config"] = config(http={"port": port})
        sinks.round()
        for path, expected in (("", b"<!doctype html>"), ("v1/snapshot?phase=decode", b'"model":"tiny/model"')):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/glassbox/{path}", timeout=60) as answer:
                assert expected in answer.read()
        current["config"] = config()
        sinks.round()
        assert scrape(port) is None

    def test_a_full_disk_is_counted(self, sinks: Sinks, current: dict[str, GlassboxConfig], run_dir: Path) -> None:
        """Neither JSONL nor the status file stops the round."""
        current["config"] = config(jsonl={"path": "/dev/full"})
        with limited_file_size(1):
            sinks.round()
        assert sinks.errors.counts() == {"jsonl": 1, "status": 1}
        assert not [path.name for path in run_dir.iterdir() if path.name.endswith(".tmp")]

    def test_a_vanished_directory_is_not_made_again(self, sinks: Sinks, run_dir: Path) -> None:
        """It is the server's to make and remove; an exporter that outlives it must not leave one behind."""
        sinks.round()
        shutil.rmtree(run_dir)
        sinks.round()
        assert not run_dir.exists()
        assert sinks.errors.counts() == {"status": 1}

    def test_a_missing_collector_does_not_delay_a_round(self, sinks: Sinks, current: dict[str, GlassboxConfig]) -> None:
        """Sending is a thread's business."""
        current["config"] = config(otel={"enabled": True, "endpoint": f"http://127.0.0.1:{free_port()}"})
        sinks.round()
        require_within(0.2, lambda: seconds_of(sinks.round), attempts=20)

    def test_counters_of_a_dead_exporter_go_on(self, run_dir: Path, tmp_path: Path) -> None:
        """A new exporter begins with the errors in the status file, and does not tell old rows again."""
        settings = config(jsonl={"path": str(tmp_path / "a.jsonl")})
        first = Sinks(run_dir, lambda: settings, {})
        first.errors.count("otel", "x")
        first.round()
        second = Sinks(run_dir, lambda: settings, {})
        second.errors.count("otel", "x")
        second.round()
        status = read_status(run_dir)
        assert status is not None
        assert status.errors == {"otel": 2}
        assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1

    def test_switched_off_multiprocess_files_are_empty(self, run_dir: Path, tmp_path: Path) -> None:
        """`prometheus.enabled: false` takes the series out of vLLM's /metrics."""
        directory = tmp_path / "multiproc"
        directory.mkdir()
        current = [config()]
        sinks = Sinks(run_dir, lambda: current[0], {"PROMETHEUS_MULTIPROC_DIR": str(directory)})
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(directory))
        sinks.round()
        assert b"glassbox_steps_total" in generate_latest(registry)
        current[0] = config(prometheus={"enabled": False})
        sinks.round()
        assert generate_latest(registry) == b""
        sinks.close()

    def test_the_page_of_vllms_port(self, sinks: Sinks, current: dict[str, GlassboxConfig], run_dir: Path) -> None:
        """Written while an API server hands it out and the configuration wants it there; its time is the last look."""
        sinks.round()
        with pytest.raises(FileNotFoundError):
            open_page(run_dir)
        note_front(run_dir)
        before = time.time()
        sinks.round()
        page = open_page(run_dir)
        assert before - 1 <= page.time_s <= time.time() + 1
        text = b"".join(page.read(at, length) for at, length in page.ranges("text")).decode()
        page.close()
        assert "glassbox_steps_total{" in text
        os.utime(run_dir / NAME, (1.0, 1.0))
        sinks.round()
        page = open_page(run_dir)
        page.close()
        assert page.time_s >= before - 1
        current["config"] = config(prometheus={"on_vllm_port": False})
        sinks.round()
        with pytest.raises(FileNotFoundError):
            open_page(run_dir)
        assert "page" not in sinks.errors.counts()

    def test_multiprocess_files_are_empty_where_a_page_is_handed_out(self, run_dir: Path, tmp_path: Path) -> None:
        """vLLM would merge them in its own process, to show the same twice."""
        directory = tmp_path / "multiprocess"
        directory.mkdir()
        sinks = Sinks(run_dir, config, {"PROMETHEUS_MULTIPROC_DIR": str(directory)})

        def shown() -> bytes:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(directory))
            return generate_latest(registry)

        sinks.round()
        assert b"glassbox_steps_total" in shown()
        note_front(run_dir)
        sinks.round()
        assert shown() == b""
        sinks.close()


class TestProcess:
    """As a process of its own."""

    def test_it_gives_signs_of_life_between_its_rounds(
        self, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However long the interval is."""
        monkeypatch.setattr(loop, "_BEAT_S", 0.05)
        path = write_config(tmp_path / "glassbox.yaml", interval_s=3600, jsonl={"path": str(tmp_path / "a")})
        parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        beats = set()

        def watch() -> None:
            wait_for(lambda: beats.add(ExporterLock.last_beat_s(run_dir)) or len(beats) > 4)
            parent.kill()

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            lock = ExporterLock.acquire(run_dir)
            assert lock is not None
            loop._run(run_dir, path, load_config(path), parent.pid, lock)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            lock.release()
            watcher.join()
            parent.wait()
        assert len(beats) > 4

    def test_all_sinks_at_once(
        self, start: Any, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Own port, multiprocess files, OTLP and JSONL show the same number; SIGTERM ends it with 0."""
        directory = tmp_path / "multiproc"
        directory.mkdir()
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
        port = free_port()
        with OtlpReceiver() as receiver:
            process = start(
                http={"port": port},
                otel={"enabled": True, "endpoint": receiver.grpc_endpoint},
                jsonl={"path": str(tmp_path / "out.jsonl")},
            )
            received = receiver.wait_for_metrics()
            assert received["glassbox.steps"].sum.data_points[0].as_int == 1000
            line = 'glassbox_steps_total{engine="0",model_name="tiny/model"} 1000.0'
            wait_for(lambda: line in (scrape(port) or ""), what="the own port")
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(directory))
            wait_for(lambda: line in generate_latest(registry).decode(), what="the multiprocess files")
            lines = tmp_path / "out.jsonl"
            wait_for(lambda: lines.exists() and lines.read_text().endswith("\n"), what="the JSONL file")
            assert json.loads(lines.read_text())["steps"] == 1000

            def sent() -> int:
                return int(receiver.metrics()["glassbox.steps"].sum.data_points[0].as_int)

            for steps in range(1001, 1001 + ATTEMPTS):
                write_snapshot(run_dir, make_snapshot(steps=steps))
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                if sent() == steps:
                    break
                # Sending has a second in the end, which a busy machine may need for itself.
                process = start()
                wait_for(lambda: sent() == steps)  # noqa: B023
            else:
                pytest.fail("the last export never holds the last snapshot")
        assert scrape(port) is None
        assert process.stderr.read() == b""

    def test_the_second_one_ends_at_once(self, start: Any, run_dir: Path, tmp_path: Path) -> None:
        """A server has one exporter; another one leaves with 0 and without a word."""
        first = start(jsonl={"path": str(tmp_path / "a")})
        wait_for(lambda: read_status(run_dir))
        second = start()
        assert second.wait(30) == 0
        assert second.stderr.read() == b""
        assert first.poll() is None

    def test_connections_that_say_nothing_stop_no_export(self, start: Any, run_dir: Path) -> None:
        """More of them than the process may have files: rounds go on, and a scrape is answered."""
        port = free_port()
        process = start(http={"port": port})
        wait_for(lambda: scrape(port))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (192, 192))
        held = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(400)]
        try:
            write_snapshot(run_dir, make_snapshot(steps=1001))
            began = time.time()
            wait_for(lambda: (status := read_status(run_dir)) is not None and status.time_s > began)
            wait_for(lambda: "glassbox_steps_total{" in (text := scrape(port) or "") and "1001.0" in text)
        finally:
            for client in held:
                client.close()
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 128

    def test_it_ends_with_its_parent(self, start: Any, tmp_path: Path) -> None:
        """Within two seconds of the parent's end, after one last export."""
        numbers = itertools.count()

        def end() -> float:
            directory, path = tmp_path / f"run-{next(numbers)}", tmp_path / "a.jsonl"
            path.unlink(missing_ok=True)
            write_snapshot(directory, make_snapshot())
            parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            process = start(directory, parent_pid=parent.pid, interval_s=600, jsonl={"path": str(path)})
            wait_for(path.exists)
            write_snapshot(directory, make_snapshot(seed=9, instance="late"))
            parent.kill()
            took_s = seconds_of(lambda: process.wait(60))
            parent.wait()
            assert process.returncode == 0
            assert len(path.read_text().splitlines()) == 2
            # It gives way to all others, and their number is none of its own.
            return took_s / crowding(loop._NICENESS)

        require_within(2.0, end)

    def test_edits_take_effect_within_two_seconds(self, start: Any, tmp_path: Path) -> None:
        """The port opens, moves and closes, the detail changes, OTLP is switched to another collector: no restart."""
        path, first = tmp_path / "glassbox.yaml", free_port()
        start(interval_s=600, http={"port": first}, prometheus={"detail": "model"})
        rows_of_layer = 'glassbox_attention_rows_total{engine="0",layer="1"'

        def edits() -> float:
            write_config(path, interval_s=600, http={"port": first}, prometheus={"detail": "model"})
            wait_for(lambda: rows_of_layer not in (scrape(first) or rows_of_layer), what="the first port")
            second = free_port()
            with OtlpReceiver() as receiver:
                otel = {"enabled": True, "endpoint": receiver.http_endpoint, "protocol": "http"}
                began_s = time.monotonic()
                write_config(path, interval_s=600, http={"port": second}, otel=otel)
                assert rows_of_layer in wait_for(lambda: scrape(second) or "", pause_s=0.02)
                receiver.wait_for_metrics()
                moved_s = time.monotonic() - began_s
            assert scrape(first) is None
            write_config(path, interval_s=600, http={"port": None})
            closed_s = seconds_of(lambda: wait_for(lambda: scrape(second) is None, pause_s=0.02))
            return max(moved_s, closed_s)

        require_within(2.5, edits)

    @pytest.mark.parametrize("edit", ["sample_rate: 0.5\nexport: {interval_s: 600}\n", "sample_rate: 7\n"])
    def test_vllms_page_follows_an_edit(self, start: Any, tmp_path: Path, run_dir: Path, edit: str) -> None:
        """Workers write what follows of it, good or bad; the page has that long before the next interval."""
        note_front(run_dir)
        start(interval_s=600)

        def steps(number: int) -> bool:
            try:
                page = open_page(run_dir)
            except FileNotFoundError:
                return False
            text = b"".join(page.read(at, length) for at, length in page.ranges("text")).decode()
            page.close()
            return f'glassbox_steps_total{{engine="0",model_name="tiny/model"}} {number}.0' in text

        wait_for(lambda: steps(1000))
        (tmp_path / "glassbox.new").write_text(edit)
        (tmp_path / "glassbox.new").replace(tmp_path / "glassbox.yaml")
        time.sleep(0.5)
        write_snapshot(run_dir, make_snapshot(steps=1234))
        wait_for(lambda: steps(1234))

    def test_a_bad_configuration_is_one_line(self, start: Any, tmp_path: Path) -> None:
        """Exit status 2 and the message, no traceback."""
        (tmp_path / "glassbox.yaml").write_text("export: {interval_s: soon}")
        process = start()
        assert process.wait(60) == 2
        error = process.stderr.read().decode()
        assert "interval_s" in error
        assert "Traceback" not in error
        assert len(error.splitlines()) == 1

    def test_a_bad_edit_keeps_it_going(self, start: Any, tmp_path: Path) -> None:
        """The last good configuration stays in use."""
        port = free_port()
        process = start(http={"port": port})
        wait_for(lambda: scrape(port))
        (tmp_path / "glassbox.yaml").write_text("export: {interval_s: soon}")
        time.sleep(1.0)
        assert scrape(port)
        assert process.poll() is None

    def test_garbage_and_a_missing_collector_do_not_end_it(self, start: Any, run_dir: Path) -> None:
        """They are counted where everybody sees them."""
        (run_dir / "worker-0-9-bad.npz").write_bytes(b"garbage")
        port = free_port()
        endpoint = f"http://127.0.0.1:{free_port()}"
        process = start(http={"port": port}, otel={"enabled": True, "endpoint": endpoint, "protocol": "http"})
        wait_for(lambda: 'stage="otel"' in (scrape(port) or ""))
        assert 'stage="snapshot"} 1.0' in (scrape(port) or "")
        assert process.poll() is None

    def test_it_imports_neither_torch_nor_vllm(self) -> None:
        """Nor OpenTelemetry before it is needed."""
        code = (
            "import sys, glassbox.processes.exporter.loop;"
            "print([name for name in ('torch', 'vllm', 'opentelemetry', 'grpc') if name in sys.modules])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
        )
        assert result.stdout == b"[]\n"

    def test_it_is_small(self, start: Any, run_dir: Path, tmp_path: Path) -> None:
        """Without OTLP it needs less than 100 MB."""
        process = start(jsonl={"path": str(tmp_path / "a")})
        wait_for(lambda: read_status(run_dir))
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident_kib = int(status.split("VmRSS:")[1].split()[0])
        assert resident_kib < 100_000


class TestWorkerSide:
    @pytest.fixture
    def clock(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def exporter(self, run_dir: Path, tmp_path: Path, clock: list[float]) -> Iterator[ExporterProcess]:
        path = write_config(tmp_path / "glassbox.yaml", jsonl={"path": str(tmp_path / "a.jsonl")})
        exporter = ExporterProcess(path, run_dir, clock=lambda: clock[0])
        yield exporter
        exporter.stop()

    def test_it_is_started_once(self, exporter: ExporterProcess, run_dir: Path, tmp_path: Path) -> None:
        """Asking again changes nothing; another worker does not start a second one; starting does not wait."""
        settings = load_config(tmp_path / "glassbox.yaml")
        directories = (tmp_path / f"run-{number}" for number in itertools.count())

        def begin() -> float:
            one = ExporterProcess(tmp_path / "glassbox.yaml", next(directories))
            took_s = seconds_of(lambda: one.ensure(settings))
            one.stop()
            return took_s

        require_within(0.5, begin)
        exporter.ensure(settings)
        pid = exporter.pid
        wait_for(lambda: read_status(run_dir))
        exporter.ensure(settings)
        assert exporter.pid == pid is not None
        other = ExporterProcess(tmp_path / "glassbox.yaml", run_dir)
        other.ensure(settings)
        assert other.pid is None

    def test_it_is_not_started_if_not_needed(self, exporter: ExporterProcess) -> None:
        """The default configuration needs none."""
        exporter.ensure(config())
        assert exporter.pid is None

    def test_it_ends_when_it_is_not_needed_any_more(
        self, exporter: ExporterProcess, tmp_path: Path, run_dir: Path
    ) -> None:
        """An edit that switches all sinks off ends it, without an error."""
        exporter.ensure(load_config(tmp_path / "glassbox.yaml"))
        wait_for(lambda: read_status(run_dir))
        exporter.ensure(config())
        wait_for(lambda: exporter.pid is None)
        exporter.ensure(config())
        assert exporter.deaths == 0

    def test_a_dead_one_is_started_again_later_and_later(
        self, exporter: ExporterProcess, tmp_path: Path, run_dir: Path, clock: list[float]
    ) -> None:
        """Each death is an error for the worker to count; the pause doubles, so that a crash is no storm."""
        settings = load_config(tmp_path / "glassbox.yaml")
        for backoff in (1, 2, 4):
            exporter.ensure(settings)
            pid = exporter.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: exporter.pid is None)
            with pytest.raises(RuntimeError, match=f"exit status -9; it is started again in {backoff} s"):
                exporter.ensure(settings)
            clock[0] += backoff - 0.1
            exporter.ensure(settings)
            assert exporter.pid is None
            clock[0] += 0.2
        assert exporter.deaths == 3

    @pytest.mark.parametrize("bad", ["sample_rate: !!bool maybe", "export: {jsonl: {path: ~run.jsonl}}"])
    def test_one_that_starts_while_the_file_is_bad_goes_on_as_the_last(
        self, exporter: ExporterProcess, tmp_path: Path, run_dir: Path, clock: list[float], bad: str
    ) -> None:
        """The settings in force are those of the last good file; a good edit after that takes effect."""
        path, lines = tmp_path / "glassbox.yaml", tmp_path / "a.jsonl"
        settings = load_config(path)
        path.write_text(bad)
        exporter.ensure(settings)
        wait_for(lines.exists)
        pid = exporter.pid
        write_config(path, jsonl={"path": str(tmp_path / "b.jsonl")})
        rounds = itertools.count()

        def exported_there() -> bool:
            # A sink that an edit opens tells what is new from then on.
            write_snapshot(run_dir, make_snapshot(seed=9, instance=f"late-{next(rounds)}"))
            time.sleep(0.2)
            return (tmp_path / "b.jsonl").exists()

        wait_for(exported_there)
        assert pid == exporter.pid is not None

    def test_one_that_was_stopped_is_seen_told_and_replaced(
        self,
        exporter: ExporterProcess,
        tmp_path: Path,
        run_dir: Path,
        clock: list[float],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """SIGSTOP: it has its process and its lock, but gives no sign of life; what shows it says so meanwhile."""
        settings = load_config(tmp_path / "glassbox.yaml")
        exporter.ensure(settings)
        pid = exporter.pid
        assert pid is not None
        wait_for(lambda: read_status(run_dir))
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
        later = Liveness(run_dir, lambda: settings, tuple, clock=lambda: time.time() + 100)
        told = {family.name: family.series for family in later.families()}
        assert told["glassbox_exporter_up"][0].value == 0
        assert told["glassbox_exporter_silence_seconds"][0].value >= 100
        for clock[0] in (0.0, 60.0, 119.0):
            exporter.ensure(settings)
        assert exporter.pid == pid
        clock[0] = 121.0
        with pytest.raises(RuntimeError, match=rf"no sign of life for 121 s.*process {pid} is killed"):
            exporter.ensure(settings)
        assert "it was stopped, or hangs" in caplog.text
        wait_for(lambda: exporter.pid is None)
        wait_for(lambda: exporter.ensure(settings) or exporter.pid)
        assert exporter.deaths == 1
        wait_for(lambda: (status := read_status(run_dir)) and status.pid == exporter.pid)
        status = read_status(run_dir)
        assert status is not None
        assert status.restarts == 1

    def test_one_that_lives_is_left_alone_after_a_pause_of_everything(
        self, exporter: ExporterProcess, tmp_path: Path, run_dir: Path, clock: list[float]
    ) -> None:
        """A frozen container: the worker may run first, and finds an old sign of life."""
        settings = load_config(tmp_path / "glassbox.yaml")
        for clock[0] in (0.0, 5.0, 3600.0):
            exporter.ensure(settings)
        pid = exporter.pid
        wait_for(lambda: read_status(run_dir))
        exporter.ensure(settings)
        clock[0] += 5
        exporter.ensure(settings)
        assert exporter.pid == pid is not None

    def test_one_whose_worker_is_gone_is_replaced_by_another_worker(
        self, exporter: ExporterProcess, tmp_path: Path, run_dir: Path, start: Any, clock: list[float]
    ) -> None:
        """Later than its own worker would; nothing but an exporter is killed for a lock."""
        settings = load_config(tmp_path / "glassbox.yaml")
        orphan = start()
        wait_for(lambda: read_status(run_dir))
        orphan.send_signal(signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{orphan.pid}/stat").read_text().split()[2] == "T")
        for clock[0] in (0.0, 100.0, 200.0, 239.0):
            exporter.ensure(settings)
        assert orphan.poll() is None
        clock[0] = 241.0
        with pytest.raises(RuntimeError, match=f"process {orphan.pid} is killed and replaced"):
            exporter.ensure(settings)
        assert orphan.wait(60) == -signal.SIGKILL
        exporter.ensure(settings)
        assert exporter.pid is not None

    def test_a_lock_that_is_no_exporters_is_left_to_people(
        self, exporter: ExporterProcess, tmp_path: Path, run_dir: Path, clock: list[float]
    ) -> None:
        """This very process holds it: it is told, not killed."""
        settings = load_config(tmp_path / "glassbox.yaml")
        lock = ExporterLock.acquire(run_dir)
        assert lock is not None
        for clock[0] in (0.0, 100.0, 200.0):
            exporter.ensure(settings)
        clock[0] = 250.0
        with pytest.raises(RuntimeError, match="can't be killed from here: end it by hand"):
            exporter.ensure(settings)
        lock.release()

    def test_stopping_exports_once_more(
        self, exporter: ExporterProcess, tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the worker wrote last is exported before the end."""
        monkeypatch.setattr(launch, "_STOP_TIMEOUT_S", 60.0)
        exporter.ensure(load_config(tmp_path / "glassbox.yaml"))
        wait_for((tmp_path / "a.jsonl").exists)
        write_snapshot(run_dir, make_snapshot(seed=9, instance="late"))
        exporter.stop()
        exporter.stop()
        assert exporter.pid is None
        rows = sum(
            place["rows"]
            for line in (tmp_path / "a.jsonl").read_text().splitlines()
            for place in json.loads(line)["places"]
        )
        assert rows == make_snapshot().rows.sum() + make_snapshot(seed=9).rows.sum()


LOGGING = """
import logging.config, sys
logging.config.dictConfig({
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"bars": {"format": "%(name)s|%(processName)s|%(vllm_process_name)s|%(process)d|%(message)s"}},
    "handlers": {"vllm": {"class": "logging.FileHandler", "formatter": "bars", "filename": sys.argv[1]}},
    "loggers": {"vllm": {"handlers": ["vllm"], "level": "INFO", "propagate": False}},
})
from pathlib import Path
from glassbox.config.load import load_config
from glassbox.processes.exporter.launch import ExporterProcess
config = Path(sys.argv[2])
exporter = ExporterProcess(config, Path(sys.argv[3]))
exporter.ensure(load_config(config))
print(exporter.pid, flush=True)
sys.stdin.readline()
exporter.stop()
"""


class TestLog:
    def test_it_is_told_as_vllm_was_told_to(self, run_dir: Path, tmp_path: Path) -> None:
        """By the worker, whatever its logging is: a format, a file, a filter of the user's. Nothing goes elsewhere."""
        path = write_config(tmp_path / "glassbox.yaml", jsonl={"path": "/proc/no/a.jsonl"})
        log = tmp_path / "log.txt"
        worker = subprocess.Popen(
            [sys.executable, "-c", LOGGING, str(log), str(path), str(run_dir)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        try:
            wait_for(lambda: log.exists() and "export to jsonl failed" in log.read_text())
        finally:
            _, stderr = worker.communicate(b"\n", timeout=120)
        (line,) = log.read_text().splitlines()
        *where, message = line.split("|")
        assert where == ["glassbox.processes.exporter.sinks", "glassbox-exporter", "glassbox-exporter", str(pid)]
        assert "export.jsonl.path (/proc/no/a.jsonl)" in message
        assert stderr == b""

    def test_long_lines_of_any_letters(self, caplog: pytest.LogCaptureFixture) -> None:
        """Ids and names are their clients': a line of letters that take twelve bytes each isn't lost."""
        logger = get_logger("glassbox.tests.relay")
        with open_relay() as theirs:
            try:
                raise ValueError("\U0001f50d" * 4000)
            except ValueError:
                error = sys.exc_info()
            record = logger.makeRecord(logger.name, 40, "f.py", 1, "%s", ("\U0001f50d" * 9000,), error)
            _Sender(theirs).emit(record)
            wait_for(lambda: any(one.name == logger.name for one in caplog.records))
        assert {4000} == {len(one.getMessage()) for one in caplog.records if one.name == logger.name}

    def test_without_its_worker_it_tells_by_itself(self, run_dir: Path, tmp_path: Path) -> None:
        """To stderr: the other end of the socket is closed, or never read."""
        (tmp_path / "glassbox.yaml").write_text("export: {interval_s: soon}")
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.close()
        command = [sys.executable, "-P", "-m", "glassbox.processes.exporter", "--run-dir", str(run_dir)]
        command += ["--config", str(tmp_path / "glassbox.yaml"), "--parent-pid", str(os.getpid())]
        done = subprocess.run(
            [*command, "--log-to", str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            text=True,
            check=False,
        )
        theirs.close()
        assert done.returncode == 2
        assert "interval_s" in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_a_worker_that_does_not_read_holds_nothing_up(self) -> None:
        """More than the socket takes: the rest goes to stderr, at once."""
        code = (
            "import socket, logging;"
            "from glassbox.processes.exporter.log_relay import send_logs;"
            "from glassbox.core.logs import get_logger;"
            "mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
            "send_logs(theirs.detach());"
            "[get_logger().warning('%s %s', number, 'x' * 3000) for number in range(500)]"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        lines = done.stderr.splitlines()
        assert 0 < len(lines) < 500
        assert " 499 xxx" in lines[-1]


def test_main_names_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Without them it says what it needs."""
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "--run-dir, --config, --parent-pid" in capsys.readouterr().err
