"""The command `glassbox train`. Owns options, what is told of the probe, and exit status."""

import math
from collections import defaultdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassbox.cli.commands.common import check_output, fail, one_line_errors, require, wide_console

if TYPE_CHECKING:
    from glassbox.view.samples.training import Training


class CalibrationChoice(StrEnum):
    """How a regression's number becomes a probability."""

    PLATT = "platt"
    ISOTONIC = "isotonic"


def train(
    table: Annotated[Path, typer.Argument(metavar="FEATURES", help="A file of `glassbox extract`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The probe.")] = Path("probe.json"),
    name: Annotated[
        str | None, typer.Option(help="Of the probe; without it that of its file.", show_default=False)
    ] = None,
    label: Annotated[str, typer.Option(help="What a sample with label true is, such as injected.")] = "positive",
    features: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN", help="Only those, such as 'prompt_*' or '*_span.context_*'.", show_default=False
        ),
    ] = None,
    max_features: Annotated[int, typer.Option(min=1, max=4096, help="Heads that the probe may read.")] = 32,
    calibration: Annotated[
        CalibrationChoice, typer.Option(help="Two numbers, or any rising form for hundreds of samples of each kind.")
    ] = CalibrationChoice.PLATT,
    false_alarms: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of negatives above the threshold; without it what tells best.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the folds.")] = 0,
    shuffle_labels: Annotated[
        bool,
        typer.Option("--shuffle-labels", help="A control: train on labels exchanged by chance, and write no probe."),
    ] = False,
) -> None:
    """Train a probe: a logistic regression over a few heads, calibrated, as a JSON file.

    Heads, their number and the regularisation are chosen inside the folds of a
    cross-validation; samples of a group stay together. The numbers shown are of
    samples that were held out. With --shuffle-labels the AUROC must be near 0.5:
    if not, the procedure or the data leaks.
    Exit status: 0, or 1 if the table can't be used or the probe not written.

    \b
    Examples:
      glassbox train train.parquet -o needle.json --label unsupported
      glassbox train train.parquet --features 'prompt_*' --max-features 8
      glassbox train train.parquet --false-alarms 0.02
      glassbox train train.parquet --shuffle-labels
    """
    require("analysis", "training", "pyarrow", "sklearn")
    check_output(output, ".json")
    with one_line_errors():
        from glassbox.signals.probe import ProbeError, write_probe
        from glassbox.view.samples.feature_table import read_table
        from glassbox.view.samples.training import Wish
        from glassbox.view.samples.training import train as train_probe

        wish = Wish(
            name or output.stem, label, max_features, calibration.value, false_alarms, seed, shuffled=shuffle_labels
        )
        read = read_table(table)
        trained = train_probe(read if features is None else read.matching(features), wish)
        if not shuffle_labels:
            try:
                write_probe(output, trained.probe)
            except ProbeError as error:
                raise fail(str(error)) from None
        _print(trained, shuffled=shuffle_labels)
    typer.echo("no probe is written: the labels were exchanged" if shuffle_labels else str(output))


def _print(trained: "Training", *, shuffled: bool) -> None:
    from rich import box
    from rich.table import Table

    from glassbox.view.text import format_interval, format_share, format_value

    console = wide_console()
    probe, held = trained.probe, defaultdict(lambda: math.nan, trained.probe.trained.metrics)
    table = Table(title="Features, the heaviest first", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("feature", style="bold")
    for name in ("layer", "head", "mean", "deviation", "coefficient"):
        table.add_column(name, justify="right")
    for one in sorted(probe.features, key=lambda feature: -abs(feature.coefficient)):
        parsed = one.parsed
        place = ("", "") if parsed.layer is None else (str(parsed.layer), str(parsed.head))
        numbers = (format_value(one.mean), format_value(one.scale), f"{one.coefficient:+.3f}")
        table.add_row(parsed.group, *place, *numbers)
    console.print(table)
    kind = " (labels exchanged by chance)" if shuffled else ""
    console.print(
        f"{probe.trained.samples:,} samples, {probe.trained.positives:,} positive{kind}; {trained.folds} folds, "
        f"regularisation C = {trained.strength:g}.\n"
        f"Held out: AUROC {format_share(held['auroc'])} ({format_interval(held['auroc_low'], held['auroc_high'])}), "
        f"Brier score {held['brier']:.3f}.\n"
        f"At the threshold {probe.threshold:.3f}: recall {held['recall']:.3f}, false alarms "
        f"{held['false_alarms']:.3f}, precision {format_share(held['precision'])}."
    )
