"""The command `glassbox diff`. Owns options, the table, JSON and exit status."""

from typing import TYPE_CHECKING, Annotated

import typer

from glassbox.cli.commands.common import (
    ApiKeyOption,
    EngineOption,
    HeaderOption,
    PhaseChoice,
    PhaseOption,
    complete_statistic,
    one_line_errors,
    wide_console,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from glassbox.store.merge import Detail
    from glassbox.view.compare import Comparison, Difference

_DIFFERENT = 1
_BAD_INPUT = 2


def _complete_detail(incomplete: str) -> list[str]:
    return [detail for detail in ("model", "layer", "head") if detail.startswith(incomplete)]


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="URL of a server, or a file of export.jsonl.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same of what is compared with A.")],
    statistic: Annotated[
        list[str] | None,
        typer.Option(help="Only this one, may be repeated.", autocompletion=complete_statistic, show_default=False),
    ] = None,
    phase: PhaseOption = PhaseChoice.ALL,
    detail: Annotated[
        str | None,
        typer.Option(
            help="Compare at this detail: model, layer or head; without it at that of A and B.",
            autocompletion=_complete_detail,
            show_default=False,
        ),
    ] = None,
    min_rows: Annotated[int, typer.Option(min=1, help="Leave out places with fewer rows in A or in B.")] = 300,
    limit: Annotated[int, typer.Option(min=0, help="How many of the largest differences to show; 0 is all.")] = 20,
    fail_above: Annotated[
        float | None,
        typer.Option(min=0, help="Exit status 1 if any excess is larger, such as 0.25.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    engine: EngineOption = None,
    api_key: ApiKeyOption = None,
    header: HeaderOption = None,
) -> None:
    """Compare two runs, or two models of the same shape, head by head.

    A and B are two servers, two JSONL files, or one of each. Each statistic is
    compared in its histogram buckets: the population stability index (PSI; below
    0.1 no change, above 0.25 a lot) and the standardised mean difference (SMD, in
    standard deviations). The excess is the PSI less what so few rows have by
    chance; it is what --fail-above judges.

    Exit status: 0; 1 if --fail-above is exceeded; 2 if A or B can't be used.

    \b
    Examples:
      glassbox diff before.jsonl after.jsonl
      glassbox diff http://old:8000 http://new:8000 --fail-above 0.25
      glassbox diff a.jsonl b.jsonl --statistic sink_ratio --json | jq .largest
    """
    import json

    from glassbox.core.statistics import PHASES, STATISTICS
    from glassbox.view.asking import Access
    from glassbox.view.compare import compare
    from glassbox.view.measured import find_statistic
    from glassbox.view.source import load

    with one_line_errors(_BAD_INPUT):
        statistics = [find_statistic(name) for name in statistic or ()] or STATISTICS
        wanted = _detail(detail)
        access = Access.of(api_key, header or ())
        runs = [load(name, engine, access) for name in (first, second)]
        if wanted is not None:
            runs = [run.coarser(wanted) for run in runs]
        phases = PHASES if phase.phase is None else (phase.phase,)
        comparison = compare(runs[0], runs[1], statistics, phases, min_rows)
        above = [] if fail_above is None else comparison.above(fail_above)
        shown = comparison.differences[: limit or None]
        if as_json:
            typer.echo(json.dumps(_json(comparison, shown, fail_above, above), indent=2, allow_nan=False))
        else:
            console = wide_console()
            _print(console, comparison, shown)
            if fail_above is not None:
                verdict = f"{len(above):,} of {len(comparison.differences):,} exceed {fail_above:g}."
                console.print(verdict, style="bold red" if above else "green")
        raise typer.Exit(_DIFFERENT if above else 0)


def _detail(name: str | None) -> "Detail | None":
    from glassbox.store.merge import DETAILS
    from glassbox.view.measured import ViewError

    for detail in DETAILS:
        if name == detail:
            return detail
    if name is not None:
        raise ViewError(f"--detail must be model, layer or head, got {name!r}")
    return None


def _print(console: "Console", comparison: "Comparison", shown: "tuple[Difference, ...]") -> None:
    from glassbox.core.printable import printable
    from glassbox.view.text import format_count, shape_words

    for letter, run in (("A", comparison.first), ("B", comparison.second)):
        rows = format_count(run.rows.sum())
        # No markup: a file's name may have brackets.
        console.print(
            f"{letter}  {printable(run.source)}: {run.model_name}, {shape_words(run)}, {rows} rows", markup=False
        )
    console.print(_table(shown))
    skipped = f"; {comparison.skipped:,} left out for too few rows" if comparison.skipped else ""
    console.print(f"{len(shown):,} of {len(comparison.differences):,} comparisons shown{skipped}.")


def _table(shown: "tuple[Difference, ...]") -> "Table":
    from rich import box
    from rich.table import Table

    from glassbox.view.text import format_count, format_value, place_words

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("statistic", "phase", "place"):
        table.add_column(name)
    for name in ("rows A", "rows B", "A", "B", "SMD", "PSI", "excess"):
        table.add_column(name, justify="right")
    for one in shown:
        style = "bold red" if one.excess > 0.25 else "yellow" if one.excess > 0.1 else "dim"
        table.add_row(
            one.statistic.name,
            one.phase.value,
            place_words(one.layer, one.head),
            *(format_count(rows) for rows in one.rows),
            *(format_value(value) for value in one.values),
            f"{one.shift:+.2f}",
            f"{one.index:.3f}",
            f"[{style}]{one.excess:.3f}[/{style}]",
        )
    return table


def _json(
    comparison: "Comparison", shown: "tuple[Difference, ...]", fail_above: float | None, above: "list[Difference]"
) -> dict[str, object]:
    runs = {
        name: {"source": run.source, "model_name": run.model_name, "rows": int(run.rows.sum())}
        for name, run in (("a", comparison.first), ("b", comparison.second))
    }
    return {
        **runs,
        "detail": comparison.first.detail,
        "compared": len(comparison.differences),
        "left_out": comparison.skipped,
        "fail_above": fail_above,
        "failed": len(above),
        "largest": [difference.as_json() for difference in shown],
    }
