"""The command `glassbox evaluate`. Owns options, tables, JSON and exit status."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassbox.cli.commands.common import fail, one_line_errors, require, wide_console

if TYPE_CHECKING:
    from glassbox.view.samples.evaluation import Evaluation


def evaluate(
    probe: Annotated[Path, typer.Argument(metavar="PROBE", help="A file of `glassbox train`.")],
    table: Annotated[Path, typer.Argument(metavar="FEATURES", help="A file of `glassbox extract`, of other samples.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    fail_below: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit status 1 if the AUROC's interval reaches below.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamplings.")] = 0,
) -> None:
    """Show how good a probe is on samples that it was not trained on.

    AUROC with its 95 % bootstrap interval, Brier score, what the threshold does,
    and a calibration table: of samples with about the same score, the share that
    is positive. That the probe reads heads which the table's model has is checked.

    Exit status: 0; 1 if --fail-below is not reached; 2 if a file can't be used.

    \b
    Examples:
      glassbox evaluate needle.json test.parquet
      glassbox evaluate needle.json test.parquet --json --fail-below 0.8
    """
    require("analysis", "the evaluation", "pyarrow", status=2)
    with one_line_errors(2):
        import json

        from glassbox.signals.probe import ProbeError, read_probe
        from glassbox.view.samples.evaluation import evaluate as evaluate_probe
        from glassbox.view.samples.feature_table import read_table

        try:
            found = evaluate_probe(read_probe(probe), read_table(table), seed=seed)
        except ProbeError as error:
            raise fail(str(error), 2) from None
        if not found.same_model:
            typer.echo(
                f"glassbox: the probe was trained on {found.probe.trained.model_name}, the table is of "
                f"{found.table.model_name}; if these are not names of one model, the numbers mean little",
                err=True,
            )
        if as_json:
            typer.echo(json.dumps(found.document(), indent=1, allow_nan=False))
        else:
            _print(found)
        below = fail_below is not None and not found.reaches(fail_below)
    raise typer.Exit(1 if below else 0)


def _print(found: "Evaluation") -> None:
    from rich import box
    from rich.table import Table

    from glassbox.core.printable import printable
    from glassbox.view.text import format_interval, format_share

    console = wide_console()
    metrics = found.metrics
    left = found.without_score + found.table.problems
    out = f"; {left:,} without features left out" if left else ""
    positives = int((found.table.labels == 1).sum())
    console.print(
        f"{printable(str(found.table.path))}: {len(found.scores):,} samples, {positives:,} "
        f"{found.probe.label}{out}\n"
        f"AUROC {metrics['auroc']:.3f} ({format_interval(metrics['auroc_low'], metrics['auroc_high'])}), Brier score "
        f"{metrics['brier']:.3f} (always saying the share of positives: {metrics['brier_of_share']:.3f})\n"
        f"At the threshold {found.probe.threshold:.3f}: recall {metrics['recall']:.3f}, false alarms "
        f"{metrics['false_alarms']:.3f}, precision {format_share(metrics['precision'])}",
        markup=False,
        soft_wrap=True,
    )
    for name, reason in found.no_value.items():
        console.print(f"{name} is n/a: {reason}", soft_wrap=True)
    table = Table(title="Calibration", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("scores", "mean score", "share of positives", "samples"):
        table.add_column(name, justify="right")
    for one in found.bins:
        table.add_row(
            f"{one.low:.3f} to {one.high:.3f}", f"{one.mean_score:.3f}", f"{one.share:.3f}", f"{one.samples:,}"
        )
    console.print(table)
