#!/usr/bin/env python3
"""Draws docs/images/rooms.svg: the rooms on their lines, and an arrow for what each imports of which other.

The lines are those of the contract in pyproject.toml, the arrows those of the imports that grimp finds, those inside of
functions and for types alone included. `--check` compares instead of writing, and fails if the picture isn't current.

Thickness comes in steps, each of them twice as many imports, so that one import more seldom changes the picture.
"""

import argparse
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Final

import grimp

ROOT: Final = Path(__file__).resolve().parents[1]
PICTURE: Final = ROOT / "docs" / "images" / "rooms.svg"

WIDTH, MARGIN, TOP = 1000, 24, 26
BOX_HEIGHT, BETWEEN = 50, 58
LANE, PORT = 12, 24  # least distance of arrows that pass, and of those that arrive at a wide box
WIDE = 400
# Where a room stands on its line (its middle), what it is in three words, and its colour on light and on dark ground.
ROOMS: Final[Mapping[str, tuple[int, int, str, str, str]]] = {
    "plugin": (640, 150, "vLLM's entry point", "#57606a", "#9aa4b0"),
    "cli": (210, 180, "commands, demo, bench", "#8250df", "#b794f6"),
    "processes": (640, 240, "worker, API server, exporter", "#0969da", "#6cb0ff"),
    "client": (120, 150, "traces, for programs", "#116329", "#7ee2a8"),
    "view": (120, 150, "a run, from outside", "#bf3989", "#f08ac0"),
    "web": (380, 160, "HTTP answers, pages", "#9a6700", "#d8a530"),
    "export": (380, 190, "Prometheus, OTLP, files", "#1a7f37", "#4fc46a"),
    "signals": (250, 170, "numbers of many rows", "#bc4c00", "#f59257"),
    "adapter": (770, 190, "the room that knows vLLM", "#cf222e", "#ff8982"),
    "store": (330, 190, "what processes leave", "#0e7490", "#45c4dc"),
    "config": (570, 160, "the YAML, followed", "#6639ba", "#a99bf5"),
    "measure": (830, 180, "which rows, into what", "#4d7c0f", "#a3c94f"),
    "kernels": (830, 180, "one operation a stem", "#9f3d5e", "#ef93b4"),
    "core": (500, 940, "tables, histograms, errors, logs, files, this machine", "#57606a", "#9aa4b0"),
}
# Thickness of an arrow that stands for at least so many imports.
STEPS: Final = ((1, 1.2), (2, 1.9), (4, 2.9), (8, 4.2), (16, 6.0))
_STYLE: Final = """
    .ground { fill: #ffffff; stroke: #d1d9e0; }
    .line { stroke: #eaeef2; }
    .box { fill: #f6f8fa; stroke-width: 1.6; }
    .name { fill: #1f2328; font: 600 16px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
    .what, .note { fill: #59636e; font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
    text { text-anchor: middle; }
    .note { text-anchor: start; }
    .way { fill: none; stroke-opacity: .62; }
    .halo { fill: none; stroke: #ffffff; stroke-opacity: .85; }
"""
_DARK: Final = """
      .ground { fill: #0d1117; stroke: #3d444d; }
      .line { stroke: #1c222b; }
      .box { fill: #161b22; }
      .name { fill: #f0f6fc; }
      .what, .note { fill: #9198a1; }
      .way { stroke-opacity: .72; }
      .halo { stroke: #0d1117; }
"""


@dataclass
class Arrow:
    """Imports of one room by another.

    Attributes:
        start, end: the rooms.
        imports: how many modules of the one are imported by how many of the other, as pairs.
        lanes: x by line, where it leaves, passes and arrives.
    """

    start: str
    end: str
    imports: int
    lanes: dict[int, float] = field(default_factory=dict)

    @property
    def thickness(self) -> float:
        return next(width for least, width in reversed(STEPS) if self.imports >= least)


