"""The command `glassbox doctor`. Owns options, output and exit status."""

from pathlib import Path
from typing import Annotated

import typer

from glassbox.cli.commands.common import fail


def doctor(
    url: Annotated[
        str | None,
        typer.Option(
            help="Of the server, such as http://localhost:8000; without it your only one here.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="The YAML; without it the server's, or the one that vLLM would find.", show_default=False),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the model to serve.", show_default=False)] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Run directory of a server; without it those of your servers here.", show_default=False),
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="URL of a Prometheus that should scrape the server.", show_default=False)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key of the server. The variable doesn't show in `ps`.", envvar="GLASSBOX_API_KEY",
                     show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document, for programs.")] = False,
) -> None:  # fmt: skip
    """Look at an installation and a running server, and say what is wrong and what helps.

    Exit status: 0 if all is well, 1 for warnings, 2 for errors; what could not be
    looked at is `unknown`, with the reason, and counts for nothing.

    \b
    Examples:
      glassbox doctor                                this installation, and your servers here
      glassbox doctor --url http://localhost:8000    a server as others see it
      glassbox doctor --model models/qwen            would its layers be observed?
      glassbox doctor --json | jq '.findings[] | select(.status == "error")'
    """
    from glassbox.cli.doctor.checks import examine
    from glassbox.cli.doctor.finding import Status, exit_status
    from glassbox.cli.doctor.question import Question
    from glassbox.cli.doctor.report import document, lines, summary
    from glassbox.view.measured import ViewError

    try:
        question = Question(
            url=None if url is None else _base(url),
            config=None if config is None else config.absolute(),
            model=model,
            run_dir=run_dir,
            prometheus=None if prometheus is None else _base(prometheus),
            api_key=api_key or None,
        ).or_only_server()
    except ViewError as error:
        raise fail(str(error), 2) from None
    findings = []
    for finding in examine(question):
        findings.append(finding)
        if not as_json:  # as it comes: some take seconds
            for line in lines(finding):
                typer.secho(line, fg={Status.ERROR: "red", Status.WARNING: "yellow"}.get(finding.status))
    typer.echo(document(findings) if as_json else f"\n{summary(findings)}")
    raise typer.Exit(exit_status(findings))


def _base(text: str) -> str:
    """A URL without `/metrics` and the slash at its end; `http://` may be left out.

    Raises:
        ViewError: it is none.
    """
    from glassbox.view.scrape import metrics_url

    return metrics_url(text).removesuffix("/metrics").rstrip("/")
