"""What the commands share: one-line errors, missing packages, common options and their completion."""

import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glassbox.core.printable import printable
from glassbox.core.statistics import STATISTICS, Phase

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_WITHOUT_TERMINAL = 120


class PhaseChoice(StrEnum):
    """A phase, or both."""

    DECODE = "decode"
    PREFILL = "prefill"
    ALL = "all"

    @property
    def phase(self) -> Phase | None:
        """None is both."""
        return None if self == PhaseChoice.ALL else Phase(self.value)


def fail(message: str, status: int = 1) -> typer.Exit:
    """Print an error to stderr, as one line whatever is in it; raise what this returns."""
    typer.echo(f"glassbox: {printable(' '.join(message.split()))}", err=True)
    return typer.Exit(status)


def require(extra: str, what: str, *modules: str, status: int = 1) -> None:
    """End with a remedy if a package of an extra isn't installed.

    Raises:
        typer.Exit: one is missing.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        remedy = f"install the extra `{extra}`: pip install 'vllm-glassbox[{extra}]'"
        raise fail(f"{what} needs {' and '.join(missing)}; {remedy}", status)


@contextmanager
def one_line_errors(status: int = 1) -> Iterator[None]:
    """Whatever can't be read, shown or written ends the command with one line: its input may be anybody's."""
    from glassbox.view.measured import ViewError

    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise  # has been said; of a pipe that nobody reads any more there is nothing to say
    except ViewError as error:
        raise fail(str(error), status) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise fail(f"{where}{error.strerror or error}; choose another path", status) from None
    except Exception as error:
        # The place helps whoever mends it.
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}"[:300]
        where = f"{Path(place.filename).name}:{place.lineno}"
        raise fail(f"can't make sense of that ({what}, at {where}); is it of glassbox, and whole?", status) from None


def wide_console() -> "Console":
    """A console that is wide enough for a table where no terminal says otherwise (a pipe, CI)."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


def check_output(path: Path, *suffixes: str) -> None:
    """End before the work begins if its result could not be written.

    Raises:
        typer.Exit: the suffix is none of those, or there is no such directory.
    """
    if path.suffix.lower() not in suffixes:
        raise fail(f"--output must end with {' or '.join(suffixes)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise fail(f"--output must be in a directory that exists, got {str(path)!r}; make {path.parent} first")


def complete_statistic(incomplete: str) -> list[tuple[str, str]]:
    """Statistics that begin so, with their meaning."""
    return [(s.name, s.meaning) for s in STATISTICS if s.exported and s.name.startswith(incomplete)]


PhaseOption = Annotated[PhaseChoice, typer.Option("--phase", help="Of the rows: generated tokens, the prompt's, both.")]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", help="Only this engine, by its label; without it all are added.", show_default=False),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="GLASSBOX_API_KEY",
        help="Sent to a server as a bearer token. Better by the variable: others see a command's options.",
        show_default=False,
    ),
]
HeaderOption = Annotated[
    list[str] | None,
    typer.Option(
        "--header", metavar="'NAME: VALUE'", help="Sent to a server, too; may be repeated.", show_default=False
    ),
]
