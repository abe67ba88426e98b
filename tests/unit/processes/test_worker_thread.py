"""The thread of a worker that asks its device for numbers beside the one that computes the steps."""

import threading
from types import SimpleNamespace

import pytest

from glassbox.core.errors import export_errors
from glassbox.core.logs import get_logger
from glassbox.processes.worker.worker import Worker


class OneRound(Worker):
    """A worker that ends after its thread's first round, of which it notes what concerns the device."""

    def __init__(self, *, binds: bool) -> None:
        self.calls: list[str] = []
        self._errors, self._closing = export_errors(get_logger("glassbox.tests")), True

        def enter_thread() -> None:
            self.calls.append("enter_thread")
            if not binds:
                raise RuntimeError("no such device")

        measurer = SimpleNamespace(enter_thread=enter_thread)
        self.observer = SimpleNamespace(measurer=measurer)  # type: ignore[assignment]
        self._sampled = SimpleNamespace(refresh=lambda: None)  # type: ignore[assignment]

    def write_if_changed(self) -> None:
        self.calls.append("snapshot")

    def _write_traces(self, *, running: bool = True) -> None:
        self.calls.append("deferred")

    def _say_selection(self) -> None:
        pass

    def _look_at_exporter(self) -> None:
        pass


@pytest.mark.parametrize("binds", [True, False])
def test_it_is_bound_to_the_device_first(*, binds: bool) -> None:
    """Before it asks for the first number, or whether the device has come so far; without it numbers come as well."""
    worker = OneRound(binds=binds)
    thread = threading.Thread(target=worker._run)
    thread.start()
    thread.join()
    assert ["enter_thread", "snapshot", "deferred"] == worker.calls
    assert ({} if binds else {"snapshot": 1}) == worker._errors.counts()
