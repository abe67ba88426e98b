"""One sink never takes another down: whatever it raises, and for however long it hangs."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glassbox.config.load import GlassboxConfig
from glassbox.core.errors import ErrorCounter, export_errors
from glassbox.core.logs import get_logger
from glassbox.processes.exporter import sink as sink_module
from glassbox.processes.exporter.sink import Sink
from glassbox.processes.exporter.sinks import Sinks
from glassbox.store.exporter_status import read_status
from glassbox.store.snapshot import write_snapshot
from tests.export_samples import logged, make_snapshot
from tests.otlp_receiver import OtlpReceiver
from tests.waiting import wait_for

CONFIG = GlassboxConfig()


class Target:
    """What a sink writes to: fails or hangs as it is told."""

    def __init__(self) -> None:
        self.wanted: Any = "a"
        self.opened: list[Any] = []
        self.closed: list[tuple[Any, bool]] = []
        self.given = 0
        self.error: Exception | None = None
        self.release = threading.Event()
        self.release.set()

    def wants(self, config: GlassboxConfig) -> Any:
        if isinstance(self.wanted, Exception):
            raise self.wanted
        return self.wanted

    def opens(self, config: GlassboxConfig) -> Any:
        self.use(self.wanted)
        self.opened.append(self.wanted)
        return self.wanted

    def use(self, _: Any) -> None:
        self.release.wait(60)
        if self.error is not None:
            raise self.error
        self.given += 1


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how long a step may take. Long, until a test has something that hangs: a busy machine takes its time."""

    def be_patient_for(seconds: float) -> None:
        monkeypatch.setattr(sink_module, "PATIENCE_S", seconds)
        monkeypatch.setattr(sink_module, "OPEN_PATIENCE_S", seconds)

    be_patient_for(60.0)
    return be_patient_for


@pytest.fixture
def target() -> Iterator[Target]:
    target = Target()
    yield target
    target.release.set()


@pytest.fixture
def errors() -> ErrorCounter:
    return export_errors(get_logger("glassbox.tests"))


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def sink(target: Target, errors: ErrorCounter, clock: list[float]) -> Sink[Any]:
    return Sink(
        "target",
        errors,
        wants=target.wants,
        opens=target.opens,
        closes=lambda value, still: target.closed.append((value, still)),
        clock=lambda: clock[0],
        unix=lambda: 1000.0 + clock[0],
    )


class TestOneSink:
    def test_it_is_opened_changed_and_closed(self, sink: Sink[Any], target: Target) -> None:
        """As the configuration wants it; who closes it knows whether another one comes after it."""
        for target.wanted in ("a", "a", "b", None):
            sink.apply(CONFIG)
        assert target.opened == ["a", "b"]
        assert target.closed == [("a", True), ("b", False)]
        assert not sink.is_wanted

    def test_attempts_to_open_it_become_rarer(
        self, sink: Sink[Any], target: Target, errors: ErrorCounter, clock: list[float]
    ) -> None:
        """1, 2, 4, ... at most 60 seconds apart; something else that is wanted is tried at once."""
        target.error = OSError("no")
        tried = []
        for second in range(200):
            clock[0], before = float(second), errors.counts().get("target", 0)
            sink.apply(CONFIG)
            if errors.counts()["target"] > before:
                tried.append(second)
        assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183]
        target.error, target.wanted = None, "b"
        sink.apply(CONFIG)
        assert sink.value == "b"

    def test_what_it_raises_is_its_error(self, sink: Sink[Any], target: Target, errors: ErrorCounter) -> None:
        """Of whatever kind, and whatever it was doing; it stays open and is wanted all the same."""
        sink.apply(CONFIG)
        target.error = RuntimeError("an SDK's")
        sink.give(target.use)
        assert (errors.counts(), sink.value) == ({"target": 1}, "a")
        target.wanted = RuntimeError("Could not determine home directory.")
        sink.apply(CONFIG)
        assert errors.counts() == {"target": 2}
        assert sink.is_wanted

    def test_the_last_success(self, sink: Sink[Any], target: Target, clock: list[float]) -> None:
        """Is that of the last time at which it did what it was asked to; having been opened is none."""
        sink.apply(CONFIG)
        assert sink.last_success_s == 0
        clock[0] = 1.0
        sink.give(target.use)
        assert sink.last_success_s == 1001.0
        clock[0], target.error = 2.0, OSError("full")
        sink.give(target.use)
        assert sink.last_success_s == 1001.0

    def test_one_that_hangs_is_left_alone(
        self,
        sink: Sink[Any],
        target: Target,
        errors: ErrorCounter,
        clock: list[float],
        patience: Callable[[float], None],
    ) -> None:
        """Each round counts it; nothing more is given to it; once it goes on, so does everything."""
        sink.apply(CONFIG)
        target.release.clear()
        patience(0.3)
        for clock[0] in (0.0, 5.0, 10.0):
            sink.apply(CONFIG)
            sink.give(target.use)
        assert errors.counts() == {"target": 3}
        assert sink.last_success_s == 0
        assert target.given == 1  # of opening
        target.release.set()
        wait_for(lambda: not sink.busy, what="the step to end", pause_s=0.01)
        patience(60.0)
        sink.give(target.use)
        assert (target.given, sink.last_success_s) == (3, 1010.0)

    def test_an_edit_frees_it_of_what_hangs(
        self, sink: Sink[Any], target: Target, patience: Callable[[float], None]
    ) -> None:
        """Another place is opened at once; the old one may hang for ever."""
        sink.apply(CONFIG)
        target.release.clear()
        patience(0.3)
        sink.give(lambda _: target.release.wait(60) and None)
        patience(60.0)
        target.wanted = "b"
        hanging, target.release = target.release, threading.Event()
        target.release.set()
        sink.apply(CONFIG)
        assert sink.value == "b"
        hanging.set()

    def test_one_that_died_is_opened_again(self, target: Target, errors: ErrorCounter) -> None:
        """A server whose thread has ended, for example."""
        alive = [True]
        sink: Sink[Any] = Sink("target", errors, wants=target.wants, opens=target.opens, works=lambda _: alive[0])
        sink.apply(CONFIG)
        alive[0] = False
        sink.apply(CONFIG)
        assert target.opened == ["a", "a"]

    def test_one_that_sends_later_tells_when_it_has(
        self, target: Target, errors: ErrorCounter, clock: list[float]
    ) -> None:
        """What was handed over isn't sent yet; without a word of the thread, no new failure is a success."""
        sent: list[float | None] = [7.0]
        sink: Sink[Any] = Sink(
            "target", errors, wants=target.wants, opens=target.opens, sends_later=lambda _: sent[0], unix=lambda: 50.0
        )
        sink.apply(CONFIG)
        sink.give()
        assert sink.last_success_s == 7.0
        sent[0] = None
        errors.count("target", "the collector is away")
        sink.give()
        assert sink.last_success_s == 7.0
        sink.give()
        assert sink.last_success_s == 50.0


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_snapshot(tmp_path / "run", make_snapshot())
    return tmp_path / "run"


