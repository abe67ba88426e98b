"""A process of another server, or of the same one, with its run directory."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
# Says where its run directory is, then ends when its standard input does.
_PROGRAM = (
    "from glassbox.store import ownership, rundir; ownership.settle(); print(rundir.run_dir(), flush=True); input()"
)


class OtherProcess:
    """One that has settled in a run directory."""

    def __init__(self, environ: dict[str, str], program: str = _PROGRAM) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GLASSBOX_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**clean, **environ},
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.run_dir = Path(self.process.stdout.readline().strip())

    def kill(self) -> str:
        """What it had logged."""
        self.process.kill()
        return self.process.communicate()[1]