def lines_of_contract() -> list[list[str]]:
    """The layers of the contract `rooms`, top line first.

    Raises:
        SystemExit: a room of the contract has no place in the picture yet.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (entry for entry in settings["contracts"] if entry["id"] == "rooms")
    lines = [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
    if unknown := {room for line in lines for room in line} ^ set(ROOMS):
        raise SystemExit(
            f"rooms in one of pyproject.toml and ROOMS of this script only: {sorted(unknown)}; name them in both"
        )
    return [sorted(line, key=lambda room: ROOMS[room][0]) for line in lines]


def imports_between(rooms: Sequence[str]) -> Counter[tuple[str, str]]:
    """How many modules of a room (importer first) import how many of another, as pairs."""
    graph = grimp.build_graph("glassbox", "glassbox.kernels", cache_dir=None)
    found: Counter[tuple[str, str]] = Counter()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = tuple(f"{module}.".split(".")[1] for module in (importer, imported))
            # What the package itself has, its version and `capture`, is of no room.
            if pair[0] != pair[1] and set(pair) <= set(rooms):
                found[pair[0], pair[1]] += 1
    return found


class Drawing:
    """Boxes and arrows with their places.

    An arrow leaves the lower edge of a box, passes each line between through a gap beside the boxes there, and arrives
    at the upper edge of the other. In a gap and at an edge arrows are ordered by where they come from and go to.
    """

    def __init__(self, lines: Sequence[Sequence[str]], imports: Mapping[tuple[str, str], int]) -> None:
        self.lines = lines
        self._line_of = {room: number for number, line in enumerate(lines) for room in line}
        self.arrows = [Arrow(start, end, count) for (start, end), count in sorted(imports.items())]
        for arrow in self.arrows:
            if self._line_of[arrow.start] >= self._line_of[arrow.end]:
                raise SystemExit(f"{arrow.start} imports {arrow.end}, which is not below it: see `lint-imports`")
            self._find_gaps(arrow)
        for number in range(len(lines)):
            self._spread_gaps(number)
        for room in self._line_of:
            self._spread_ports(room)

    def top(self, number: int) -> int:
        """y of a line's boxes."""
        return TOP + number * (BOX_HEIGHT + BETWEEN)

    def box(self, room: str) -> tuple[float, float]:
        """Left and right edge."""
        middle, width = ROOMS[room][:2]
        return middle - width / 2, middle + width / 2

    def _gaps(self, number: int) -> list[tuple[float, float]]:
        edges = [MARGIN, *(edge for room in self.lines[number] for edge in self.box(room)), WIDTH - MARGIN]
        return [(left + LANE, right - LANE) for left, right in zip(edges[::2], edges[1::2], strict=True)]

    def _find_gaps(self, arrow: Arrow) -> None:
        """The gap nearest to the straight way, for each line between; x is the nearest place in it."""
        first, last = self._line_of[arrow.start], self._line_of[arrow.end]
        begin, end = float(ROOMS[arrow.start][0]), self._arrival(arrow)
        for number in range(first + 1, last):
            wanted = begin + (end - begin) * (number - first) / (last - first)
            gaps = [gap for gap in self._gaps(number) if gap[1] - gap[0] >= LANE]
            nearest = min(gaps, key=lambda gap: max(gap[0] - wanted, wanted - gap[1], 0))
            begin = arrow.lanes[number] = min(max(wanted, nearest[0]), nearest[1])
            first = number

    def _arrival(self, arrow: Arrow) -> float:
        """A wide box is met where one is; others in the middle."""
        left, right = self.box(arrow.end)
        return min(max(ROOMS[arrow.start][0], left + 40), right - 40) if right - left > WIDE else (left + right) / 2

    def _spread_gaps(self, number: int) -> None:
        for left, right in self._gaps(number):
            inside = [arrow for arrow in self.arrows if left <= arrow.lanes.get(number, -1) <= right]
            inside.sort(
                key=lambda arrow: (arrow.lanes[number], ROOMS[arrow.start][0] + self._arrival(arrow), arrow.start)
            )
            wanted = [arrow.lanes[number] for arrow in inside]
            for arrow, x in zip(inside, spread(wanted, left, right, LANE), strict=True):
                arrow.lanes[number] = x

    def _spread_ports(self, room: str) -> None:
        line = self._line_of[room]
        left, right = self.box(room)
        for arrows, step in (
            ([arrow for arrow in self.arrows if arrow.start == room], 1),
            ([arrow for arrow in self.arrows if arrow.end == room], -1),
        ):

            def beyond(arrow: Arrow, step: int = step) -> float:
                """Where it is one line further."""
                return arrow.lanes.get(line + step, ROOMS[arrow.end if step > 0 else arrow.start][0])

            arrows.sort(key=lambda arrow: (beyond(arrow), arrow.start, arrow.end))
            wide = right - left > WIDE
            even = [left + (right - left) * (n + 1) / (len(arrows) + 1) for n in range(len(arrows))]
            wanted = [beyond(arrow) for arrow in arrows] if wide else even
            for arrow, x in zip(arrows, spread(wanted, left + 14, right - 14, PORT if wide else LANE), strict=True):
                arrow.lanes[line] = x

    def points(self, arrow: Arrow) -> Iterator[tuple[float, float, float]]:
        """x, and from which to which y the arrow goes straight down there."""
        first, last = self._line_of[arrow.start], self._line_of[arrow.end]
        for number in range(first, last + 1):
            top = self.top(number)
            upper = top + BOX_HEIGHT if number == first else top
            lower = top if number == last else top + BOX_HEIGHT
            yield arrow.lanes[number], upper, lower


