"""The baseline: how the heads of a healthy run were distributed, as a small file.

Owns the file's format, what may stand in it, and making one of what was measured. Comparing with it is
`signals/drift_watch.py`.

The file is a NumPy archive (npz, compressed, no pickles) with the arrays `counts`, `sums` and `rows` and, as UTF-8 JSON
in `meta`, all other fields of `Baseline` plus `format` (`glassbox-baseline`), `format_version`, and `buckets`: the
bounds of each statistic, so that a file that was made with other buckets is refused and not misread.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from glassbox.core.accumulator_arrays import ARRAY, check_shapes, narrowed
from glassbox.core.files import ForeignFileError, open_own, open_regular, write_atomically
from glassbox.core.printable import printable
from glassbox.core.statistics import STATISTICS
from glassbox.store.merge import MergedEngine

FORMAT: Final = "glassbox-baseline"
FORMAT_VERSION: Final = 1
# 128 layers of 128 heads are 28 MB before compression; a file that unpacks to much more is none of ours.
MAX_BYTES: Final = 1 << 28
# Of seconds: the year 5138, the last that can be shown.
_MAX_NUMBER: Final = 1e11
# Of the accumulators' arrays those that tell how the rows of a head were distributed.
ARRAYS: Final = ("counts", "sums", "rows")


class BaselineError(ValueError):
    """A baseline can't be made, read or compared; the message is one line that says why and what to do."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """Distribution of every head over a run.

    With L layers, H heads, S = NUM_STATISTICS and B = NUM_BUCKETS; phases in the order of PHASES.

    Attributes:
        model_name: as it was served.
        num_layers: of the model; None if not known.
        num_heads: query heads of the model.
        layers: global index of each of the L layers of the arrays, ascending.
        build: `version`, `vllm_version`, `backend`, as far as known.
        time_s: Unix time at which it was taken; duration_s: of the run up to then, None if not known.
        source: where it was taken from.
        sink_tokens, local_window: of the configuration; None if not known.
        counts: int64 [L, H, 2, S, B], rows per bucket (not cumulative).
        sums: float64 [L, H, 2, S]; NaN where not known.
        rows: int64 [L, H, 2].

    Raises:
        ValueError: if an array does not have that shape, or a number is impossible.
    """

    model_name: str
    num_layers: int | None
    num_heads: int
    layers: tuple[int, ...]
    build: Mapping[str, str]
    time_s: float
    duration_s: float | None
    source: str
    sink_tokens: int | None
    local_window: int | None
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must not be empty")
        check_shapes(self, ARRAYS, len(self.layers), self.num_heads)
        above = self.num_layers if self.num_layers is not None else max(self.layers, default=0) + 1
        if list(self.layers) != sorted(set(self.layers)) or any(not 0 <= layer < above for layer in self.layers):
            raise ValueError(f"layers must be ascending and below {above}, got {list(self.layers)}")
        if (self.counts < 0).any() or (self.rows < 0).any():
            raise ValueError("counts and rows must not be negative")


_META: Final = tuple(field.name for field in fields(Baseline) if field.name not in ARRAYS)


def _buckets() -> dict[str, list[float]]:
    return {statistic.name: list(statistic.buckets) for statistic in STATISTICS}


def from_engines(
    engines: Sequence[MergedEngine],
    source: str,
    *,
    sink_tokens: int | None = None,
    local_window: int | None = None,
) -> Baseline:
    """What the engines of one server have measured so far, added up.

    Raises:
        BaselineError: there is no engine, none has measured a row, or they serve different models.
    """
    measured = [engine for engine in engines if engine.rows.sum()]
    if not measured:
        raise BaselineError(f"{source} has no measured rows; send some requests, and see that sample_rate is above 0")
    first = measured[0]
    shapes = {(engine.model_name, engine.num_layers, engine.num_heads, engine.layers) for engine in measured}
    if len(shapes) > 1:
        names = ", ".join(sorted({engine.model_name for engine in measured}))
        raise BaselineError(f"{source} has engines of different models ({names}); name that of one server")
    return Baseline(
        model_name=first.model_name,
        num_layers=first.num_layers,
        num_heads=first.num_heads,
        layers=first.layers,
        build=dict(first.build),
        time_s=max(engine.time_s for engine in measured),
        duration_s=max(engine.time_s - engine.start_time_s for engine in measured),
        source=source,
        sink_tokens=sink_tokens,
        local_window=local_window,
        **{name: np.sum([getattr(engine, name) for engine in measured], axis=0) for name in ARRAYS},
    )


def save_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file; it replaces an older one at once or not at all.

    Raises:
        OSError: it can't be written.
    """
    meta = {"format": FORMAT, "format_version": FORMAT_VERSION, "buckets": _buckets()}
    meta |= {name: getattr(baseline, name) for name in _META}
    meta["build"] = dict(baseline.build)
    arrays: dict[str, Any] = {name: narrowed(getattr(baseline, name)) for name in ARRAYS}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
    write_atomically(Path(path), buffer.getvalue())


