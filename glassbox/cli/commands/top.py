"""The command `glassbox top`. Owns options and exit status."""

import contextlib
import time
from typing import Annotated

import typer

from glassbox.cli.commands.common import (
    ApiKeyOption,
    EngineOption,
    HeaderOption,
    PhaseChoice,
    PhaseOption,
    complete_statistic,
    fail,
    one_line_errors,
)

_WIDTH_WITHOUT_TERMINAL = 132


def _complete_sort(incomplete: str) -> list[str]:
    names = ["layer", "rows", "nonfinite", *(name for name, _ in complete_statistic(""))]
    return [name for name in names if name.startswith(incomplete)]


def top(
    url: Annotated[str, typer.Argument(help="Of the server, or of its /metrics.")] = "http://localhost:8000",
    statistic: Annotated[
        list[str] | None,
        typer.Option(
            help="Show these columns only, may be repeated; the first one also head by head.",
            autocompletion=complete_statistic,
            show_default=False,
        ),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(help="layer, rows, nonfinite or a statistic (largest first).", autocompletion=_complete_sort),
    ] = "layer",
    reverse: Annotated[bool, typer.Option("--reverse", help="Sort the other way round.")] = False,
    phase: PhaseOption = PhaseChoice.DECODE,
    heads: Annotated[bool, typer.Option("--heads", help="A line for each head (at detail head).")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between looks at the server.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="One frame with the totals, then end; so it does without a terminal.")
    ] = False,
    engine: EngineOption = None,
    api_key: ApiKeyOption = None,
    header: HeaderOption = None,
) -> None:
    """Watch the attention of a running server, layer by layer.

    The first frame shows all since the server's start, then each shows what came
    since the one before. Colours go by value. A server that goes away is waited
    for. Exit status: 0, or 1 if the server can't be read at the beginning.

    \b
    Examples:
      glassbox top                                  http://localhost:8000
      glassbox top gpu7:8000 --sort entropy_ratio   layers with most entropy first
      glassbox top --statistic sink_ratio --heads --sort sink_ratio
      glassbox top --once --phase prefill | less -R
    """
    from rich.console import Console

    from glassbox.view.asking import Access
    from glassbox.view.frame import Look, frame, sort_keys
    from glassbox.view.measured import exported_statistics, find_statistic
    from glassbox.view.over_time import Watch
    from glassbox.view.scrape import fetch

    if sort not in sort_keys():
        raise fail(f"--sort must be one of {', '.join(sort_keys())}, got {sort!r}")
    with one_line_errors():
        chosen = [find_statistic(name) for name in statistic or ()]
        hidden = next((s for s in chosen if not s.exported), None)
        if hidden is not None:
            raise fail(f"{hidden.name} is in no metric; use one of {', '.join(sort_keys()[3:])}")
        access = Access.of(api_key, header or ())
        first = fetch(url, engine=engine, access=access)
        columns = tuple(chosen or exported_statistics())
        console = Console(highlight=False)
        coloured = console.color_system is not None and not console.no_color
        look = Look(columns, columns[0], sort, reverse, phase.phase, heads, interval_s=interval, coloured=coloured)
        if once or not console.is_terminal:
            if not console.is_terminal:
                console = Console(highlight=False, width=max(console.width, _WIDTH_WITHOUT_TERMINAL))
            watch = Watch()
            watch.take(first)
            console.print(frame(watch, look, time.time(), console.width))
            return
        from glassbox.view.live import run

        with contextlib.suppress(KeyboardInterrupt):
            run(lambda: fetch(url, engine=engine, access=access), first, look, console)
