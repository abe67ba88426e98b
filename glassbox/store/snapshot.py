"""Snapshot files: what one worker process has measured since it started.

Owns the file format and its reading and writing; what several snapshots mean together is `merge.py`. A
snapshot is cumulative, so the newest file of a worker replaces its older one and a lost file loses nothing
but time.
"""

import io
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np

from glassbox.core.accumulator_arrays import (
    ARRAY,
    CUMULATIVE_ARRAYS,
    AccumulatorArrays,
    AdapterArrays,
    check_shapes,
    narrowed,
)
from glassbox.core.adapter_slots import num_slots
from glassbox.core.array_file import ArrayFile
from glassbox.core.counters import ENGINE_NUMBER, EngineValue
from glassbox.core.files import FileVersion
from glassbox.core.logs import get_logger
from glassbox.core.output_checks import LAYER_CHECK_DTYPES, LayerChecks
from glassbox.store.file_cache import FileCache
from glassbox.store.file_names import clean
from glassbox.store.process_name import is_dead
from glassbox.store.trusted_file import list_files, make_folder, open_file, write_file

logger = get_logger(__name__)

FORMAT_VERSION: Final = 7
_CHECKS: Final = "checks_"  # before the names of the arrays of LayerChecks in a file
_ADAPTERS: Final = "adapters_"  # likewise of AdapterArrays, if it has those
# 80 layers of 64 heads take 2 to 20 MB, by how large their counts are.
MAX_BYTES: Final = 1 << 28
# Merging makes room for every head of the model, so few bytes must not be able to ask for very many.
_MOST_PLACES: Final = 1 << 18
# A worker writes at least every 15 s: after so long a dead one is no engine that ends just now.
_DEAD_AFTER_S: Final = 60.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Totals(AccumulatorArrays):
    """What was measured and counted since `start_time_s`, by one worker (`Snapshot`) or by all of an engine.

    Attributes:
        model_name, engine: labels, as in vLLM's own metrics.
        time_s, start_time_s: Unix time of the newest number and of the beginning of the counting.
        layers: global index of each of the L layers of the arrays.
        numbers: those of the table of engine numbers, by name.
    """

    model_name: str
    engine: str
    time_s: float
    start_time_s: float
    layers: tuple[int, ...]
    numbers: Mapping[str, EngineValue]

    @property
    def steps(self) -> int:
        """Engine steps seen."""
        return cast(int, self.numbers["steps"])

    @property
    def sampled_steps(self) -> int:
        """Engine steps of which rows were measured."""
        return cast(int, self.numbers["sampled_steps"])

    @property
    def build(self) -> Mapping[str, str]:
        """Versions and the observed backend: `version`, `vllm_version`, `backend`."""
        return cast(Mapping[str, str], self.numbers["build"])


@dataclass(frozen=True, eq=False, kw_only=True)
class Snapshot(Totals):
    """Everything one worker process has measured since it started (cumulative); H is its largest number of local heads.

    Attributes:
        instance: unique per start of a worker; begins with its process's name (process_name.py), if that is known.
        rank: in the tensor-parallel group.
        layer_heads: local heads of each layer; the arrays hold nothing of those that it hasn't.
        head_offsets: global index of the first local head of each layer.
        sampled_layers: those of the layers that are measured, as `sampling.layers` chooses.
        num_heads_total, num_layers_total: of the model.
        host: name of the machine.
        interval_s: seconds after which it writes again, at the latest: `export.interval_s` of the moment.
        first_nonfinite_layer: global index of the first layer, in the model's order, that had non-finite rows lately;
            None if none had.
        checks: what the checks of the layers' outputs found.
        by_adapter: the same rows by slot of their LoRA adapters; None if they are not told apart.
        adapters: names of the slots after the first, as far as they have any.

    Raises:
        ValueError: if an array does not have that shape, the layers are not distinct, or the numbers are not those of
            the table.
    """

    instance: str
    rank: int
    layer_heads: tuple[int, ...]
    head_offsets: tuple[int, ...]
    sampled_layers: tuple[int, ...]
    num_heads_total: int
    num_layers_total: int
    host: str
    interval_s: float
    first_nonfinite_layer: int | None
    checks: LayerChecks
    by_adapter: AdapterArrays | None = None
    adapters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        heads = self.rows.shape[1] if self.rows.ndim == 3 else -1
        check_shapes(self, ARRAY, len(self.layers), heads)
        if len(self.checks.state) != len(self.layers):
            raise ValueError(f"checks must be of {len(self.layers)} layers, got {len(self.checks.state)}")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must be distinct, got {list(self.layers)}")
        if not len(self.layer_heads) == len(self.head_offsets) == len(self.layers):
            raise ValueError(f"layer_heads and head_offsets must be of {len(self.layers)} layers")
        for layer, offset, of_layer in zip(self.layers, self.head_offsets, self.layer_heads, strict=True):
            if not 0 < of_layer <= heads or offset < 0 or offset + of_layer > self.num_heads_total:
                raise ValueError(
                    f"heads {offset}..{offset + of_layer - 1} of layer {layer} must be among the model's "
                    f"{self.num_heads_total} heads and the arrays' {heads}"
                )
        if len(self.layers) * self.num_heads_total > _MOST_PLACES:
            raise ValueError(
                f"{len(self.layers)} layers of {self.num_heads_total} heads must be at most {_MOST_PLACES} heads"
            )
        _check_adapters(self.by_adapter, self.adapters)
        _check_numbers(self.numbers)


