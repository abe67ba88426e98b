"""Snapshot files: what one worker process has measured since it started.

Owns the file format and its reading and writing; what several snapshots mean together is `merge.py`. A
snapshot is cumulative, so the newest file of a worker replaces its older one and a lost file loses nothing
but time.
"""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, cast

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
from glassbox.core.counters import ENGINE_NUMBER, EngineValue
from glassbox.core.files import FileVersion, file_versions, write_atomically
from glassbox.core.logs import get_logger
from glassbox.core.output_checks import LAYER_CHECK_DTYPES, LayerChecks

logger = get_logger(__name__)

FORMAT_VERSION: Final = 6
_CHECKS: Final = "checks_"  # before the names of the arrays of LayerChecks in a file
_ADAPTERS: Final = "adapters_"  # likewise of AdapterArrays, if it has those
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.]")


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
        instance: unique per start of a worker process.
        rank: in the tensor-parallel group.
        layer_heads: local heads of each layer; the arrays hold nothing of those that it hasn't.
        head_offsets: global index of the first local head of each layer.
        sampled_layers: those of the layers that are measured, as `sampling.layers` chooses.
        num_heads_total, num_layers_total: of the model.
        host: name of the machine.
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
    engine, instance = (_UNSAFE.sub("_", part) for part in (snapshot.engine, snapshot.instance))
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
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, _encode(snapshot))
    return path


def _decode(data: bytes) -> Snapshot:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        meta = json.loads(bytes(archive["meta"]).decode())
        if meta.pop("format", None) != FORMAT_VERSION:
            raise ValueError(f"format must be {FORMAT_VERSION}")
        arrays = {name: archive[name].astype(entry.dtype, copy=False) for name, entry in ARRAY.items()}
        checks: dict[str, Any] = {
            name: archive[_CHECKS + name].astype(dtype, casting="same_kind", copy=False)
            for name, dtype in LAYER_CHECK_DTYPES.items()
        }
        by_adapter: dict[str, Any] = {
            name: archive[_ADAPTERS + name].astype(ARRAY[name].dtype, copy=False)
            for name in CUMULATIVE_ARRAYS
            if _ADAPTERS + name in archive
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

    Attributes:
        unreadable: how many file versions could not be read so far (each counts once).
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._cache: dict[str, tuple[FileVersion, Snapshot | None]] = {}
        self.unreadable = 0

    def versions(self) -> dict[str, FileVersion]:
        """Name and version of every snapshot file; empty if there is no directory."""
        return file_versions(self._run_dir, "worker-", ".npz")

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
