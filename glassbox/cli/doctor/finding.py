"""What a check found: a stable id, how bad it is, what was seen, and what helps."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

from glassbox.core.printable import printable

# Longer texts are somebody else's, as a rule: an error's whole page, a label of a hostile server.
_LONGEST: Final = 600


class Status(StrEnum):
    """From good to bad; `unknown` is no judgement: it could not be looked at, and the finding says why."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    ERROR = "error"


EXIT_STATUS: Final = {Status.OK: 0, Status.UNKNOWN: 0, Status.WARNING: 1, Status.ERROR: 2}


@dataclass(frozen=True)
class Finding:
    """One of a check.

    Attributes:
        id: `area.what`, the same in each version; for programs.
        status: how bad it is.
        seen: one line; of an unknown one, why.
        remedy: one line; None where there is nothing to do.
    """

    id: str
    status: Status
    seen: str
    remedy: str | None = None

    @classmethod
    def of(cls, name: str, status: Status, seen: str, remedy: str | None = None) -> "Finding":
        """Whatever the texts hold: they are made printable."""
        return cls(name, status, one_line(seen), None if remedy is None else one_line(remedy))

    def as_json(self) -> dict[str, str | None]:
        """The attributes."""
        return {**asdict(self), "status": self.status.value}


def ok(name: str, seen: str) -> Finding:
    """All is well."""
    return Finding.of(name, Status.OK, seen)


def warning(name: str, seen: str, remedy: str) -> Finding:
    """Works, but not as it may have been meant."""
    return Finding.of(name, Status.WARNING, seen, remedy)


def error(name: str, seen: str, remedy: str) -> Finding:
    """Doesn't work, or lets others see what they must not."""
    return Finding.of(name, Status.ERROR, seen, remedy)


def unknown(name: str, why: str, remedy: str | None = None) -> Finding:
    """Could not be looked at."""
    return Finding.of(name, Status.UNKNOWN, why, remedy)


def exit_status(findings: list[Finding]) -> int:
    """Of the worst one: 0, 1 for warnings, 2 for errors."""
    return max((EXIT_STATUS[finding.status] for finding in findings), default=0)


def one_line(text: str) -> str:
    """A line of bounded length that a terminal may show."""
    shown = printable(" ".join(text.split()))
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."