def spread(wanted: Sequence[float], left: float, right: float, apart: float) -> list[float]:
    """Places in the same order, near the wanted ones and apart from each other, as far as there is room."""
    apart = min(apart, (right - left) / max(len(wanted) - 1, 1))
    places: list[float] = []
    for x in wanted:
        places.append(max(x, places[-1] + apart) if places else max(x, left))
    limit = right
    for at in range(len(places) - 1, -1, -1):
        places[at] = min(places[at], limit)
        limit = places[at] - apart
    return places


def svg(lines: Sequence[Sequence[str]], imports: Mapping[tuple[str, str], int]) -> str:
    """The picture as text; the same for the same lines and imports."""
    drawing = Drawing(lines, imports)
    height = drawing.top(len(lines)) - BETWEEN + 58
    colours = "".join(f"    .{room} {{ stroke: {place[3]}; --own: {place[3]}; }}\n" for room, place in ROOMS.items())
    dark = "".join(f"      .{room} {{ stroke: {place[4]}; --own: {place[4]}; }}\n" for room, place in ROOMS.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title">',
        '  <title id="title">The rooms of glassbox on their lines; what a room imports is below it</title>',
        f"  <style>{_STYLE}{colours}    .tip {{ fill: var(--own); stroke: none; }}",
        f"    @media (prefers-color-scheme: dark) {{{_DARK}{dark}    }}\n  </style>",
        f'  <rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
    ]
    for number in range(len(lines)):
        y = drawing.top(number) + BOX_HEIGHT // 2
        parts.append(f'  <path class="line" d="M{MARGIN} {y}H{WIDTH - MARGIN}"/>')
    # The thick ones first: a thin one that crosses them is seen.
    for arrow in sorted(drawing.arrows, key=lambda arrow: (-arrow.thickness, arrow.start, arrow.end)):
        parts.extend(_arrow(drawing, arrow))
    for number, line in enumerate(lines):
        for room in line:
            parts.extend(_box(drawing, room, drawing.top(number)))
    parts.extend(_legend(height - 26))
    return "\n".join([*parts, "</svg>", ""])


def _arrow(drawing: Drawing, arrow: Arrow) -> Iterator[str]:
    tip = 5 + 1.1 * arrow.thickness
    points = list(drawing.points(arrow))
    x, _, y = points[0]
    way = [f"M{x:.1f} {y:.0f}"]
    for number, (to_x, upper, lower) in enumerate(points[1:], start=2):
        end = upper - tip if number == len(points) else upper
        bend = (end - y) * 0.55
        way.append(f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {end - bend:.1f} {to_x:.1f} {end:.1f}")
        if number < len(points):
            way.append(f"V{lower:.0f}")
        x, y = to_x, lower
    shape, half = "".join(way), 3 + 0.8 * arrow.thickness
    yield f'  <path class="halo" stroke-width="{arrow.thickness + 2.4:.1f}" d="{shape}"/>'
    said = f"{arrow.start} imports {arrow.end}"
    yield f'  <path class="way {arrow.start}" stroke-width="{arrow.thickness}" d="{shape}"><title>{said}</title></path>'
    yield f'  <path class="{arrow.start} tip" d="M{x:.1f} {y:.0f}l{-half:.1f} {-tip - 1:.1f}h{2 * half:.1f}z"/>'


def _box(drawing: Drawing, room: str, top: int) -> Iterator[str]:
    left, right = drawing.box(room)
    middle = (left + right) / 2
    size = f'width="{right - left:.0f}" height="{BOX_HEIGHT}"'
    yield f'  <rect class="box {room}" x="{left:.0f}" y="{top}" {size} rx="7"/>'
    yield f'  <text class="name" x="{middle:.0f}" y="{top + 22}">{room}</text>'
    yield f'  <text class="what" x="{middle:.0f}" y="{top + 39}">{escape(ROOMS[room][2], quote=False)}</text>'


def _legend(y: int) -> Iterator[str]:
    said = "An arrow is coloured as the room that imports. Imports, by modules:"
    yield f'  <text class="note" x="{MARGIN + 6}" y="{y + 4}">{said}</text>'
    x = 500
    for (least, width), (more, _) in zip(STEPS, [*STEPS[1:], (0, 0)], strict=True):
        name = f"{least} or more" if not more else str(least) if more == least + 1 else f"{least} to {more - 1}"
        yield f'  <path class="way core" stroke-width="{width}" d="M{x} {y}h34"/>'
        yield f'  <text class="note" x="{x + 42}" y="{y + 4}">{name}</text>'
        x += 54 + 7 * len(name)


def current() -> str:
    """The picture of the rooms as they are now."""
    lines = lines_of_contract()
    return svg(lines, imports_between([room for line in lines for room in line]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture, or compare it with what is there."""
    parser = argparse.ArgumentParser(description="Draws docs/images/rooms.svg from the imports.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the picture is not current")
    wanted = parser.parse_args(arguments)
    picture = current()
    if not wanted.check:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture:
        print(f"{PICTURE.relative_to(ROOT)} is not current; run tools/draw_rooms.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
