"""What the exporter process says about itself, a file of the run directory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glassbox.store.trusted_file import read_json, write_file

STATUS_NAME: Final = "exporter.json"


@dataclass(frozen=True)
class ExporterStatus:
    """What the exporter process says about itself.

    Attributes:
        pid: of the exporter.
        time_s: Unix time of its last round.
        errors: by stage, of this and earlier exporters of the server.
    """

    pid: int
    time_s: float
    errors: Mapping[str, int]


def write_status(run_dir: Path, status: ExporterStatus) -> None:
    """Write the status file.

    Raises:
        OSError: if it cannot be written.
    """
    text = json.dumps({"pid": status.pid, "time_s": status.time_s, "errors": dict(status.errors)})
    write_file(Path(run_dir) / STATUS_NAME, text.encode())


def read_status(run_dir: Path) -> ExporterStatus | None:
    """The status file, or None if there is none that can be read."""
    try:
        content = read_json(Path(run_dir) / STATUS_NAME)
        errors = {str(stage): int(count) for stage, count in content["errors"].items()}
        return ExporterStatus(int(content["pid"]), float(content["time_s"]), errors)
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError):  # an Infinity is no int
        return None
