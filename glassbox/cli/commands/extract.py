"""The command `glassbox extract`. Owns options, progress and exit status."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from glassbox.cli.commands.common import (
    ApiKeyOption,
    HeaderOption,
    check_output,
    fail,
    one_line_errors,
    require,
)
from glassbox.cli.commands.own_engine import EngineArgOption, engine_arguments, engine_errors, load_extractor

if TYPE_CHECKING:
    from glassbox.view.asking import Access
    from glassbox.view.samples.feature_table import SampleRow
    from glassbox.view.samples.parts import Parts
    from glassbox.view.samples.samples_file import Sample

_INTERRUPTED: Final = 130
Rows = Callable[[Sequence["Sample"]], list["SampleRow"]]


def extract(
    data: Annotated[Path, typer.Option("--data", help="Samples, a line of JSON each; docs/probes.md has the format.")],
    model: Annotated[str, typer.Option("--model", help="Name or folder of the model; with --url as it is served.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table.")] = Path("features.parquet"),
    max_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Of an answer that the model gives.")] = 64,
    layers: Annotated[
        str | None, typer.Option(help="Only these, such as 0,5,11; without it all.", show_default=False)
    ] = None,
    heads: Annotated[str | None, typer.Option(help="The same of heads.", show_default=False)] = None,
    signals: Annotated[
        str | None,
        typer.Option(
            help="Signals of whole requests, too, such as spectral,rauq (docs/signals.md).", show_default=False
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Samples at once, and between two savings.")] = 16,
    engine_arg: EngineArgOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Measure with this glassbox YAML, not with one that is made for it.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask this running server (http://host:port), not an engine of its own.", show_default=False),
    ] = None,
    api_key: ApiKeyOption = None,
    header: HeaderOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an earlier run has done.")] = False,
) -> None:
    """Measure labelled samples: a table with a row for each and a column for each feature.

    Every sample is asked greedily, or read together with the answer that it
    brings. What is done is saved after each batch: a run that was ended, in any
    way, goes on with the same command, and none is lost or there twice.
    Exit status: 0, or 1 if the data, the model or the server can't be used.

    \b
    Examples:
      glassbox extract --model MODEL --data train.jsonl -o train.parquet
      glassbox extract --model MODEL --data test.jsonl --engine-arg max_model_len=2048
      glassbox extract --url http://localhost:8000 --model NAME --data train.jsonl
    """
    require("analysis", "extracting", "pyarrow")
    check_output(output, ".parquet")
    with one_line_errors():
        from glassbox.view.asking import Access
        from glassbox.view.samples.parts import open_parts
        from glassbox.view.samples.samples_file import read_samples

        chosen = {"layers": _indices("--layers", layers), "heads": _indices("--heads", heads)}
        names = _signals(signals)
        if url is not None and not url.startswith(("http://", "https://")):
            told = f"--url must be an address of http or https, got {url[:80]!r}"
            raise fail(f"{told}; write such as http://localhost:8000")
        arguments = engine_arguments(engine_arg or ())
        found = read_samples(data)
        settings = {
            "model": model,
            "data": found.digest,
            "max_tokens": max_tokens,
            "layers": layers,
            "heads": heads,
            "signals": list(names),
            "url": url,
        }
        with open_parts(output, settings, _origin(model, data), restart=restart) as parts:
            todo = [sample for sample in found.samples if sample.index not in parts.done]
            if todo:
                asked = {"max_tokens": max_tokens, **chosen, "signals": names}
                if url is None:
                    rows = _offline(model, arguments, config, found.samples, asked)
                else:
                    rows = _online(url, model, Access.of(api_key, header or ()), asked)
                _run(rows, todo, len(found.samples), batch, parts)
            problems = parts.merge(output)
    for problem, samples in problems.most_common(1):
        typer.echo(
            f"glassbox: {problems.total()} of {len(found.samples)} samples have no features, {samples} of them since: "
            f"{problem}; the column `problem` says why",
            err=True,
        )
    typer.echo(str(output))


def _run(rows: Rows, todo: Sequence["Sample"], total: int, batch: int, parts: "Parts") -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("samples", total=total, completed=total - len(todo))
        try:
            for start in range(0, len(todo), batch):
                some = todo[start : start + batch]
                parts.add(rows(some))
                progress.advance(task, len(some))
        except KeyboardInterrupt:
            done = f"{len(parts.done)} of {total} samples are in {parts.folder}"
            raise fail(f"interrupted; {done}, and the same command goes on", _INTERRUPTED) from None


def _offline(
    model: str, arguments: dict[str, Any], config: Path | None, samples: Sequence["Sample"], asked: dict[str, Any]
) -> Rows:
    require("cpu` or `cuda", "extracting without --url", "vllm")
    extractor = load_extractor(model, arguments, samples, config, **asked)

    def rows(samples: Sequence["Sample"]) -> list["SampleRow"]:
        with engine_errors(model):
            return extractor.rows(samples)

    return rows


def _online(url: str, model: str, access: "Access", asked: dict[str, Any]) -> Rows:
    from glassbox.view.samples.remote import RemoteModel

    return RemoteModel(url, model, access, **asked).rows


def _origin(model: str, data: Path) -> Any:
    from datetime import UTC, datetime

    from glassbox import __version__
    from glassbox.core.json_fields import MAX_TEXT
    from glassbox.core.printable import printable
    from glassbox.view.samples.feature_table import TableOrigin

    name = Path(model).name if Path(model).is_dir() else model
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return TableOrigin(printable(name)[:MAX_TEXT], __version__, printable(data.name)[:MAX_TEXT], date)


def _indices(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise fail(f"{option} must be whole numbers with commas, got {text[:80]!r}; write such as 0,5,11")
    return tuple(int(part) for part in parts)


def _signals(text: str | None) -> tuple[str, ...]:
    from glassbox.core.trace_options import OptionError, parse_signals

    if text is None:
        return ()
    try:
        return parse_signals("--signals", [name.strip() for name in text.split(",")])
    except OptionError as error:
        raise fail(str(error)) from None
