"""The command `glassbox dashboards`. Owns options, output and exit status.

It imports the generator when it runs: that needs the extra `dashboards`, which a server doesn't.
"""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

_NEEDED = {"grafana_foundation_sdk": "grafana-foundation-sdk", "promql_parser": "promql-parser"}


def dashboards(
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; exit with 1 if a file is stale or a query is wrong."),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="Directory that gets dashboards/, deploy/ and docs/metrics.md.", file_okay=False),
    ] = Path(),
) -> None:
    """Write Grafana's dashboards, Prometheus' rules, the files of the stack and the reference of metrics.

    Example: `glassbox dashboards --out /tmp/glassbox`, then import /tmp/glassbox/dashboards/glassbox-overview.json.
    """
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        typer.echo(
            f"glassbox: the dashboards need {' and '.join(missing)}; "
            "install the extra `dashboards`: pip install 'vllm-glassbox[dashboards]'",
            err=True,
        )
        raise typer.Exit(1)
    from glassbox.cli.dashboards import generated
    from glassbox.cli.dashboards.check import check_all
    from glassbox.cli.dashboards.rules import build_groups

    problems = check_all(generated.dashboards().values(), build_groups())
    if check:
        problems += generated.stale(out)
    for problem in problems:
        typer.echo(f"glassbox: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
    if check:
        typer.echo(f"{len(generated.render())} files are up to date")
        return
    changed = generated.write(out)
    for path in changed:
        typer.echo(str(path))
    typer.echo(f"{len(changed)} of {len(generated.render())} files written")
