"""A table of features while it is made: parts in a folder beside it, so that whoever is killed can go on.

Owns the folder `<output>.parts`: a part for each batch of samples, whole or absent, a file that says what they were
made with, and a lock. The end is one table, with the samples in the order of their file, and the folder goes.
"""

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from glassbox.core.files import open_regular, write_atomically
from glassbox.core.json_fields import FieldError, parse_json
from glassbox.view.measured import ViewError
from glassbox.view.samples.feature_table import SampleRow, TableOrigin, to_arrow

if TYPE_CHECKING:
    import pyarrow as pa

_SETTINGS: Final = "settings.json"
_LOCK: Final = "lock"
_PREFIX, _SUFFIX = "part-", ".parquet"
_MAX_SETTINGS: Final = 1 << 20
_MAX_PART: Final = 8 << 30


class Parts:
    """The parts of one table; use `open_parts`.

    Attributes:
        folder: in which they lie.
        done: numbers of the samples that they hold.
    """

    def __init__(self, folder: Path, origin: TableOrigin) -> None:
        self.folder, self._origin = folder, origin
        self.done: set[int] = set()
        for path in self._paths():
            self.done |= _samples(path)

    def add(self, rows: Sequence[SampleRow]) -> None:
        """Write a part; when this returns it is on the disk.

        Raises:
            OSError: it can't be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(to_arrow(rows, self._origin), sink)
        first = min(row.sample for row in rows)
        write_atomically(self.folder / f"{_PREFIX}{first:09d}{_SUFFIX}", sink.getvalue().to_pybytes())
        self.done |= {row.sample for row in rows}

    def merge(self, output: Path) -> "Counter[str]":
        """Write the table and remove the folder.

        Returns:
            The problems, and how many samples have each.

        Raises:
            OSError: it can't be written; the folder stays.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = [_read(path) for path in self._paths()]
        table = pa.concat_tables(parts, promote_options="default").sort_by("sample")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomically(output, sink.getvalue())
        shutil.rmtree(self.folder)
        return Counter(table["problem"].drop_null().to_pylist())

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*{_SUFFIX}"))


@contextlib.contextmanager
def open_parts(output: Path, settings: Mapping[str, Any], origin: TableOrigin, *, restart: bool) -> Iterator[Parts]:
    """The parts of the table at `output`: those of an earlier run with the same settings, if there are any.

    Args:
        settings: that decide what stands in the table, JSON.
        restart: remove what an earlier run has left.

    Raises:
        ViewError: another run works there, or the earlier one had other settings, or was another user's.
        OSError: the folder can't be made or read.
    """
    folder = output.with_name(output.name + ".parts")
    folder.mkdir(mode=0o755, exist_ok=True)
    _check_folder(folder)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ViewError(f"another `glassbox extract` writes {output}; wait for it, or name another file") from None
        if restart:
            for path in folder.iterdir():
                if path.name != _LOCK:
                    path.unlink()
        parts = Parts(folder, origin)
        _check_settings(parts, settings, output)
        yield parts
    finally:
        os.close(lock)


def _check_folder(folder: Path) -> None:
    """What lies there becomes the table: in /tmp anybody could have made the folder first."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise ViewError(
            f"{folder} must be a folder of this user that not everybody may write to; name another --output"
        )


def _check_settings(parts: Parts, settings: Mapping[str, Any], output: Path) -> None:
    path = parts.folder / _SETTINGS
    if not parts.done:  # of a run that got nowhere, as with a wrong address, nothing depends on its settings
        write_atomically(path, json.dumps(settings, indent=1).encode())
        return
    try:
        with open_regular(path, _MAX_SETTINGS) as file:
            before = parse_json(file.read())
    except FileNotFoundError:
        raise ViewError(f"{path} is missing; begin anew with --restart") from None
    except FieldError as error:
        raise ViewError(f"{path} {error}; begin anew with --restart") from None
    differing = [name for name, value in settings.items() if not isinstance(before, dict) or before.get(name) != value]
    if differing:
        raise ViewError(
            f"{output} was begun with another {' and '.join(differing)}; give the same, or begin anew with --restart"
        )


def _read(path: Path, columns: list[str] | None = None) -> "pa.Table":
    """A part.

    Raises:
        OSError: it can't be read, or is no file.
    """
    import pyarrow.parquet as pq

    with open_regular(path, _MAX_PART) as file:
        return pq.read_table(file, columns=columns)


def _samples(path: Path) -> set[int]:
    import pyarrow as pa

    try:
        return set(_read(path, ["sample"])["sample"].to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ViewError(f"{path} can't be read ({str(error)[:200]}); begin anew with --restart") from None