class TestTheOthers:
    """Every way for one sink to fail, in an exporter that has the others, too."""

    @pytest.fixture
    def receiver(self) -> Iterator[OtlpReceiver]:
        with OtlpReceiver() as receiver:
            yield receiver

    @pytest.fixture
    def settings(self, tmp_path: Path, receiver: OtlpReceiver) -> dict[str, dict[str, Any]]:
        """Sections of a configuration with JSONL, OTLP and records."""
        return {
            "export.prometheus": {},
            "export.jsonl": {"path": str(tmp_path / "out.jsonl")},
            "export.otel": {"enabled": True, "endpoint": receiver.grpc_endpoint},
            "requests.records": {"path": str(tmp_path / "records.jsonl")},
        }

    @pytest.mark.parametrize(
        ("stage", "section", "change", "environ"),
        [
            ("jsonl", "export.jsonl", {"path": "~nobody-of-that-name/run.jsonl"}, {}),
            ("jsonl", "export.jsonl", {"path": "/proc/no/run.jsonl"}, {}),
            ("jsonl", "export.jsonl", {"path": "$pipe"}, {}),
            ("records", "requests.records", {"path": "~nobody-of-that-name/run"}, {}),
            ("otel", "export.otel", {}, {"OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": "soon"}),
            ("otel_traces", "export.otel", {}, {"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "soon"}),
            ("http", "export.http", {"port": 1}, {"GLASSBOX_HTTP_ADDR": "no.such.host.invalid"}),
            ("multiprocess", "PROMETHEUS_MULTIPROC_DIR", {}, {"PROMETHEUS_MULTIPROC_DIR": "/no/such/directory"}),
        ],
    )
    def test_go_on(
        self,
        run_dir: Path,
        tmp_path: Path,
        receiver: OtlpReceiver,
        settings: dict[str, dict[str, Any]],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        patience: Callable[[float], None],
        stage: str,
        section: str,
        change: dict[str, Any],
        environ: dict[str, str],
    ) -> None:
        """One line names key and remedy, each round without success counts, and all others have their numbers."""
        multiproc, pipe = tmp_path / "multiproc", tmp_path / "pipe"
        multiproc.mkdir()
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):  # full: whoever writes to it hangs
            while True:
                os.write(reader, bytes(4096))
        settings.setdefault(section, {}).update(change)
        if change.get("path") == "$pipe":
            settings[section]["path"] = str(pipe)
            patience(3.0)  # nothing else may take longer
        environ = {"PROMETHEUS_MULTIPROC_DIR": str(multiproc), "GLASSBOX_HTTP_ADDR": "127.0.0.1"} | environ
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        sections: dict[str, dict[str, Any]] = {"export": {}, "requests": {}}
        for name, keys in settings.items():
            if "." in name:
                top, _, part = name.partition(".")
                sections[top][part] = keys
        config = GlassboxConfig.model_validate(sections)
        sinks = Sinks(run_dir, lambda: config)

        def without_success() -> set[str]:
            sinks.round()
            status = read_status(run_dir)
            assert status is not None
            return {name for name, time_s in status.sinks.items() if not time_s}

        try:
            # Some hand over to a thread: a later round than the one that gave it tells what came of that.
            assert {stage} == wait_for(without_success, lambda failing: len(failing) < 2, what="the other sinks")
            assert {stage} == set(sinks.errors.counts())
            (line,) = [line for line in logged(caplog.records) if f"export to {stage} failed" in line]
            assert f"look at {section}" in line
            assert stage == "otel" or receiver.metrics()
            assert stage == "jsonl" or json.loads((tmp_path / "out.jsonl").read_text())["steps"] == 1000
            assert stage == "multiprocess" or list(multiproc.glob("*.db"))
        finally:
            os.read(reader, 1 << 20)
            sinks.close()
            os.close(reader)
