"""`python -m glassbox.cli.dashboards`."""

import typer

from glassbox.cli.dashboards.command import dashboards

if __name__ == "__main__":
    typer.run(dashboards)
