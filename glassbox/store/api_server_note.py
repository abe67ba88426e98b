"""That an API server reads the run directory, told by it in a file there: its /metrics shows what lies in it.

A node has a run directory of its own, and not every node has an API server.
"""

from pathlib import Path
from typing import Final

from glassbox.store.trusted_file import exists, write_file

NAME: Final = "api_server"


def write_note(run_dir: Path) -> None:
    """Tell the workers of this node.

    Raises:
        OSError: it can't be written, or there is no run directory.
    """
    write_file(Path(run_dir) / NAME, b"")


def is_noted(run_dir: Path) -> bool:
    """Whether an API server has told it."""
    return exists(Path(run_dir) / NAME)
