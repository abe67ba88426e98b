"""The command `glassbox bench`. Its options are those of `glassbox.cli.bench.serving`, which also prints the help."""

import importlib.util

import typer

from glassbox.cli.commands.common import fail

# Everything is passed on, --help too.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Measure what glassbox costs a small real model on this CPU (half an hour)."""
    missing = [name for name in ("vllm", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        raise fail(
            f"the benchmark needs {' and '.join(missing)}; from a clone of glassbox: "
            "tools/install_cpu.sh python '.[cpu,demo]'"
        )
    from glassbox.cli.bench.serving import main

    raise typer.Exit(main(context.args))
