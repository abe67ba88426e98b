"""A worker that can't be observed is served unobserved: nothing listens, nothing was started, and it is counted."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import pytest

from glassbox.adapter import worker_start
from glassbox.adapter.seat import SEAT, Seat
from glassbox.processes.worker import hook as hook_module
from glassbox.processes.worker.hook import StepHook

SETTINGS: Final[Any] = SimpleNamespace()


class FakeWorker:
    """Listens as an observer does when it is made; fails where it is told to."""

    failing = ""
    closed = 0

    def __init__(self, vllm_worker: Any, _settings: Any, _errors: Any) -> None:
        SEAT.listening.listen(True)
        if self.failing == "prepare":
            raise RuntimeError("no")
        self.observer = SimpleNamespace(armed=False)
        self.vllm_worker = lambda: vllm_worker

    def start(self) -> None:
        if self.failing == "arm":
            raise OSError("disk full")
        self.observer.armed = True

    def close(self) -> None:
        FakeWorker.closed += 1


VLLM_WORKER: Final[Any] = object()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepHook]:
    monkeypatch.setattr(hook_module, "Worker", FakeWorker)
    monkeypatch.setattr(hook_module, "runner_classes", list)
    monkeypatch.setattr(FakeWorker, "closed", 0)
    made = StepHook(SETTINGS)
    yield made
    made.remove()
    SEAT.listening.listen(False)


class TestStart:
    @pytest.mark.parametrize("stage", ["prepare", "arm"])
    def test_one_that_fails(self, hook: StepHook, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
        """Nothing is raised into vLLM's warm-up; no layer stays wrapped, and no observer is asked anything."""
        monkeypatch.setattr(FakeWorker, "failing", stage)
        hook.prepare(VLLM_WORKER)
        hook.arm()
        assert {stage: 1} == hook.errors.counts()
        assert SEAT.listening.on is False
        assert (None, None) == (hook.worker, SEAT.listener)
        assert FakeWorker.closed == (stage == "arm")

    def test_one_that_works(self, hook: StepHook) -> None:
        """The observer is armed, and hears what observed layers tell."""
        hook.prepare(VLLM_WORKER)
        hook.arm()
        assert hook.worker is not None
        assert hook.worker.observer is SEAT.listener
        assert hook.worker.observer.armed


class TestSeat:
    def test_a_hook_that_cannot_be_made(self, caplog: pytest.LogCaptureFixture) -> None:
        """Warm-up goes on, and so does the next one; it is said once."""
        seat = Seat()
        calls: list[int] = []

        def fail() -> Any:
            calls.append(1)
            raise ImportError("torch's half is broken")

        seat.take(SETTINGS, fail)
        with caplog.at_level("ERROR", "glassbox"):
            for _ in range(2):
                seat.warm_up_begins(VLLM_WORKER)
                seat.warm_up_ended()
        assert [1] == calls
        assert seat.hook is None


class Vllm:
    """Worker classes of vLLM's, of which the begin and the warm-up are all that is called."""

    class Worker:
        def compile_or_warm_up_model(self) -> str:
            return "warm"

    class CPUWorker(Worker):
        def init_device(self) -> str:
            return "a CPU"


class TestWorkerStart:
    def test_every_worker_is_told_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before and after its warm-up, whose answer is vLLM's; it is taken back."""
        for module, cls in worker_start._WORKER_CLASSES:
            loaded = ModuleType(module)
            loaded.__spec__ = ModuleSpec(module, None)
            setattr(loaded, cls, getattr(Vllm, cls))
            monkeypatch.setitem(sys.modules, module, loaded)
        told: list[Any] = []
        monkeypatch.setattr(SEAT, "warm_up_begins", told.append)
        monkeypatch.setattr(SEAT, "warm_up_ended", lambda: told.append("ended"))
        undo = worker_start.install(lambda: told.append("on a CPU"))
        workers = [Vllm.Worker(), Vllm.CPUWorker()]
        assert [] == told, "that its module is there makes no worker of a process"
        assert "a CPU" == Vllm.CPUWorker().init_device()
        assert ["on a CPU"] == told
        told.clear()
        assert ["warm", "warm"] == [worker.compile_or_warm_up_model() for worker in workers]
        assert [workers[0], "ended", workers[1], "ended"] == told
        undo()
        assert ("a CPU", "warm") == (Vllm.CPUWorker().init_device(), workers[1].compile_or_warm_up_model())
        assert 4 == len(told)
