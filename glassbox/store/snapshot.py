"""Snapshot files: what one worker process has measured since it started.

Owns the file format and its reading and writing; what several snapshots mean together is `merge.py`. A
snapshot is cumulative, so the newest file of a worker replaces its older one and a lost file loses nothing
but time.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.files import FileVersion, write_atomically
from glassbox.core.logs import get_logger
from glassbox.core.statistics import NUM_BUCKETS, NUM_STATISTICS, PHASES

logger = get_logger(__name__)

FORMAT_VERSION: Final = 2
_ARRAYS: Final = ("counts", "sums", "rows", "nonfinite", "window_max")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.]")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything one worker process has measured since it started (cumulative).

    With L layers, H local heads, S = NUM_STATISTICS and B = NUM_BUCKETS; phases in the order of PHASES.

    Attributes:
        instance: unique per start of a worker process.
        time_s, start_time_s: Unix time of the snapshot and of the beginning of the worker's counting.
        model_name, engine: labels, as in vLLM's own metrics.
        rank: in the tensor-parallel group.
        layers: global index of each of the L layers of the arrays.
        head_offset: global index of the first local head.
        num_heads_total, num_layers_total: of the model.
        steps, sampled_steps: engine steps seen and measured.
        dropped_rows, errors: counts by reason and by stage.
        overhead_seconds: time spent on measuring.
        sample_rate: effective share of steps, after the overhead budget.
        layers_observed, layers_bypassed: number of this worker's layers with and without observed attention.
        reload_successful, reload_timestamp_s: of the last (re)load of the configuration.
        build: `version`, `vllm_version`, `backend`.
        trace_refused, traced_requests: numbers of requests by reason and by why.
        traced_requests_active: requests that are traced now.
        counts: int64 [L, H, 2, S, B], values per bucket, not cumulative over buckets.
        sums: float64 [L, H, 2, S].
        rows, nonfinite: int64 [L, H, 2]; rows includes the nonfinite ones.
        window_max: float32 [L, H, 2], largest logit of the last window, -inf if there was none.

    Raises:
        ValueError: if an array does not have that shape or the layers are not distinct.
    """

    instance: str
    time_s: float
    start_time_s: float
    model_name: str
    engine: str
    rank: int
    layers: tuple[int, ...]
    head_offset: int
    num_heads_total: int
    num_layers_total: int
    steps: int
    sampled_steps: int
    dropped_rows: Mapping[str, int]
    errors: Mapping[str, int]
    overhead_seconds: float
    sample_rate: float
    layers_observed: int
    layers_bypassed: int
    reload_successful: bool
    reload_timestamp_s: float
    build: Mapping[str, str]
    trace_refused: Mapping[str, int]
    traced_requests: Mapping[str, int]
    traced_requests_active: int
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    nonfinite: npt.NDArray[np.int64]
    window_max: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        heads = self.rows.shape[1] if self.rows.ndim == 3 else -1
        base = (len(self.layers), heads, len(PHASES))
        wanted = {
            "counts": (*base, NUM_STATISTICS, NUM_BUCKETS),
            "sums": (*base, NUM_STATISTICS),
            "rows": base,
            "nonfinite": base,
            "window_max": base,
        }
        for name, shape in wanted.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(found)}")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must be distinct, got {list(self.layers)}")
        if self.head_offset < 0 or self.head_offset + heads > self.num_heads_total:
            raise ValueError(
                f"heads {self.head_offset}..{self.head_offset + heads - 1} must be among the model's "
                f"{self.num_heads_total} heads"
            )


_META: Final = tuple(field.name for field in fields(Snapshot) if field.name not in _ARRAYS)


def snapshot_name(snapshot: Snapshot) -> str:
    """File name of a snapshot: one per instance, so that writing again replaces it."""
    engine, instance = (_UNSAFE.sub("_", part) for part in (snapshot.engine, snapshot.instance))
    return f"worker-{engine}-{snapshot.rank}-{instance}.npz"


