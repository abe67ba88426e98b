"""The command `glassbox analyze`. Owns options, tables, JSON and exit status."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassbox.cli.commands.common import check_output, one_line_errors, require, wide_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from glassbox.view.samples.analysis import Analysis, Telling


def analyze(
    table: Annotated[Path, typer.Argument(metavar="FEATURES", help="A file of `glassbox extract`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write a page with pictures: .html.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, of all features.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="How many of the most telling heads to show.")] = 15,
    bootstrap: Annotated[int, typer.Option(min=100, max=100_000, help="Resamplings of each interval.")] = 1000,
    permutations: Annotated[
        int, typer.Option(min=99, max=100_000, help="Of the labels, for the corrected p: none is below 1 over it.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of both.")] = 0,
) -> None:
    """Show which features tell positives from negatives, and how surely.

    For each signal, layer and head the AUROC with its 95 % bootstrap interval,
    and p corrected for the number of features tested (the maximum over all of
    them under permuted labels). Beside it the AUROC among samples of about equal
    length, and what the lengths alone tell. Groups are resampled as a whole, and
    labels permuted within them.
    Exit status: 0, or 1 if the table can't be used.

    \b
    Examples:
      glassbox analyze train.parquet
      glassbox analyze train.parquet -o heads.html
      glassbox analyze train.parquet --json | jq '.features[:5]'
    """
    require("analysis", "the analysis", "pyarrow")
    if output is not None:
        require("plots", "the page", "matplotlib", "jinja2")
        check_output(output, ".html")
    with one_line_errors():
        import json

        from glassbox.view.samples.analysis import analyze as analyze_table
        from glassbox.view.samples.feature_table import read_table

        found = analyze_table(read_table(table), bootstrap=bootstrap, permutations=permutations, seed=seed)
        if output is not None:
            from glassbox.view.samples.analysis_page import render

            output.write_text(render(found), encoding="utf-8", errors="backslashreplace")
        if as_json:
            typer.echo(json.dumps(found.document(), indent=1, allow_nan=False))
        else:
            _print(found, limit)
        if output is not None:
            typer.echo(str(output), err=as_json)


def _print(found: "Analysis", limit: int) -> None:
    console = wide_console()
    from glassbox.core.printable import printable

    groups = "" if found.num_groups is None else f" in {found.num_groups:,} groups"
    total = len(found.table.labels)
    left = found.unlabelled + found.table.problems
    out = f"; {left:,} without a label or features left out" if left else ""
    console.print(
        f"{printable(str(found.table.path))}: {printable(found.table.model_name)}, {total:,} samples{groups}, "
        f"{found.positives:,} positive{out}",
        markup=False,
        soft_wrap=True,
    )
    console.print(_table("Most telling heads", found.features[:limit]))
    console.print(_table("Best head of each signal", found.best_of_groups()))
    console.print(_table("The lengths alone", found.lengths))
    if found.left_out:
        console.print(f"{found.left_out}.", soft_wrap=True)
    console.print(
        f"AUROC with 95 % interval ({found.bootstrap:,} resamplings). p: {found.correction}. at equal length: AUROC "
        "among samples whose tokens fall into the same fifth.",
        soft_wrap=True,
    )


def _table(title: str, tellings: "Sequence[Telling]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("feature", style="bold")
    for name in ("layer", "head", "AUROC", "95 % interval", "p", "at equal length", "samples"):
        table.add_column(name, justify="right")
    for one in tellings:
        table.add_row(*one.cells())
    return table
