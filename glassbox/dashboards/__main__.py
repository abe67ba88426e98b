"""`python -m glassbox.dashboards`."""

import typer

from glassbox.dashboards.command import dashboards

if __name__ == "__main__":
    typer.run(dashboards)
