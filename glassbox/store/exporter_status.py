"""What the exporter process says about itself, a file of the run directory."""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        sinks: those that the configuration asks for, by the name of their stage: Unix time of the last success, 0 if
            there was none yet.
        restarts: how many exporters of the server ended without having been asked to.
        ended: it has done its last round.
        actions: how often each action of each rule had each outcome, by "rule|action|outcome".
    """

    pid: int
    time_s: float
    errors: Mapping[str, int]
    sinks: Mapping[str, float] = field(default_factory=dict)
    restarts: int = 0
    ended: bool = False
    actions: Mapping[str, int] = field(default_factory=dict)


def write_status(run_dir: Path, status: ExporterStatus) -> None:
    """Write the status file; on a full disk in the place of the older one, which takes no room.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(run_dir) / STATUS_NAME
    data = json.dumps(vars(status), default=dict).encode()
    try:
        write_file(path, data)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        try:
            _overwrite(path, data)
        except OSError:
            raise error from None


def _overwrite(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # Blanks over what was longer: a reader of the half-way state finds no JSON, or the new one.
        size = os.fstat(handle).st_size
        os.pwrite(handle, data.ljust(size), 0)
    finally:
        os.close(handle)


def read_status(run_dir: Path) -> ExporterStatus | None:
    """The status file, or None if there is none that can be read."""
    try:
        content = read_json(Path(run_dir) / STATUS_NAME)
        return ExporterStatus(
            int(content["pid"]),
            float(content["time_s"]),
            {str(stage): int(count) for stage, count in content["errors"].items()},
            {str(sink): float(time_s) for sink, time_s in content["sinks"].items()},
            int(content["restarts"]),
            bool(content["ended"]),
            {str(key): int(count) for key, count in content["actions"].items()},
        )
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError):  # an Infinity is no int
        return None
