"""Modules are patched once they are imported, not before, and left as they were afterwards."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from glassbox.adapter.late_patch import LatePatches

NAME = "glassbox_test_late"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that nobody has imported."""
    (tmp_path / f"{NAME}.py").write_text(
        "import inspect, sys\nVALUE = 1\nSOURCE = inspect.getsource(sys.modules[__name__])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield NAME
    sys.modules.pop(NAME, None)


@pytest.fixture
def patches() -> Iterator[LatePatches]:
    made = LatePatches()
    yield made
    made.remove()


def set_value(value: int) -> Callable[[ModuleType], Callable[[], None]]:
    def apply(module: ModuleType) -> Callable[[], None]:
        before = module.VALUE
        module.VALUE = value  # type: ignore[attr-defined]
        return lambda: setattr(module, "VALUE", before)

    return apply


class TestAdd:
    def test_a_module_that_comes_later(self, patches: LatePatches, module: str) -> None:
        """It is patched right after its own code has run; nothing imports it before."""
        patches.add(module, set_value(2))
        assert module not in sys.modules
        assert 2 == importlib.import_module(module).VALUE

    def test_a_module_that_is_there(self, patches: LatePatches, module: str) -> None:
        """It is patched at once."""
        loaded = importlib.import_module(module)
        patches.add(module, set_value(2))
        assert 2 == loaded.VALUE

    def test_several_of_one_module(self, patches: LatePatches, module: str) -> None:
        """Each is made, in their order."""
        for value in (2, 3):
            patches.add(module, set_value(value))
        loaded = importlib.import_module(module)
        assert 3 == loaded.VALUE
        patches.remove()
        assert 1 == loaded.VALUE

    def test_its_loader_is_its_own(self, patches: LatePatches, module: str) -> None:
        """While it is imported and afterwards: inspect finds its source, and nothing of glassbox stays in it."""
        patches.add(module, set_value(2))
        loaded = importlib.import_module(module)
        assert "VALUE = 1" in loaded.SOURCE
        assert loaded.SOURCE == inspect.getsource(loaded)
        assert "glassbox" not in type(loaded.__loader__).__module__
        assert loaded.__spec__ is not None
        assert loaded.__loader__ is loaded.__spec__.loader

    def test_a_patch_that_fails_breaks_no_import(
        self, patches: LatePatches, module: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is logged; the module is imported as it is."""

        def fail(_: ModuleType) -> Callable[[], None]:
            raise AttributeError("no such class")

        patches.add(module, fail)
        assert 1 == importlib.import_module(module).VALUE
        assert f"glassbox can't patch {module}: AttributeError: no such class" in caplog.text

    def test_a_module_that_is_not_installed(self, patches: LatePatches) -> None:
        """Its import fails as it would without."""
        patches.add("glassbox_test_absent", set_value(2))
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("glassbox_test_absent")


class TestRemove:
    def test_it_takes_back(self, patches: LatePatches, module: str) -> None:
        """What was changed is as before; what was waited for is not changed any more; sys.meta_path is as before."""
        finders = list(sys.meta_path)
        patches.add(module, set_value(2))
        loaded = importlib.import_module(module)
        patches.add("glassbox_test_never", set_value(3))
        patches.remove()
        assert 1 == loaded.VALUE
        assert finders == sys.meta_path
