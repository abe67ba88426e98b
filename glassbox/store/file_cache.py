"""What files of a folder say, each read again only when it was replaced."""

from collections.abc import Callable, Container, Iterator
from typing import Generic, TypeVar

from glassbox.core.files import FileVersion

_Content = TypeVar("_Content")


class FileCache(Generic[_Content]):
    """The contents of files by name; not thread-safe.

    Args:
        read: reads the file of a name.
    """

    def __init__(self, read: Callable[[str], _Content]) -> None:
        self._read = read
        self._known: dict[str, tuple[FileVersion, _Content]] = {}

    def keep(self, names: Container[str]) -> None:
        """Forget all others."""
        self._known = {name: entry for name, entry in self._known.items() if name in names}

    def of(self, name: str, version: FileVersion) -> _Content:
        """What a file says that is of this version now."""
        if name not in self._known or self._known[name][0] != version:
            self._known[name] = (version, self._read(name))
        return self._known[name][1]

    def items(self) -> Iterator[tuple[str, FileVersion, _Content]]:
        """Name, version and content of what was read."""
        return ((name, version, content) for name, (version, content) in self._known.items())
