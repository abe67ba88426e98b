"""The command `glassbox baseline`. Owns options, output and exit status; it reads run directories and asks servers."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from glassbox.baseline import Baseline

baseline_app = typer.Typer(help="Save how a healthy run looks, for the server to compare with.", no_args_is_help=True)


def _fail(message: str) -> typer.Exit:
    typer.echo(f"glassbox: {message}", err=True)
    return typer.Exit(1)


@baseline_app.command()
def save(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URL|RUN_DIR",
            help="A server (http://host:8000, with export.prometheus.detail: head) or its run directory.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; an older one is replaced.")],
    model: Annotated[str | None, typer.Option(help="The model, if the source has several.", show_default=False)] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The server's YAML: its sink_tokens and local_window are kept, and compared later.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Save the distribution of every head, from the server's start until now.

    Then name the file in the server's YAML: `baseline: {path: FILE}`.
    """
    from glassbox.baseline import BaselineError, save_baseline
    from glassbox.config import BaselineConfig, ConfigError

    try:
        baseline = _take(source, model, config)
        save_baseline(out, baseline)
    except (BaselineError, ConfigError) as error:
        raise _fail(str(error)) from None
    except OSError as error:
        raise _fail(f"can't write {out}: {error.strerror or error}") from None
    for line in _description(baseline):
        typer.echo(line)
    typer.echo(f"saved to {out}; name it in the server's YAML as baseline.path")
    least = BaselineConfig().min_rows
    few = int((baseline.rows.max(axis=-1) < least).sum())
    if few:
        typer.echo(
            f"glassbox: {few} of {baseline.rows.shape[0] * baseline.num_heads} heads have fewer than {least} rows "
            "and won't be compared by default (baseline.min_rows); save again after more traffic",
            err=True,
        )


def _take(source: str, model: str | None, config: Path | None) -> "Baseline":
    from dataclasses import replace

    from glassbox.baseline import BaselineError, from_engines
    from glassbox.baseline_scrape import scrape
    from glassbox.config import load_config
    from glassbox.export.merge import merge
    from glassbox.export.snapshot import read_snapshots

    statistics = None if config is None else load_config(config).statistics
    if source.startswith(("http://", "https://")):
        baseline = scrape(source, model)
    else:
        if not Path(source).is_dir():
            raise BaselineError(
                f"{source} must be a URL (http://host:port) or a run directory; there is no such directory"
            )
        engines = [engine for engine in merge(read_snapshots(Path(source))) if model in {None, engine.model_name}]
        baseline = from_engines(engines, source)
    if statistics is None:
        return baseline
    return replace(baseline, sink_tokens=statistics.sink_tokens, local_window=statistics.local_window)


@baseline_app.command()
def show(file: Annotated[Path, typer.Argument(help="A file of `glassbox baseline save`.")]) -> None:
    """Print what a file holds: of which model, from when, and the distribution of each statistic."""
    from rich.console import Console

    from glassbox.baseline import BaselineError, load_baseline

    try:
        baseline = load_baseline(file)
    except BaselineError as error:
        raise _fail(str(error)) from None
    for line in _description(baseline):
        typer.echo(line)
    Console().print(_table(baseline))


def _description(baseline: "Baseline") -> list[str]:
    from glassbox.statistics import PHASES

    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(baseline.time_s))
    span = "" if baseline.duration_s is None else f", over {baseline.duration_s:,.0f} s"
    rows = baseline.rows.sum(axis=(0, 1)).tolist()
    smallest = baseline.rows.min(axis=(0, 1)).tolist()
    versions = ", ".join(f"{name} {value}" for name, value in baseline.build.items()) or "not known"
    parameters = [
        f"{name} {value}"
        for name, value in (("sink_tokens", baseline.sink_tokens), ("local_window", baseline.local_window))
        if value is not None
    ]
    return [
        f"model      {baseline.model_name}: {len(baseline.layers)} layers, {baseline.num_heads} heads",
        f"taken      {at}{span}, from {baseline.source}",
        f"versions   {versions}",
        f"parameters {', '.join(parameters) or 'not known'}",
        *(
            f"{phase:10} {total:,} rows, {least:,} of the head with fewest"
            for phase, total, least in zip(PHASES, rows, smallest, strict=True)
        ),
    ]


def _table(baseline: "Baseline") -> object:
    from rich import box
    from rich.table import Table

    from glassbox.demo.table import format_value
    from glassbox.export.jsonl import quantile
    from glassbox.statistics import INDEX, PHASES, STATISTICS

    table = Table(title="All heads (quantiles interpolated in the buckets)", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("statistic", style="bold")
    table.add_column("phase")
    for name in ("rows", "p5", "p50", "p95"):
        table.add_column(name, justify="right")
    for statistic in STATISTICS:
        for p, phase in enumerate(PHASES):
            counts = baseline.counts[:, :, p, INDEX[statistic.name]].sum(axis=(0, 1)).tolist()
            if not sum(counts):
                continue
            quantiles = [quantile(statistic, counts, share) for share in (0.05, 0.5, 0.95)]
            cells = ["-" if value is None else format_value(value) for value in quantiles]
            table.add_row(statistic.name, phase.value, f"{sum(counts):,}", *cells)
    return table
