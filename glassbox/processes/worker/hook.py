"""The step hook: knows which engine step is real, and tells the observer when it begins and ends.

Owns the patches on vLLM's runner classes and the one worker of the process. A step counts only between the end of the
worker's warm-up and its own: profile runs, warm-up and graph capture come before it, dummy runs are recognised by their
argument. Patches are applied when a worker warms up, so that only worker processes are touched, and `remove()` takes
them all back.
"""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from glassbox.adapter import internals
from glassbox.adapter.internals import Feature
from glassbox.adapter.patch import patch_method
from glassbox.adapter.protocols import Runner, SchedulerOutput, VllmWorker
from glassbox.adapter.release import vllm_version
from glassbox.adapter.runner import is_dummy_run, runner_classes
from glassbox.adapter.scheduler import ScheduledStep
from glassbox.adapter.seat import SEAT
from glassbox.config.settings import Settings
from glassbox.core.errors import ErrorCounter
from glassbox.core.logs import get_logger, log_once
from glassbox.processes.worker.worker import Worker

logger = get_logger(__name__)


class StepHook:
    """Patches of this process and what they lead to.

    Args:
        settings: of this process.

    Attributes:
        worker: that is observed; None before its warm-up and after its end.
        errors: of everything that runs in this process.
    """

    def __init__(self, settings: Settings) -> None:
        self.worker: Worker | None = None
        self.errors = ErrorCounter(logger)
        self._settings = settings
        self._restores: dict[tuple[type, str], Callable[[], None]] = {}

    def prepare(self, vllm_worker: VllmWorker) -> None:
        """Patch the runner classes that are loaded, and make the observer: a captured graph must hold its buffers.

        Of a vLLM that lacks what observing needs nothing is patched, and the log says what that is.
        """
        if internals.lacks(Feature.OBSERVATION):
            log_once(logger, logging.ERROR, "internals", "%s", internals.line(Feature.OBSERVATION, vllm_version()))
            SEAT.listening.listen(False)
            return
        for cls in runner_classes():
            self._patch(cls, "execute_model", self._wrap_execute_model)
            self._patch(cls, "prepare_inputs", self._wrap_prepare_inputs)
        if self.worker is not None and self.worker.vllm_worker() is vllm_worker:
            return
        self.disarm()
        try:
            self.worker = Worker(vllm_worker, self._settings, self.errors)
            SEAT.listener = self.worker.observer
        except Exception as error:
            self._give_up("prepare", error)

    def arm(self) -> None:
        """Count steps from now on."""
        if self.worker is not None:
            try:
                self.worker.start()
            except Exception as error:
                self._give_up("arm", error)

    def remove(self) -> None:
        """Put every patched method back and stop what was started."""
        self.disarm()
        for restore in self._restores.values():
            restore()
        self._restores.clear()

    def disarm(self) -> None:
        """End the observation of this process's worker; its last numbers are written first."""
        worker, self.worker, SEAT.listener = self.worker, None, None
        if worker is not None:
            worker.close()

    def _patch(self, cls: type, name: str, make: Callable[[Any], Any]) -> None:
        if (cls, name) not in self._restores and name in cls.__dict__:
            self._restores[cls, name] = patch_method(cls, name, make)

    def _give_up(self, stage: str, error: Exception) -> None:
        """The worker is served unobserved: nothing listens, and what was started ends."""
        self.errors.count(stage, error)
        with self.errors.guard(stage):
            self.disarm()
        SEAT.listening.listen(False)

    def _wrap_prepare_inputs(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around the V2 runner's: what it returns says which requests a step's rows are of."""

        @wraps(original)
        def prepare_inputs(runner: Runner, *args: Any, **kwargs: Any) -> Any:
            prepared = original(runner, *args, **kwargs)
            if self.worker is not None:
                self.worker.observer.on_prepare(prepared)
            return prepared

        return prepare_inputs

    def _wrap_execute_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def execute_model(runner: Runner, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
            worker = self.worker
            observer = None if worker is None else worker.observer
            if observer is None or not observer.armed or is_dummy_run(args, kwargs):
                return original(runner, scheduler_output, *args, **kwargs)
            scheduled = ScheduledStep(scheduler_output)
            if not scheduled.num_tokens:
                observer.idle_step(runner, scheduled)
                return original(runner, scheduler_output, *args, **kwargs)
            observer.start_step(runner, scheduled)
            try:
                return original(runner, scheduler_output, *args, **kwargs)
            finally:
                observer.stop_step()

        return execute_model
