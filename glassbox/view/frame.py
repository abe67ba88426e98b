"""One frame of `glassbox top`: what was measured as a header and a table coloured by value.

Pure: numbers and a size in, a renderable that fits out. Owns columns, order and wording.
"""

import time
from dataclasses import dataclass
from typing import Final

import numpy as np
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from glassbox.core.statistics import Phase, Statistic
from glassbox.view import heat
from glassbox.view.measured import Floats, Measured, exported_statistics
from glassbox.view.over_time import Watch
from glassbox.view.text import format_count, format_seconds, format_value, phase_words, shape_words

# A server that is silent for so long is said to be idle.
_IDLE_S: Final = 15.0
_PLACE_WIDTH: Final = 7
_ROWS_WIDTH: Final = 8
_VALUE_WIDTH: Final = 10
_BARS: Final = " ▁▂▃▄▅▆▇█"
KEYS: Final = "q quit  t statistic  s sort  r reverse  p phase  h heads  space pause  ↑↓ scroll  + - interval"


@dataclass(frozen=True)
class Look:
    """What is to be shown, and how.

    Attributes:
        statistics: the columns.
        focus: the one that is also shown head by head, or as a distribution.
        sort: layer, rows, nonfinite or a statistic; descending, except layer.
        reverse: the other way round.
        phase: None is both.
        by_head: a line for each head.
        scroll: lines that are passed over.
        paused: the numbers stand still.
        interval_s: between looks.
        coloured: without colours the heads are shown as digits.
    """

    statistics: tuple[Statistic, ...]
    focus: Statistic
    sort: str = "layer"
    reverse: bool = False
    phase: Phase | None = Phase.DECODE
    by_head: bool = False
    scroll: int = 0
    paused: bool = False
    interval_s: float = 2.0
    coloured: bool = True


@dataclass(frozen=True)
class _Line:
    """One line of the table: its place, rows, non-finite rows, a value per statistic, and what stands at the right."""

    place: str
    rows: float
    nonfinite: float
    values: tuple[float, ...]
    strip: Text


def sort_keys() -> list[str]:
    """All that `Look.sort` may be."""
    return ["layer", "rows", "nonfinite", *(statistic.name for statistic in exported_statistics())]


def frame(watch: Watch, look: Look, now_s: float, width: int, height: int | None = None) -> RenderableType:
    """All of it.

    Args:
        watch: has had at least one look.
        now_s: Unix time.
        width: columns; height: lines, None for as many as it takes and without the line of keys.
    """
    assert watch.now is not None
    assert watch.rows is not None
    head = _head(watch, now_s, width, height)
    columns = _fitting(look, watch.rows, width)
    lines = _sorted(_lines(watch.rows, look, columns, width), look, columns)
    if height is None:
        return Group(*head, Text(), _title(watch.rows, look), _table(watch.rows, look, columns, lines))
    room = _room(head, width, height)
    begin = min(look.scroll, max(len(lines) - room, 0))
    part = lines[begin : begin + room]
    where = f"{begin + 1}-{begin + len(part)} of {len(lines)}  " if len(part) < len(lines) else ""
    paused = "paused  " if look.paused else ""
    foot = Text(f"{paused}{where}every {look.interval_s:g} s  {KEYS}", style="dim", no_wrap=True, overflow="ellipsis")
    blank = [Text()] * (room - len(part))
    return Group(*head, Text(), _title(watch.rows, look), _table(watch.rows, look, columns, part), *blank, foot)


def last_scroll(watch: Watch, look: Look, now_s: float, width: int, height: int) -> int:
    """How far `look.scroll` goes until the last line is seen; arguments as of `frame`."""
    assert watch.rows is not None
    lines = len(watch.rows.layers) * (len(watch.rows.heads) if look.by_head else 1)
    return max(lines - _room(_head(watch, now_s, width, height), width, height), 0)


