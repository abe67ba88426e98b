"""The command `glassbox heatmap`. Owns options and exit status."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from glassbox.cli.commands.common import (
    ApiKeyOption,
    EngineOption,
    HeaderOption,
    PhaseChoice,
    PhaseOption,
    check_output,
    complete_statistic,
    fail,
    one_line_errors,
    require,
)


class ValueChoice(StrEnum):
    """What a cell shows."""

    MEAN = "mean"
    P50 = "p50"
    P95 = "p95"
    ROWS = "rows"


def heatmap(
    sources: Annotated[
        list[str], typer.Argument(metavar="URL|FILE...", help="A server, or files of export.jsonl of one run.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png or .svg.")] = Path("heatmap.png"),
    statistic: Annotated[
        str, typer.Option(help="Name of the statistic.", autocompletion=complete_statistic)
    ] = "entropy_ratio",
    every: Annotated[bool, typer.Option("--all", help="Small pictures of all statistics in one.")] = False,
    value: Annotated[
        ValueChoice, typer.Option(help="Of the rows of a head; rows: how many there are.")
    ] = ValueChoice.MEAN,
    phase: PhaseOption = PhaseChoice.DECODE,
    interval: Annotated[
        float | None,
        typer.Option(min=1, max=3600, help="Of a server: what comes within so many seconds.", show_default=False),
    ] = None,
    engine: EngineOption = None,
    api_key: ApiKeyOption = None,
    header: HeaderOption = None,
) -> None:
    """Draw a statistic as a heatmap of layers and heads.

    From a server it shows all since its start (or --interval), from files all
    windows in them. Heads must be told apart: export.prometheus.detail: head.
    A page of metrics has no mean of max_logit; there it is the median.
    Exit status: 0, or 1 if the source can't be used or the picture not written.

    \b
    Examples:
      glassbox heatmap localhost:8000 --statistic sink_ratio -o sinks.png
      glassbox heatmap run.jsonl run.jsonl.1 --all -o all.svg
      glassbox heatmap localhost:8000 --value p95 --phase prefill --interval 60
    """
    require("plots", "the heatmap", "matplotlib")
    from glassbox.view import charts
    from glassbox.view.asking import Access
    from glassbox.view.measured import ViewError, find_statistic
    from glassbox.view.scrape import fetch
    from glassbox.view.source import is_url, load
    from glassbox.view.windows import read_run

    check_output(output, *charts.SUFFIXES)
    with one_line_errors():
        access = Access.of(api_key, header or ())
        chosen = find_statistic(statistic)
        if len(sources) == 1:
            measured = load(sources[0], engine, access)
        elif any(is_url(source) for source in sources):
            raise ViewError("give one URL, or files only; `glassbox diff` compares two servers")
        else:
            measured = read_run([Path(source) for source in sources], engine).total
        measured.coarser("head")
        if interval is not None:
            if not is_url(sources[0]):
                raise fail("--interval is of a server; a file has windows of its own, leave it out")
            time.sleep(interval)
            measured = fetch(sources[0], engine=engine, access=access).since(measured)
        if every:
            figure = charts.heatmaps(measured, phase.phase, value.value)
        else:
            figure = charts.heatmap(measured, chosen, phase.phase, value.value)
        charts.save(figure, output)
    typer.echo(str(output))