def load_baseline(path: Path, *, own: bool = False) -> Baseline:
    """Read a file of `save_baseline`.

    Args:
        own: no other user may have written it: alerts follow what a server compares with.

    Raises:
        BaselineError: it is missing or can't be read, is no baseline, or was made by a glassbox whose statistics or
            buckets differ.
    """
    remedy = "save one with `glassbox baseline save`"
    try:
        # Not a pipe or a device, which could block whoever scrapes.
        if not os.path.isfile(path):
            what = "is no file" if os.path.lexists(path) else "does not exist"
            raise BaselineError(f"baseline {path} {what}; {remedy}")
        if (packed := os.path.getsize(path)) > MAX_BYTES:
            raise BaselineError(f"baseline {path} must have at most {MAX_BYTES} bytes, got {packed}; {remedy}")
        with (open_own if own else open_regular)(path, MAX_BYTES) as file:
            with zipfile.ZipFile(file) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES:
                raise BaselineError(f"baseline {path} must unpack to at most {MAX_BYTES} bytes, got {size}; {remedy}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                meta = json.loads(bytes(archive["meta"]).decode())
                _check_meta(path, meta, remedy)
                arrays = {name: archive[name] for name in ARRAYS}
        if any(array.dtype.kind not in "iuf" for array in arrays.values()):
            raise BaselineError(f"baseline {path} has arrays that are no numbers; {remedy}")
        if not (np.isfinite(arrays["counts"]).all() and np.isfinite(arrays["rows"]).all()):
            raise BaselineError(f"baseline {path} has counts that are no numbers; {remedy}")
        arrays = {name: array.astype(ARRAY[name].dtype) for name, array in arrays.items()}
        return Baseline(
            **{**{name: meta[name] for name in _META}, "layers": tuple(int(layer) for layer in meta["layers"])},
            **arrays,
        )
    except BaselineError:
        raise
    except ForeignFileError as error:
        raise BaselineError(f"baseline {path} {error}") from None
    except OSError as error:
        raise BaselineError(
            f"baseline {path} can't be read ({error.strerror or error}); check its permissions"
        ) from None
    except Exception as error:  # garbage can fail anywhere in zip, npy, JSON or shapes
        detail = printable(" ".join(str(error).split())[:200])
        raise BaselineError(f"baseline {path} is no file of glassbox ({detail}); {remedy}") from None


def _check_meta(path: Path, meta: Any, remedy: str) -> None:
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise BaselineError(f"baseline {path} is no file of glassbox (no format {FORMAT}); {remedy}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise BaselineError(
            f"baseline {path} must have format_version {FORMAT_VERSION}, got {meta.get('format_version')}; "
            f"{remedy} of the same version"
        )
    # Names are shown, in logs and terminals: whatever they are, they give no orders there.
    meta["model_name"], meta["source"] = printable(str(meta["model_name"])), printable(str(meta["source"]))
    meta["build"] = {printable(str(name)): printable(str(value)) for name, value in dict(meta["build"]).items()}
    for name in ("time_s", "duration_s", "num_layers", "num_heads", "sink_tokens", "local_window"):
        number = meta[name]
        if number is not None and not (type(number) in {int, float} and 0 <= number <= _MAX_NUMBER):
            raise BaselineError(f"baseline {path} must have a number from 0 as {name}, got {number!r:.40}; {remedy}")
    if meta.get("buckets") != _buckets():
        raise BaselineError(f"baseline {path} was made with other statistics or buckets; {remedy} of the same version")
