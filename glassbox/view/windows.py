"""Reads a run from the JSON lines that `export.jsonl` writes (`glassbox.export.jsonl`).

Owns which lines belong together: those of several engines, of rotated files, and of details that changed in
between. A line that can't be read is left out and counted: a killed exporter leaves one behind.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Final

from glassbox.core.statistics import INDEX, NUM_BUCKETS, PHASES, Phase
from glassbox.store.merge import DETAILS, Detail
from glassbox.view.measured import Engines, Measured, ViewError, empty_arrays, places

MAX_WINDOWS: Final = 240
# At detail head a stage of a model of 80 layers x 64 heads is 9 MB.
MAX_STAGES: Final = 8


@dataclass(frozen=True, eq=False)
class Run:
    """What the lines of some files say.

    Attributes:
        total: all windows added.
        stages: up to 8 parts of it, in the order of time, at the same detail.
        windows: up to 240 parts, in the order of time, at detail layer (or model).
        lines: that were read; unreadable: that were not; coarser: left out, because others have a finer detail.
    """

    total: Measured
    stages: tuple[Measured, ...]
    windows: tuple[Measured, ...]
    lines: int
    unreadable: int
    coarser: int


def read_run(paths: Sequence[Path], engine: str | None = None) -> Run:
    """Add up all windows of the files, in whatever order they are given.

    Args:
        paths: of one run: the file, and those it was rotated to.
        engine: only this one; None adds all.

    Raises:
        ViewError: a file can't be read, none of the lines is a window, or they are of several models.
    """
    reader = _Reader(", ".join(str(path) for path in paths))
    for path in sorted(paths, key=_first_time):
        for line in _lines(path):
            reader.take(line, engine)
    return reader.result()


class _Parts:
    """Consecutive windows; neighbours are added where there would be too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._parts: list[Measured] = []

    def add(self, window: Measured) -> None:
        last = self._parts[-1] if self._parts else None
        if (
            last is not None
            and not set(window.engine_names) & set(last.engine_names)
            and window.time_s - (window.window_s or 0.0) < last.time_s
        ):
            # Of another engine and of the same time.
            self._parts[-1] = last.plus(window)
            return
        self._parts.append(window)
        if len(self._parts) > 2 * self._most:
            self._halve()

    def result(self) -> tuple[Measured, ...]:
        if len(self._parts) > self._most:
            self._halve()
        return tuple(self._parts)

    def _halve(self) -> None:
        parts = self._parts
        pairs = [first.plus(second) for first, second in zip(parts[::2], parts[1::2], strict=False)]
        self._parts = pairs + parts[len(pairs) * 2 :]


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source
        self._first: Measured | None = None
        self._detail: Detail = "model"
        self._stages, self._windows = _Parts(MAX_STAGES), _Parts(MAX_WINDOWS)
        self._engines: set[str] = set()
        self._lines = self._unreadable = self._coarser = 0

    def take(self, line: str, engine: str | None) -> None:
        try:
            window = _window(json.loads(line), self._source)
        except ViewError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            self._unreadable += 1
            return
        self._engines.update(window.engine_names)
        if engine not in (None, *window.engine_names):
            return
        if self._first is None:
            self._first, self._detail = window, window.detail
        if window.model_name != self._first.model_name:
            models = f"{self._first.model_name} and {window.model_name}"
            raise ViewError(f"{self._source} is of several models ({models}); give the files of one")
        finer = DETAILS.index(window.detail) - DETAILS.index(self._detail)
        self._lines += 1
        if finer < 0:
            self._coarser += 1
            return
        if finer > 0:
            # What came before doesn't tell the places apart that this does.
            self._coarser, self._detail = self._lines - 1, window.detail
            self._stages, self._windows = _Parts(MAX_STAGES), _Parts(MAX_WINDOWS)
        self._stages.add(window)
        self._windows.add(window.coarser("model" if window.detail == "model" else "layer"))

    def result(self) -> Run:
        stages = self._stages.result()
        if not stages:
            if self._engines:
                raise ViewError(f"{self._source} has no such engine; it has {', '.join(sorted(self._engines))}")
            what = f"{self._unreadable} lines, none of them a window" if self._unreadable else "no lines"
            raise ViewError(f"{self._source} has {what}; give a file that export.jsonl.path named in the server's YAML")
        total = reduce(Measured.plus, stages)
        return Run(total, stages, self._windows.result(), self._lines, self._unreadable, self._coarser)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (line for line in file if not line.isspace())
    except OSError as error:
        raise ViewError(f"can't read {path}: {error.strerror or error}; give a file of export.jsonl") from None


def _first_time(path: Path) -> float:
    for line in _lines(path):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0


def _window(line: dict[str, Any], source: str) -> Measured:
    """One line; KeyError, ValueError or TypeError if it is none."""
    detail: Detail = line["detail"]
    if detail not in DETAILS:
        raise ValueError(detail)
    layers, heads = places((place.get("layer"), place.get("head")) for place in line["places"])
    arrays = empty_arrays(len(layers), len(heads))
    for place in line["places"]:
        at = layers.index(place.get("layer")), heads.index(place.get("head")), PHASES.index(Phase(place["phase"]))
        arrays["rows"][at] = place["rows"]
        arrays["nonfinite"][at] = place["nonfinite"]
        if place["max_logit_max"] is not None:
            arrays["window_max"][at] = place["max_logit_max"]
        for name, numbers in place["statistics"].items():
            if name not in INDEX:
                continue
            buckets = numbers["buckets"]
            if len(buckets) != NUM_BUCKETS:
                raise ViewError(
                    f"{source} has {len(buckets)} buckets of {name}, this glassbox has {NUM_BUCKETS}; "
                    "use the glassbox that wrote it"
                )
            arrays["counts"][(*at, INDEX[name])] = buckets
            # JSON has no infinity: such a sum was written as null.
            mean = numbers["mean"]
            arrays["sums"][(*at, INDEX[name])] = float("nan") if mean is None else mean * numbers["count"]
    return Measured(
        source=source,
        model_name=str(line["model_name"]),
        engine_names=(str(line["engine"]),),
        time_s=float(line["time"]),
        window_s=float(line["window_s"]),
        detail=detail,
        layers=layers,
        heads=heads,
        engines=replace(
            Engines(),
            steps=float(line["steps"]),
            sampled_steps=float(line["sampled_steps"]),
            sample_rate=float(line["sample_rate"]),
        ),
        **arrays,
    )