def _check_adapters(arrays: AdapterArrays | None, names: tuple[str, ...]) -> None:
    slots = 0
    if arrays is not None:
        slots = len(arrays.rows)
        check_shapes(arrays, CUMULATIVE_ARRAYS, slots)
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ValueError(f"adapters must be distinct names, got {list(names)}")
    if names and num_slots(len(names)) > slots:
        raise ValueError(f"adapters must be of at most {max(slots - 2, 0)} slots of their own, got {len(names)}")


def _check_numbers(numbers: Mapping[str, object]) -> None:
    """See that these are the numbers of the table, all of them and no others.

    A missing one is not taken for 0: a worker that doesn't tell of its last reload has not failed to reload.
    """
    if numbers.keys() != ENGINE_NUMBER.keys():
        missing = ", ".join(sorted(ENGINE_NUMBER.keys() - numbers.keys())) or "none"
        unknown = ", ".join(sorted(numbers.keys() - ENGINE_NUMBER.keys())) or "none"
        raise ValueError(
            f"numbers must be those of the table of engine numbers, missing: {missing}, unknown: {unknown}; "
            "run one version of glassbox in all processes of a server"
        )
    for name, value in numbers.items():
        if not ENGINE_NUMBER[name].accepts(value):
            raise ValueError(f"{name} must be of the kind that the table of engine numbers says, got {value!r}")


_META: Final = tuple(field.name for field in fields(Snapshot) if field.name not in {*ARRAY, "checks", "by_adapter"})


def snapshot_name(snapshot: Snapshot) -> str:
    """File name of a snapshot: one per instance, so that writing again replaces it."""
    engine, instance = map(clean, (snapshot.engine, snapshot.instance))
    return f"worker-{engine}-{snapshot.rank}-{instance}.npz"


