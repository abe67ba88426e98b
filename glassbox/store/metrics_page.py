"""The page of metrics that the exporter leaves for the API servers, who hand out its bytes as they are.

Owns the file: made by the exporter at each interval, replaced whole, and written and read in parts, so that nobody
holds it in memory or parses it. What stands in it is text of `export/page.py`'s; of that this module knows only which
family, engine and format a block of bytes belongs to.

    blocks of bytes
    the index: JSON, a list of families with the names of their samples and their blocks
    glassbox-page-2 <place of the index> <its length>

Its time (mtime) is that of the snapshots it was made of, also if they have not changed since.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from glassbox.store import recent_note
from glassbox.store.trusted_file import open_descriptor, write_file

NAME: Final = "metrics.page"
Format = Literal["text", "openmetrics"]
FORMATS: Final[tuple[Format, ...]] = ("text", "openmetrics")
Range = tuple[int, int]  # place in the file, and length

_MAGIC: Final = b"glassbox-page-2"
_END_BYTES: Final = len(_MAGIC) + 1 + 20 + 1 + 12 + 1
_MAX_INDEX_BYTES: Final = 16_000_000
_FRONT_NOTE: Final = "metrics.front"
# Where nobody has scraped for so long, no page is made, and no exporter started for it.
FRONT_S: Final = 600.0
# Of all that is left in a run directory.
NAMES: Final = (NAME, _FRONT_NOTE)


class Block(NamedTuple):
    """Some lines of a family.

    Attributes:
        engine: label of the engine that they are of; None belongs to all, as the family's HELP and TYPE.
        format: that they are for; None is both.
        at, length: where they stand.
    """

    engine: str | None
    format: Format | None
    at: int
    length: int


class PageIndex:
    """What stands where in a page, noted family by family while its blocks are made."""

    def __init__(self) -> None:
        self._at = 0
        self._families: list[dict[str, Any]] = []

    def begin_family(self, names: Iterable[str]) -> None:
        """What is noted from now on is of a family whose samples have these names."""
        self._families.append({"names": list(names), "blocks": []})

    def note(self, content: bytes, engine: str | None = None, format: Format | None = None) -> bytes:
        """A block of the family that was begun last comes next; see Block. Returns its content."""
        blocks = self._families[-1]["blocks"]
        if blocks and blocks[-1][:2] == (engine, format):
            blocks[-1] = blocks[-1]._replace(length=blocks[-1].length + len(content))
        else:
            blocks.append(Block(engine, format, self._at, len(content)))
        self._at += len(content)
        return content

    def end(self) -> bytes:
        """What comes after the last block."""
        index = json.dumps(self._families, separators=(",", ":")).encode()
        return b"%s%s %020d %012d\n" % (index, _MAGIC, self._at, len(index))


class MetricsPage:
    """A page, open for reading until it is closed.

    Attributes:
        time_s: Unix time of what it shows.

    Args:
        read: returns `length` bytes from a place on, fewer at the end; from any thread.
        size: bytes that there are.
        time_s: see above.
        close: lets go of what `read` reads from.

    Raises:
        ValueError: it is no page of this format.
    """

    def __init__(
        self, read: Callable[[int, int], bytes], size: int, time_s: float, close: Callable[[], None] = lambda: None
    ) -> None:
        self.read, self.time_s, self.close = read, time_s, close
        try:
            magic, at, length = read(max(size - _END_BYTES, 0), _END_BYTES).split()
            index_at, index_length = int(at), int(length)
            if magic != _MAGIC or index_at < 0 or not 0 < index_length <= _MAX_INDEX_BYTES:
                raise ValueError("another end")
            self._families = [
                (frozenset(family["names"]), [Block(*block) for block in family["blocks"]])
                for family in json.loads(read(index_at, index_length))
            ]
            for _, blocks in self._families:
                for block in blocks:
                    if not 0 <= block.at <= block.at + block.length <= index_at:
                        raise ValueError("a block outside of the file")
        except Exception as error:  # garbage can fail anywhere
            raise ValueError(f"{NAME} must be a page of metrics: {type(error).__name__}: {error}") from error

    @classmethod
    def of_bytes(cls, data: bytes, time_s: float) -> "MetricsPage":
        """A page without a file."""
        return cls(lambda at, length: data[at : at + length], len(data), time_s)

    def ranges(
        self, format: Format, engines: Collection[str] | None = None, names: Collection[str] = ()
    ) -> list[Range]:
        """Where to read what is to be shown, in this order.

        Args:
            format: of the answer.
            engines: labels of those that are shown; None is all.
            names: of samples whose families are shown; none is all of them.
        """
        found: list[Range] = []
        # A URL has room for thousands of names: of two sets the smaller one is gone through.
        wanted = frozenset(names)
        for of_family, blocks in self._families:
            if wanted and of_family.isdisjoint(wanted):
                continue
            fitting = [block for block in blocks if block.format in (None, format)]
            shown = [block for block in fitting if block.engine is None or engines is None or block.engine in engines]
            if all(block.engine is None for block in shown) and any(block.engine is not None for block in fitting):
                continue  # a header without samples
            for block in shown:
                if found and sum(found[-1]) == block.at:
                    found[-1] = (found[-1][0], found[-1][1] + block.length)
                else:
                    found.append((block.at, block.length))
        return found


def write_page(run_dir: Path, pieces: Iterable[bytes], time_s: float) -> None:
    """Replace the page.

    Args:
        pieces: the blocks of a page, and what PageIndex says comes after them.
        time_s: Unix time of what it shows.

    Raises:
        OSError: it can't be written; the older one stays.
    """
    write_file(Path(run_dir) / NAME, pieces)
    confirm_page(run_dir, time_s)


def confirm_page(run_dir: Path, time_s: float) -> None:
    """The page still is what there is to show at this time.

    Raises:
        OSError: there is none.
    """
    os.utime(Path(run_dir) / NAME, (time_s, time_s))


def remove_page(run_dir: Path) -> None:
    """Nobody keeps it up to date any more."""
    (Path(run_dir) / NAME).unlink(missing_ok=True)


def open_page(run_dir: Path) -> MetricsPage:
    """The page as it is now; it may be replaced while it is read.

    Raises:
        OSError: there is none, or it can't be read.
        DistrustError: it is no regular file, or others could have written it.
        ValueError: it is none.
    """
    handle, found = open_descriptor(Path(run_dir) / NAME)
    try:
        return MetricsPage(
            lambda at, length: os.pread(handle, length, at), found.st_size, found.st_mtime, lambda: os.close(handle)
        )
    except BaseException:
        os.close(handle)
        raise


def note_front(run_dir: Path) -> None:
    """Tell the exporter and the workers of this node that an API server hands out the page, and was just asked for it.

    Raises:
        OSError: it can't be written, or there is no run directory.
    """
    recent_note.note(Path(run_dir) / _FRONT_NOTE)


def has_front(run_dir: Path) -> bool:
    """Whether an API server has told it of late."""
    return recent_note.is_recent(Path(run_dir) / _FRONT_NOTE, FRONT_S)
