"""The subcommands of `glassbox`, one module each: options, examples, output, exit status.

`glassbox.cli` imports all of them, so what they need beyond typer they import when they run.
"""