def _narrow(counts: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The same counts in the smallest unsigned type: a quarter of the file, or an eighth."""
    if counts.size == 0 or counts.min() < 0:
        return counts
    return counts.astype(np.min_scalar_type(int(counts.max())))


def _encode(snapshot: Snapshot) -> bytes:
    meta: dict[str, Any] = {name: getattr(snapshot, name) for name in _META}
    for name, value in meta.items():
        if isinstance(value, Mapping):
            meta[name] = dict(value)
    text = json.dumps({"format": FORMAT_VERSION, **meta}, default=_plain)
    arrays = {name: getattr(snapshot, name) for name in _ARRAYS}
    for name in ("counts", "rows", "nonfinite"):
        arrays[name] = _narrow(arrays[name])
    buffer = io.BytesIO()
    np.savez(buffer, meta=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """JSON for the numpy scalars that counters easily become."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a snapshot cannot hold {type(value).__name__}")


def write_snapshot(run_dir: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot: a reader sees the old file or the new one, never a part.

    Returns:
        The path of the file.

    Raises:
        OSError: if it cannot be written (disk full, no permission). No temporary file is left behind, and an
            older file of the same worker stays.
    """
    path = Path(run_dir) / snapshot_name(snapshot)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, _encode(snapshot))
    return path


def _decode(data: bytes) -> Snapshot:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in _ARRAYS}
        meta = json.loads(bytes(archive["meta"]).decode())
    if meta.pop("format", None) != FORMAT_VERSION:
        raise ValueError(f"format must be {FORMAT_VERSION}")
    dtypes = {"sums": np.float64, "window_max": np.float32}
    for name, array in arrays.items():
        arrays[name] = array.astype(dtypes.get(name, np.int64), copy=False)
    meta["layers"] = tuple(int(layer) for layer in meta["layers"])
    return Snapshot(**meta, **arrays)


class SnapshotReader:
    """Reads all snapshots of a run directory; a file is parsed again only when it was replaced.

    Attributes:
        unreadable: how many file versions could not be read so far (each counts once).
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._cache: dict[str, tuple[FileVersion, Snapshot | None]] = {}
        self.unreadable = 0

    def versions(self) -> dict[str, FileVersion]:
        """Name and version of every snapshot file; empty if there is no directory."""
        versions: dict[str, FileVersion] = {}
        try:
            with os.scandir(self._run_dir) as entries:
                for entry in entries:
                    if entry.name.startswith("worker-") and entry.name.endswith(".npz"):
                        with contextlib.suppress(FileNotFoundError):  # went between listing and stat
                            stat = entry.stat()
                            versions[entry.name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            return {}
        return versions

    def read(self, versions: Mapping[str, FileVersion] | None = None) -> list[Snapshot]:
        """All readable snapshots, in the order of their file names.

        Args:
            versions: what `versions()` said, if the caller asked already.

        Raises:
            OSError: if the directory exists but may not be listed.
        """
        versions = self.versions() if versions is None else versions
        self._cache = {name: entry for name, entry in self._cache.items() if name in versions}
        for name, version in versions.items():
            if name not in self._cache or self._cache[name][0] != version:
                self._cache[name] = (version, self._load(name))
        return [entry[1] for _, entry in sorted(self._cache.items()) if entry[1] is not None]

    def _load(self, name: str) -> Snapshot | None:
        try:
            return _decode((self._run_dir / name).read_bytes())
        except FileNotFoundError:
            return None
        except Exception as error:  # garbage can fail anywhere in zip, npy, JSON or shapes
            self.unreadable += 1
            log = logger.warning if self.unreadable == 1 else logger.debug
            log("glassbox skips an unreadable snapshot file %s: %s: %s", name, type(error).__name__, error)
            return None


def read_snapshots(run_dir: Path) -> list[Snapshot]:
    """All readable snapshots of a run directory; `SnapshotReader` also counts the others."""
    return SnapshotReader(run_dir).read()