def _encode(snapshot: Snapshot) -> bytes:
    meta = {name: getattr(snapshot, name) for name in _META}
    text = json.dumps({"format": FORMAT_VERSION, **meta}, default=_plain)
    arrays: dict[str, Any] = {name: narrowed(getattr(snapshot, name)) for name in ARRAY}
    arrays |= {_CHECKS + name: narrowed(array) for name, array in vars(snapshot.checks).items()}
    if snapshot.by_adapter is not None:
        arrays |= {_ADAPTERS + name: narrowed(array) for name, array in vars(snapshot.by_adapter).items()}
    buffer = io.BytesIO()
    np.savez(buffer, meta=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """JSON for the numpy scalars that counters easily become, and for mappings of any type."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
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
    make_folder(path.parent)
    write_file(path, _encode(snapshot))
    return path


def _meta(archive: ArrayFile) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(archive.read(["meta"])["meta"].tobytes())
    if meta.pop("format", None) != FORMAT_VERSION:
        raise ValueError(f"format must be {FORMAT_VERSION}")
    return meta


def _decode(file: BinaryIO) -> Snapshot:
    archive = ArrayFile(file, MAX_BYTES)
    meta = _meta(archive)
    found = archive.read(ARRAY)
    arrays: dict[str, Any] = {name: found[name].astype(entry.dtype, copy=False) for name, entry in ARRAY.items()}
    of_checks = archive.read(_CHECKS + name for name in LAYER_CHECK_DTYPES)
    checks: dict[str, Any] = {
        name: of_checks[_CHECKS + name].astype(dtype, casting="same_kind", copy=False)
        for name, dtype in LAYER_CHECK_DTYPES.items()
    }
    kept = [name for name in CUMULATIVE_ARRAYS if _ADAPTERS + name in archive]
    of_adapters = archive.read(_ADAPTERS + name for name in kept)
    by_adapter: dict[str, Any] = {
        name: of_adapters[_ADAPTERS + name].astype(ARRAY[name].dtype, copy=False) for name in kept
    }
    meta["adapters"] = tuple(meta["adapters"])
    for name in ("layers", "layer_heads", "head_offsets", "sampled_layers"):
        meta[name] = tuple(int(number) for number in meta[name])
    return Snapshot(
        **meta,
        **arrays,
        checks=LayerChecks(**checks),
        by_adapter=AdapterArrays(**by_adapter) if by_adapter else None,
    )


class SnapshotReader:
    """Reads all snapshots of a run directory; a file is parsed again only when it was replaced.

    An engine all of whose workers have died is left out after a minute. Of a worker that died in an engine that lives
    the snapshot stays: what it counted belongs to the engine's totals.

    Attributes:
        unreadable: how many file versions could not be read so far (each counts once).

    Args:
        run_dir: of the server.
        named: it was named by whoever runs a command, and may be another user's.
        clock: Unix time in seconds.
    """

    def __init__(self, run_dir: Path, *, named: bool = False, clock: Callable[[], float] = time.time) -> None:
        self._run_dir, self._named, self._clock = Path(run_dir), named, clock
        self._files = FileCache(self._load)
        self.unreadable = 0

    def versions(self) -> dict[str, FileVersion]:
        """Name and version of every snapshot file, but for dead engines; empty if there is no directory.

        Raises:
            OSError: the directory may not be listed, or is not this user's.
        """
        versions = list_files(self._run_dir, "worker-", ".npz", named=self._named)
        self._files.keep(versions)
        dead = self._dead({name: snapshot for name, read, snapshot in self._files.items() if versions[name] == read})
        return {name: version for name, version in versions.items() if name not in dead}

    def _dead(self, snapshots: Mapping[str, Snapshot | None]) -> set[str]:
        """Those of engines that have ended."""
        if self._named:  # who names the directory of a server that has ended wants what it measured
            return set()
        engines: dict[tuple[str, str], list[str]] = {}
        old = self._clock() - _DEAD_AFTER_S
        for name, snapshot in snapshots.items():
            if snapshot is not None:
                engines.setdefault((snapshot.model_name, snapshot.engine), []).append(name)
        dead: set[str] = set()
        for names in engines.values():
            workers = [worker for name in names if (worker := snapshots[name]) is not None]
            if all(worker.time_s < old and is_dead(worker.instance) for worker in workers):
                dead.update(names)
        return dead

    def read(self, versions: Mapping[str, FileVersion] | None = None) -> list[Snapshot]:
        """All readable snapshots, in the order of their file names.

        Args:
            versions: what `versions()` said, if the caller asked already.

        Raises:
            OSError: if the directory exists but may not be listed.
        """
        versions = self.versions() if versions is None else versions
        found = {name: self._files.of(name, version) for name, version in sorted(versions.items())}
        dead = self._dead(found)
        return [snapshot for name, snapshot in found.items() if snapshot is not None and name not in dead]

    def _load(self, name: str) -> Snapshot | None:
        try:
            with open_file(self._run_dir / name, MAX_BYTES, named=self._named) as file:
                return _decode(file)
        except FileNotFoundError:
            return None
        except Exception as error:  # garbage can fail anywhere in zip, npy, JSON or shapes
            self.unreadable += 1
            log = logger.warning if self.unreadable == 1 else logger.debug
            log("glassbox skips an unreadable snapshot file %s: %s: %s", name, type(error).__name__, error)
            return None


@dataclass(frozen=True)
class EngineWorker:
    """A worker of an engine; fields as in Snapshot."""

    engine: str
    instance: str
    layers: frozenset[int]
    interval_s: float

    def traces(self, chosen: Collection[int] | None) -> bool:
        """Whether it keeps rows of a request that chose these layers, None is all: a stage of a pipeline that has none
        of them doesn't."""
        return bool(self.layers if chosen is None else self.layers.intersection(chosen))


class EngineWorkers:
    """The workers that live, by their snapshots; of each only the beginning is read, again when it was replaced.

    Args:
        run_dir: of the server.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._files = FileCache(self._read)

    def of(self, engine: str, *, at_least: int = 1) -> list[EngineWorker]:
        """Those of an engine.

        Args:
            at_least: of fewer snapshots none is read, and none of their workers returned.

        Raises:
            OSError: the directory may not be listed, or is not this user's.
        """
        versions = list_files(self._run_dir, "worker-", ".npz")
        self._files.keep(versions)
        names = [name for name in versions if name.startswith(f"worker-{clean(engine)}-")]
        if len(names) < at_least:
            return []
        found = (self._files.of(name, versions[name]) for name in names)
        return [one for one in found if one is not None and one.engine == engine and not is_dead(one.instance)]

    def _read(self, name: str) -> EngineWorker | None:
        try:
            with open_file(self._run_dir / name, MAX_BYTES) as file:
                meta = _meta(ArrayFile(file, MAX_BYTES))
            return EngineWorker(meta["engine"], meta["instance"], frozenset(meta["layers"]), float(meta["interval_s"]))
        except Exception as error:  # as with whole ones
            logger.debug("an unreadable snapshot file %s: %s: %s", name, type(error).__name__, error)
            return None


def read_snapshots(run_dir: Path, *, named: bool = False) -> list[Snapshot]:
    """All readable snapshots of a run directory; `SnapshotReader` also counts the others."""
    return SnapshotReader(run_dir, named=named).read()