def _head(watch: Watch, now_s: float, width: int, height: int | None) -> list[Text]:
    # A small terminal needs its lines for the table.
    most = 2 if height is None or height >= 24 else 1
    return [_cut(text, most * width) for text in (*_header(watch), *_problems(watch, now_s))]


def _room(head: list[Text], width: int, height: int) -> int:
    """Lines of the table: without the head, a blank line, the title, two lines of headings, the line of keys."""
    return max(height - sum(max(1, -(-text.cell_len // width)) for text in head) - 5, 1)


def _header(watch: Watch) -> list[Text]:
    """Who it is, and the numbers of the engine."""
    assert watch.now is not None
    assert watch.pulse is not None
    now, pulse, window_s = watch.now, watch.pulse, watch.pulse.window_s
    engines, build = now.engines, now.engines.build
    first = Text("glassbox top", style="bold")
    backend = f"{build.get('backend', '')} vLLM {build.get('vllm_version', '?')}".strip()
    names = ", ".join(now.engine_names)
    many = "engines" if len(now.engine_names) > 1 else "engine"
    clock = time.strftime("%H:%M:%S", time.localtime(watch.answered_s))
    for text, style in ((now.model_name, "bold cyan"), (f"{many} {names}", ""), (backend, ""), (clock, "dim")):
        first.append(f"  {text}", style=style or None)

    def pace(total: float, change: float) -> str:
        return f"{format_count(total)}" + (f" ({format_value(change / window_s)}/s)" if window_s else "")

    rows = pace(now.rows.sum(), pulse.rows.sum())
    share = pulse.engines.sampled_steps / pulse.engines.steps if pulse.engines.steps else 0.0
    rate = "?" if engines.sample_rate is None else f"{engines.sample_rate:g}"
    second = Text.assemble(
        ("steps ", "dim"), pace(engines.steps, pulse.engines.steps), ("  measured ", "dim"), f"{share:.1%}",
        ("  sample rate ", "dim"), rate, ("  rows ", "dim"), rows, ("  overhead ", "dim"), _overhead(pulse),
    )  # fmt: skip
    third = Text.assemble(("layers ", "dim"), f"{engines.layers_observed or 0:.0f} observed")
    if engines.layers_bypassed:
        third.append(f", {engines.layers_bypassed:.0f} not", style="yellow")
    if engines.layers_wrong:
        third.append(f", {engines.layers_wrong} wrong", style="bold red")
    counts = {"dropped": sum(engines.dropped.values()), "nonfinite": now.nonfinite.sum()}
    counts["errors"] = sum((engines.errors or {}).values())
    for name, value in counts.items():
        third.append(f"  {name} ", style="dim")
        third.append(format_count(value), style="bold red" if value and name != "dropped" else None)
        if name == "errors" and value:
            third.append(f" ({', '.join(s for s, n in (engines.errors or {}).items() if n)})", style="red")
    return [first, second, third]


def _cut(text: Text, most: int) -> Text:
    text.truncate(most, overflow="ellipsis")
    return text


def _overhead(pulse: Measured) -> str:
    """As a share of time; of all time only the seconds are known."""
    if pulse.engines.overhead_s is None:
        return "?"
    if pulse.window_s:
        return f"{pulse.engines.overhead_s / pulse.window_s:.2%}"
    return f"{format_seconds(pulse.engines.overhead_s)} in all"


def _problems(watch: Watch, now_s: float) -> list[Text]:
    if watch.problem is not None:
        since = format_seconds(max(now_s - watch.problem_since_s, 0))
        return [Text(f"No answer for {since}; trying on. {watch.problem}", style="bold white on red")]
    if now_s - watch.answered_s > _IDLE_S:
        return [Text(f"These are the numbers of {format_seconds(now_s - watch.answered_s)} ago.", style="yellow")]
    silent_s = watch.answered_s - watch.changed_s
    if silent_s > _IDLE_S:
        return [Text(f"No new step for {format_seconds(silent_s)}; these are the last numbers.", style="yellow")]
    if watch.restarts and watch.pulse is not None and watch.pulse.window_s is None:
        return [Text("The server began anew; this is all since then.", style="yellow")]
    return []


def _strip_width(measured: Measured) -> int:
    """Columns of the heads side by side (two each if there is room), or of the distribution."""
    if measured.detail == "head":
        return len(measured.heads) * (2 if len(measured.heads) <= 24 else 1)
    return measured.counts.shape[-1]


def _fitting(look: Look, measured: Measured, width: int) -> tuple[Statistic, ...]:
    """The statistics for which there is room, the focus always among them."""
    wanted = [s for s in look.statistics if not (s.decode_only and look.phase == Phase.PREFILL)]
    if look.focus not in wanted:
        wanted.insert(0, look.focus)
    room = max((width - _PLACE_WIDTH - _ROWS_WIDTH) // _VALUE_WIDTH, 1)
    strip = 2 + _strip_width(measured)
    with_strip = (width - _PLACE_WIDTH - _ROWS_WIDTH - strip) // _VALUE_WIDTH
    # The strip is worth more than the last columns, but not more than three of them.
    if not look.by_head and with_strip >= min(len(wanted), 3):
        room = with_strip
    while len(wanted) > room and len(wanted) > 1:
        wanted.remove(next(s for s in reversed(wanted) if s is not look.focus))
    return tuple(wanted)


def _lines(measured: Measured, look: Look, columns: tuple[Statistic, ...], width: int) -> list[_Line]:
    by_head = look.by_head and measured.detail == "head"
    table = measured.coarser("layer") if measured.detail == "head" and not by_head else measured
    values = [table.typical(statistic, look.phase) for statistic in columns]
    extra = [] if _sort_column(look, columns) is None else [table.typical(_by_name(look.sort), look.phase)]
    rows = table.rows_of(look.phase)
    nonfinite = table.nonfinite.sum(axis=2)
    free = width - _PLACE_WIDTH - _ROWS_WIDTH - _VALUE_WIDTH * len(columns) - 2
    show_strip = not by_head and free >= _strip_width(measured)
    strips = _strips(measured, look) if show_strip else None
    lines = []
    for i, layer in enumerate(table.layers):
        for j, head in enumerate(table.heads):
            place = "all" if layer is None else str(layer) if head is None else f"{layer}.{head}"
            numbers = tuple(float(column[i, j]) for column in (*values, *extra))
            strip = Text() if strips is None else strips[i]
            lines.append(_Line(place, float(rows[i, j]), float(nonfinite[i, j]), numbers, strip))
    return lines


def _by_name(name: str) -> Statistic:
    return next(statistic for statistic in exported_statistics() if statistic.name == name)


def _sort_column(look: Look, columns: tuple[Statistic, ...]) -> int | None:
    """None unless the table is sorted by a statistic that has no column; its values come after the others."""
    names = [statistic.name for statistic in columns]
    return len(names) if look.sort in sort_keys()[3:] and look.sort not in names else None


def _sorted(lines: list[_Line], look: Look, columns: tuple[Statistic, ...]) -> list[_Line]:
    if look.sort == "layer":
        return lines[::-1] if look.reverse else lines
    extra = _sort_column(look, columns)
    names = [statistic.name for statistic in columns]

    def key(line: _Line) -> float:
        if look.sort in {"rows", "nonfinite"}:
            return float(getattr(line, look.sort))
        return line.values[names.index(look.sort) if extra is None else extra]

    known = [line for line in lines if not np.isnan(key(line))]
    return sorted(known, key=key, reverse=not look.reverse) + [line for line in lines if np.isnan(key(line))]


def _strips(measured: Measured, look: Look) -> list[Text]:
    """Per layer: its heads in the colour of their value, or how its rows are distributed over the buckets."""
    if measured.detail == "head":
        values = measured.typical(look.focus, look.phase)
        wide = _strip_width(measured) // max(len(measured.heads), 1)
        return [
            Text.assemble(*(_head_cell(share, wide, look.coloured) for share in layer))
            for layer in heat.shares(look.focus, values)
        ]
    counts = measured.counts_of(look.focus, look.phase)[:, 0]
    return [_bars(layer) for layer in counts]


def _head_cell(share: float, width: int, coloured: bool) -> Text:
    """A colour, or a digit: tenths of the scale."""
    if np.isnan(share):
        return Text("·".ljust(width), style="dim")
    return Text(" " * width, style=_background(share)) if coloured else Text(str(min(int(share * 10), 9)).ljust(width))


def _bars(counts: Floats) -> Text:
    """Twelve bars, the highest bucket full; anything above zero is seen."""
    if not counts.any():
        return Text("-", style="dim")
    levels = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return Text("".join(_BARS[level] for level in levels), style="cyan")


def _background(share: float) -> Style:
    return Style(color=heat.text_colour(share), bgcolor=heat.hexadecimal(share))


def _title(measured: Measured, look: Look) -> Text:
    covers = f"last {format_seconds(measured.window_s)}" if measured.window_s else "since the start"
    text = f"{phase_words(look.phase)}, {covers}, {shape_words(measured)}: mean (max_logit: median)"
    return Text(text, style="bold", no_wrap=True, overflow="ellipsis")


def _table(measured: Measured, look: Look, columns: tuple[Statistic, ...], lines: list[_Line]) -> Table:
    window_s = measured.window_s
    table = Table(box=None, padding=0, pad_edge=False, header_style="")
    by_head = look.by_head and measured.detail == "head"
    table.add_column(_heading("head" if by_head else "layer", look.sort == "layer"), width=_PLACE_WIDTH)
    rows_heading = _heading("rows/s" if window_s else "rows", look.sort == "rows", width=_ROWS_WIDTH)
    table.add_column(rows_heading, width=_ROWS_WIDTH, no_wrap=True)
    for statistic in columns:
        words = statistic.name.replace("_", "\n", 1)
        heading = _heading(words, look.sort == statistic.name, statistic is look.focus, _VALUE_WIDTH)
        table.add_column(heading, width=_VALUE_WIDTH, no_wrap=True)
    if any(line.strip for line in lines):
        what = "head" if measured.detail == "head" else "bucket"
        what += "" if look.coloured or what == "bucket" else ", 0 to 9"
        table.add_column(_heading(f"  {look.focus.name.replace('_', ' ')}\n  by {what}", False), no_wrap=True)
    for line, cells in zip(lines, _cells(columns, lines), strict=True):
        place = Text(line.place, style="bold")
        if line.nonfinite:
            place = Text(f"{line.place} !", style="bold red")
        rows = format_count(line.rows) if not window_s else format_value(line.rows / window_s) if line.rows else "-"
        strip = [Text("  ") + line.strip] if any(one.strip for one in lines) else []
        table.add_row(place, Text(_right(rows, _ROWS_WIDTH), style="dim"), *cells, *strip)
    return table


def _right(text: str, width: int) -> str:
    """At the right but for one column, so that neighbours don't touch (rich would cut the blank off)."""
    return f"{text} ".rjust(width)


def _heading(text: str, sorted_by: bool, focus: bool = False, width: int = 0) -> Text:
    style = Style(bold=focus, dim=not (focus or sorted_by), underline=sorted_by)
    lines = [Text(" " * max(width - len(line) - 1, 0)) + Text(line, style=style) for line in text.split("\n")]
    return Text("\n").join(lines)


def _cells(columns: tuple[Statistic, ...], lines: list[_Line]) -> list[list[Text]]:
    """The numbers of each line on the colour of their value; the scale of a column is that of the lines shown."""
    shares = [heat.shares(statistic, [line.values[k] for line in lines]) for k, statistic in enumerate(columns)]
    result = []
    for i, line in enumerate(lines):
        cells = []
        for k in range(len(columns)):
            text = _right(format_value(line.values[k]), _VALUE_WIDTH)
            share = float(shares[k][i])
            cells.append(Text(text, style="dim" if np.isnan(share) else _background(share)))
        result.append(cells)
    return result
