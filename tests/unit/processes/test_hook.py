"""A worker that can't be observed is served unobserved: nothing listens, nothing was started, and it is counted."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import pytest

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


class VllmWorker:
    """vLLM's, whose warm-up is all that is called."""

    def compile_or_warm_up_model(self) -> str:
        return "warm"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepHook]:
    monkeypatch.setattr(hook_module, "Worker", FakeWorker)
    monkeypatch.setattr(hook_module, "worker_classes", lambda: [VllmWorker])
    monkeypatch.setattr(hook_module, "runner_classes", list)
    monkeypatch.setattr(FakeWorker, "closed", 0)
    made = StepHook(SETTINGS)
    made.install()
    yield made
    made.remove()
    SEAT.listening.listen(False)


class TestStart:
    @pytest.mark.parametrize("stage", ["prepare", "arm"])
    def test_one_that_fails(self, hook: StepHook, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
        """Warm-up returns what vLLM's returns; no layer stays wrapped, and no observer is asked anything."""
        monkeypatch.setattr(FakeWorker, "failing", stage)
        assert "warm" == VllmWorker().compile_or_warm_up_model()
        assert {stage: 1} == hook.errors.counts()
        assert SEAT.listening.on is False
        assert (None, None) == (hook.worker, SEAT.listener)
        assert FakeWorker.closed == (stage == "arm")

    def test_one_that_works(self, hook: StepHook) -> None:
        """The observer is armed, and hears what observed layers tell."""
        assert "warm" == VllmWorker().compile_or_warm_up_model()
        assert hook.worker is not None
        assert hook.worker.observer is SEAT.listener
        assert hook.worker.observer.armed


class TestSeat:
    def test_a_hook_that_cannot_be_made(self, caplog: pytest.LogCaptureFixture) -> None:
        """The layer that is being built goes on, and so do the next ones; it is said once."""
        seat = Seat()
        calls: list[int] = []

        def fail() -> Any:
            calls.append(1)
            raise ImportError("torch's half is broken")

        seat.take(SETTINGS, fail)
        with caplog.at_level("ERROR", "glassbox"):
            seat.layer_built()
            seat.layer_built()
        assert [1] == calls
        assert seat.hook is None
