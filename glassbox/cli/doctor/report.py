"""Findings in words for a terminal, and as JSON for programs."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Final

from glassbox import __version__
from glassbox.cli.doctor.finding import Finding, Status, exit_status

_MARKS: Final = {Status.OK: "ok", Status.UNKNOWN: "unknown", Status.WARNING: "WARNING", Status.ERROR: "ERROR"}
_WIDTH: Final = max(map(len, _MARKS.values()))


def lines(finding: Finding) -> list[str]:
    """One, and one for the remedy if there is one."""
    told = [f"{_MARKS[finding.status]:{_WIDTH}}  {finding.id:20}  {finding.seen}"]
    if finding.remedy is not None:
        told.append(f"{'':{_WIDTH}}  {'':20}  -> {finding.remedy}")
    return told


def summary(findings: Sequence[Finding]) -> str:
    """How many of each."""
    counts = Counter(finding.status for finding in findings)
    names = {Status.ERROR: "errors", Status.WARNING: "warnings", Status.UNKNOWN: "unknown", Status.OK: "ok"}
    return ", ".join(f"{counts[status]} {name}" for status, name in names.items())


def document(findings: Sequence[Finding]) -> str:
    """JSON: version, exit status, findings with `id`, `status`, `seen` and `remedy`."""
    content = {
        "version": __version__,
        "exit_status": exit_status(list(findings)),
        "findings": [finding.as_json() for finding in findings],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)
