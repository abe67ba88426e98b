"""The command `glassbox baseline`. Owns options, output and exit status; it reads run directories and asks servers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from glassbox.cli.commands.common import ApiKeyOption, HeaderOption, fail, one_line_errors, require

if TYPE_CHECKING:
    from rich.table import Table

    from glassbox.signals.baseline import Baseline
    from glassbox.view.asking import Access

baseline = typer.Typer(help="Save how a healthy run looks, for the server to compare with.", no_args_is_help=True)

_QUANTILES: Final = {"p5": 0.05, "p50": 0.5, "p95": 0.95}


@contextmanager
def _baseline_errors() -> Iterator[None]:
    from glassbox.signals.baseline import BaselineError

    with one_line_errors():
        try:
            yield
        except BaselineError as error:
            raise fail(str(error)) from None


@baseline.command()
def save(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URL|RUN_DIR",
            help="A server (http://host:8000, with export.prometheus.detail: head) or its run directory.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; an older one is replaced.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="The server's YAML: its sink_tokens and local_window are kept, and compared later.",
            show_default=False,
        ),
    ] = None,
    api_key: ApiKeyOption = None,
    header: HeaderOption = None,
) -> None:
    """Save the distribution of every head, from the server's start until now.

    Then name the file in the server's YAML: `baseline: {path: FILE}`.

    \b
    Examples:
      glassbox baseline save http://localhost:8000 -o baseline.npz
      glassbox baseline save $GLASSBOX_RUN_DIR -o baseline.npz --config glassbox.yaml
    """
    from glassbox.config.load import BaselineConfig
    from glassbox.signals.baseline import save_baseline
    from glassbox.view.asking import Access

    with _baseline_errors():
        taken = _take(source, config, Access.of(api_key, header or ()))
        save_baseline(out, taken)
        for line in _description(taken):
            typer.echo(line)
    typer.echo(f"saved to {out}; name it in the server's YAML as baseline.path")
    least = BaselineConfig().min_rows
    few = int((taken.rows.max(axis=-1) < least).sum())
    if few:
        typer.echo(
            f"glassbox: {few} of {taken.rows.shape[0] * taken.num_heads} heads have fewer than {least} rows "
            "and won't be compared by default (baseline.min_rows); save again after more traffic",
            err=True,
        )


def _take(source: str, config_path: Path | None, access: "Access") -> "Baseline":
    """What a run directory or a server has.

    Raises:
        BaselineError, ViewError: there is nothing to take.
    """
    from dataclasses import replace

    from glassbox.config.load import ConfigError, load_config
    from glassbox.signals.baseline import BaselineError, from_engines
    from glassbox.store.merge import merge
    from glassbox.store.snapshot import read_snapshots
    from glassbox.view.measured_baseline import from_measured

    try:
        statistics = None if config_path is None else load_config(config_path).statistics
    except ConfigError as error:
        raise BaselineError(str(error)) from None
    if source.startswith(("http://", "https://")):
        require("demo", "asking a server", "httpx")
        from glassbox.view.scrape import fetch

        taken = from_measured(fetch(source, access=access))
    elif Path(source).is_dir():
        taken = from_engines(merge(read_snapshots(Path(source), named=True)), source)
    else:
        raise BaselineError(f"{source} must be a URL (http://host:port) or the run directory of a server")
    if statistics is None:
        return taken
    return replace(taken, sink_tokens=statistics.sink_tokens, local_window=statistics.local_window)


@baseline.command()
def show(file: Annotated[Path, typer.Argument(help="A file of `glassbox baseline save`.")]) -> None:
    """Print what a file holds: of which model, from when, and the distribution of each statistic."""
    from rich.console import Console

    from glassbox.signals.baseline import load_baseline

    with _baseline_errors():
        loaded = load_baseline(file)
        for line in _description(loaded):
            typer.echo(line)
        Console().print(_table(loaded))


def _description(taken: "Baseline") -> list[str]:
    from glassbox.core.printable import printable
    from glassbox.core.statistics import PHASES

    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(taken.time_s))
    span = "" if taken.duration_s is None else f", over {taken.duration_s:,.0f} s"
    rows = taken.rows.sum(axis=(0, 1)).tolist()
    smallest = taken.rows.min(axis=(0, 1)).tolist()
    versions = ", ".join(f"{name} {value}" for name, value in taken.build.items()) or "not known"
    parameters = [
        f"{name} {value}"
        for name, value in (("sink_tokens", taken.sink_tokens), ("local_window", taken.local_window))
        if value is not None
    ]
    return [
        f"model      {taken.model_name}: {len(taken.layers)} layers, {taken.num_heads} heads",
        f"taken      {at}{span}, from {printable(taken.source)}",
        f"versions   {versions}",
        f"parameters {', '.join(parameters) or 'not known'}",
        *(
            f"{phase:10} {total:,} rows, {least:,} of the head with fewest"
            for phase, total, least in zip(PHASES, rows, smallest, strict=True)
        ),
    ]


def _table(loaded: "Baseline") -> "Table":
    from rich import box
    from rich.table import Table

    from glassbox.core.histograms import quantiles
    from glassbox.core.statistics import INDEX, PHASES, STATISTICS
    from glassbox.view.text import format_value

    table = Table(title="All heads (quantiles interpolated in the buckets)", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("statistic", style="bold")
    table.add_column("phase")
    for name in ("rows", *_QUANTILES):
        table.add_column(name, justify="right")
    for statistic in STATISTICS:
        for p, phase in enumerate(PHASES):
            counts = loaded.counts[:, :, p, INDEX[statistic.name]].sum(axis=(0, 1))
            if counts.any():
                values = [quantiles(statistic, counts, share).item() for share in _QUANTILES.values()]
                table.add_row(statistic.name, phase.value, f"{counts.sum():,}", *map(format_value, values))
    return table
