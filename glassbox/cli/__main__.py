"""`python -m glassbox.cli`: the command `glassbox`."""

from glassbox.cli.main import main

main()
