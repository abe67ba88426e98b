"""The families as files of `prometheus_client`'s multiprocess mode.

With several API servers, vLLM's /metrics shows only what lies in $PROMETHEUS_MULTIPROC_DIR, so glassbox writes its
families there: one file per kind, under the same names as long as the server lives, because one exporter at a time
speaks for all of it (`store/multiprocess_files.py` says whose they are). Values are changed in place; when the set of
series changes, the file is replaced. Same metrics as `prometheus.py`: `MultiProcessCollector` derives `_count` from
the buckets (also where there is no `_sum` beside it: `without_lone_counts`), and neither has `_created`.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.samples import Sample

from glassbox.export.family import Family, Kind
from glassbox.export.prometheus import bucket_names
from glassbox.store import multiprocess_files

_FILES: Final[dict[Kind, str]] = {"counter": "counter", "gauge": "gauge_mostrecent", "histogram": "histogram"}
_PAGE: Final = 1 << 16  # as prometheus_client's own first size
_HEADER_BYTES: Final = 8
_ENTRY_BYTES: Final = 4 + 8 + 16  # length, padding at most, value and timestamp


def samples(family: Family) -> Iterator[tuple[str, float]]:
    """Keys and values of a family as the collector wants them: buckets not cumulative, no `_count`."""
    if family.kind != "histogram":
        metric = family.name.removesuffix("_total") if family.kind == "counter" else family.name
        for series in family.series:
            if family.kind == "counter" and math.isnan(series.value):
                continue
            yield (
                mmap_key(metric, family.name, list(family.label_names), list(series.labels), family.help),
                series.value,
            )
        return
    names = [*family.label_names, "le"]
    bounds = bucket_names(family.bounds)
    for series in family.series:
        for le, count in zip(bounds, series.buckets, strict=True):
            key = mmap_key(family.name, f"{family.name}_bucket", names, [*series.labels, le], family.help)
            yield key, count
        if series.sum is not None and not math.isnan(series.sum):
            name = f"{family.name}_sum"
            yield (
                mmap_key(family.name, name, list(family.label_names), list(series.labels), family.help),
                series.sum,
            )


def without_lone_counts(metrics: Iterable[Metric]) -> list[Metric]:
    """What `MultiProcessCollector` makes of glassbox's files, as `prometheus.py` would show it.

    It gives every histogram a `_count`; OpenMetrics has none where there is no `_sum`, and a strict parser throws the
    whole page away.
    """
    shown = []
    for metric in metrics:
        if metric.type == "histogram" and metric.name.startswith("glassbox_"):
            summed = {_place(sample) for sample in metric.samples if sample.name == f"{metric.name}_sum"}
            metric.samples = [
                sample for sample in metric.samples if sample.name != f"{metric.name}_count" or _place(sample) in summed
            ]
        shown.append(metric)
    return shown


def _place(sample: Sample) -> frozenset[tuple[str, str]]:
    return frozenset(sample.labels.items())


class _File:
    """One file of the multiprocess directory, held open for changes in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: MmapedDict | None = None
        self._keys: frozenset[str] = frozenset()
        self._inode = -1

    def write(self, values: dict[str, float], time_s: float) -> None:
        if self._values is None or self._keys != values.keys() or not self._in_place():
            self._replace(values, time_s)
            return
        for key, value in values.items():
            self._values.write_value(key, value, time_s)

    def _in_place(self) -> bool:
        """False if somebody removed or replaced the file, so that nobody would see a change."""
        try:
            return os.stat(self._path).st_ino == self._inode
        except OSError:
            return False

    def _replace(self, values: dict[str, float], time_s: float) -> None:
        self.close()
        # The collector reads *.db only.
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        used = _HEADER_BYTES + sum(len(key.encode()) + _ENTRY_BYTES for key in values)
        try:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            # Exclusively: others may write to the directory, too, and must not have a link there.
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                # Blocks are taken now: on a full disk this raises, where writing to a mapped hole kills the
                # process.
                os.posix_fallocate(handle, 0, -(-used // _PAGE) * _PAGE)
            finally:
                os.close(handle)
            mapped = MmapedDict(str(temporary))
            try:
                for key, value in values.items():
                    mapped.write_value(key, value, time_s)
                self._inode = os.stat(temporary).st_ino
                os.replace(temporary, self._path)
            except BaseException:
                mapped.close()
                raise
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._values, self._keys = mapped, frozenset(values)

    def close(self) -> None:
        if self._values is not None:
            self._values.close()
        self._values, self._keys = None, frozenset()


class MultiprocessWriter:
    """Keeps the families up to date in a multiprocess directory.

    Args:
        directory: that one; other servers may share it.
        owner: of the files, `multiprocess_files.owner_of` the server's run directory.
    """

    def __init__(self, directory: Path, owner: str) -> None:
        self._directory, self._owner = Path(directory), owner
        self._lock: int | None = None
        self._files = {
            kind: _File(self._directory / multiprocess_files.file_name(name, owner)) for kind, name in _FILES.items()
        }

    def write(self, families: Iterable[Family], time_s: float) -> None:
        """Write all families; series that are in none of them disappear.

        Args:
            families: of the whole server.
            time_s: Unix time, above 0.

        Raises:
            OSError: if a file cannot be written; the others and the older content stay.
        """
        self._hold()
        values: dict[Kind, dict[str, float]] = {kind: {} for kind in _FILES}
        for family in families:
            values[family.kind].update(samples(family))
        for kind, file in self._files.items():
            file.write(values[kind], time_s)

    def _hold(self) -> None:
        if self._lock is not None and multiprocess_files.is_held_by(self._directory, self._owner, self._lock):
            return
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        multiprocess_files.purge_dead(self._directory)
        self._lock = multiprocess_files.hold(self._directory, self._owner)
        if self._lock is None:
            raise BlockingIOError(f"another exporter of this server writes to {self._directory}")

    def close(self) -> None:
        """Remove the files: nothing is shown of a server that has ended.

        A scrape that has listed the directory, but not read it yet, fails; it is one of a server that ends.
        """
        for file in self._files.values():
            file.close()
        if self._lock is not None:
            multiprocess_files.release(self._directory, self._owner, self._lock)
            self._lock = None
