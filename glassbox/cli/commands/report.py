"""The command `glassbox report`. Owns options and exit status."""

from pathlib import Path
from typing import Annotated

import typer

from glassbox.cli.commands.common import EngineOption, check_output, one_line_errors, require


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of export.jsonl, of one run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("glassbox-report.html"),
    engine: EngineOption = None,
) -> None:
    """Write a report of what was measured, as one HTML page.

    Statistics by layer, by head and over time, and which heads stand out. The
    page needs nothing else: it can be mailed, and printed. Give rotated files
    (.1, .2, .3) along, in any order. Lines that can't be read are left out, and
    counted. Exit status: 0, or 1 if a file can't be used or the page not written.

    \b
    Examples:
      glassbox report run.jsonl
      glassbox report run.jsonl run.jsonl.1 -o monday.html
    """
    require("plots", "the report", "matplotlib", "jinja2")
    from glassbox.view.html_report import render
    from glassbox.view.windows import read_run

    check_output(output, ".html")
    with one_line_errors():
        run = read_run(files, engine)
        output.write_text(render(run, files), encoding="utf-8", errors="backslashreplace")
    if run.unreadable:
        typer.echo(f"glassbox: {run.unreadable} lines couldn't be read and are left out", err=True)
    typer.echo(str(output))
