"""Reads a run from the JSON lines that `export.jsonl` writes (`glassbox.export.jsonl`).

Owns which lines belong together: those of several engines, of rotated files, and of details that changed in
between. A line that can't be read is left out and counted: a killed exporter leaves one behind. What a line says is
checked before it is believed: the file may be anybody's.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Final

from glassbox.core.statistics import INDEX, NUM_BUCKETS, PHASES, Phase
from glassbox.store.merge import DETAILS, Detail
from glassbox.view.input_file import open_file
from glassbox.view.measured import (
    Engines,
    Measured,
    ViewError,
    check_numbers,
    checked_name,
    empty_arrays,
    places,
)

MAX_WINDOWS: Final = 240
# At detail head a stage of a model of 80 layers x 64 heads is 9 MB.
MAX_STAGES: Final = 8
# At detail head a line of such a model is some 10 MB.
MAX_LINE_BYTES: Final = 64 << 20
MAX_FILE_BYTES: Final = 8 << 30
# Years 1970 to 5138: what `time` can show.
_MAX_TIME_S: Final = 1e11
# What a line is that is no window: no JSON, too deep, without the keys, with values of other kinds.
_NO_WINDOW: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)


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
        except _NO_WINDOW:
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
    """The lines of a file that are not blank; of a line that is too long nothing but that there is one."""
    with open_file(path, MAX_FILE_BYTES, "give a file of export.jsonl") as file:
        try:
            while line := file.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                        pass
                    yield "too long"
                elif not line.isspace():
                    yield line.decode("utf-8", errors="replace")
        except OSError as error:
            raise ViewError(f"can't read {path}: {error.strerror or error}; give a file of export.jsonl") from None


def _first_time(path: Path) -> float:
    for line in _lines(path):
        try:
            return float(json.loads(line)["time"])
        except _NO_WINDOW:
            continue
    return 0.0


def _window(line: dict[str, Any], source: str) -> Measured:
    """One line; KeyError, ValueError or TypeError if it is none."""
    detail: Detail = line["detail"]
    if detail not in DETAILS:
        raise ValueError(detail)
    layers, heads = places((_index(place.get("layer")), _index(place.get("head"))) for place in line["places"])
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
            total = math.nan if mean is None else float(mean) * float(numbers["count"])
            arrays["sums"][(*at, INDEX[name])] = total
    check_numbers(arrays)
    return Measured(
        source=source,
        model_name=checked_name(str(line["model_name"])),
        engine_names=(checked_name(str(line["engine"])),),
        time_s=_number(line["time"], _MAX_TIME_S),
        window_s=_number(line["window_s"], _MAX_TIME_S),
        detail=detail,
        layers=layers,
        heads=heads,
        engines=replace(
            Engines(),
            steps=_number(line["steps"]),
            sampled_steps=_number(line["sampled_steps"]),
            sample_rate=_number(line["sample_rate"]),
        ),
        **arrays,
    )


def _number(value: Any, most: float = 1e18) -> float:
    """A number from 0 to `most`; ValueError if it is none."""
    number = float(value)
    if not 0 <= number <= most:
        raise ValueError(number)
    return number


def _index(value: Any) -> int | None:
    """Of a layer or a head; ValueError if it is none."""
    if value is None or (type(value) is int and 0 <= value < 1 << 31):
        return value
    raise ValueError(value)
