"""Patching classes of modules that this process has not imported yet, and may never import.

Owns waiting for an import. Plugins load before most of vLLM does, and not every process loads every part of it:
importing the API server's modules only to patch them would cost each worker seconds and memory.
"""

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from glassbox.core.logs import get_logger

logger = get_logger(__name__)

# Is given the module, returns how to take back what it changed.
Apply = Callable[[ModuleType], Callable[[], None]]


class LatePatches:
    """Changes to modules: made at once to those that are imported, to others right after their import.

    A change that fails is logged and left out; it never breaks an import.
    """

    def __init__(self) -> None:
        self._finder: _Finder | None = None
        self._undo: list[Callable[[], None]] = []

    def add(self, module_name: str, apply: Apply) -> None:
        """Apply a change to the module of that name, now or once it is imported."""
        module = sys.modules.get(module_name)
        # A module that is being imported right now is in sys.modules but not whole.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            self._apply(apply, module)
            return
        if self._finder is None:
            self._finder = _Finder()
            sys.meta_path.insert(0, self._finder)
        self._finder.waiting.setdefault(module_name, []).append(lambda loaded: self._apply(apply, loaded))

    def _apply(self, apply: Apply, module: ModuleType) -> None:
        try:
            self._undo.append(apply(module))
        except Exception as error:
            logger.warning("glassbox can't patch %s: %s: %s", module.__name__, type(error).__name__, error)

    def remove(self) -> None:
        """Take back every change and wait for no more imports."""
        finder, self._finder = self._finder, None
        if finder is not None:
            finder.waiting.clear()
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)
        while self._undo:
            self._undo.pop()()


class _Finder(MetaPathFinder):
    """Finds the awaited modules as Python would, with a loader that tells when they have been imported."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.waiting.pop(fullname))
        return spec


class _Loader(Loader):
    """Imports with another loader, puts that one in its own place, and then calls back."""

    def __init__(self, loader: Loader, loaded: list[Callable[[ModuleType], None]]) -> None:
        self._loader = loader
        self._loaded = loaded

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # First, because the module's own code may ask its loader for source or resources.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for loaded in self._loaded:
            loaded(module)
