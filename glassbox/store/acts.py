"""What rules did about a request: small files of the run directory, for its record, span and page.

Owns the files, one for each request about which something was done, and the names of actions and outcomes. The exporter
writes them; every process of the server reads them.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from glassbox.store.file_names import key_digest
from glassbox.store.trace_directory import TraceKey
from glassbox.store.trusted_file import list_files, make_folder, read_json, write_file

FOLDER: Final = "acts"
# As many as traces are usually kept, and more.
MAX_FILES: Final = 4096
# Rules times actions.
MAX_ACTS: Final = 128
# Listing many files takes its time.
PRUNE_EVERY: Final = 256
_MAX_BYTES: Final = 1 << 16

ACTIONS: Final = ("log", "tag", "abort", "webhook")
# Values of the label `outcome`, and what each means.
OUTCOMES: Final = {
    "done": "it was done; of a webhook: the receiver accepted it",
    "dry_run": "it would have been done, but the rule is a dry run",
    "limited": "the rule had reached per_minute",
    "late": "the request had ended already",
    "dropped": "too many others waited",
    "failed": "nobody took it: no API server has the request, the receiver refused or could not be reached, or the "
    "event was too large",
}


def count_key(rule: str, action: str, outcome: str) -> str:
    """By which it is counted in the exporter's status."""
    return f"{rule}|{action}|{outcome}"


@dataclass(frozen=True)
class Act:
    """One thing that a rule did, or would have done.

    Attributes:
        rule: its name.
        action, outcome: see ACTIONS and OUTCOMES.
        value: that it found; None if it isn't finite.
        time_s: Unix time at which it applied.
    """

    rule: str
    action: str
    outcome: str
    value: float | None
    time_s: float


class Acts:
    """The files of one server, for their writer.

    Args:
        run_dir: of the server.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._written = 0

    def note(self, key: TraceKey, acts: Iterable[Act]) -> None:
        """Add to what was done about a request.

        Raises:
            OSError: it can't be written.
        """
        done = [*acts_of(self._run_dir, key), *acts][-MAX_ACTS:]
        path = _path(self._run_dir, key)
        make_folder(path.parent)
        write_file(path, json.dumps([asdict(one) for one in done]).encode())
        self._written += 1
        if self._written % PRUNE_EVERY == 0:
            self._prune()

    def _prune(self) -> None:
        folder = self._run_dir / FOLDER
        found = sorted((time_ns, name) for name, (_, time_ns, _) in list_files(folder, "", ".json").items())
        for _, name in found[: max(len(found) - MAX_FILES, 0)]:
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def acts_of(run_dir: Path, key: TraceKey) -> list[Act]:
    """What was done about a request, oldest first; empty if nothing was, or if it can't be read."""
    try:
        content = read_json(_path(run_dir, key), _MAX_BYTES)
        return [_decode(one) for one in content]
    except (OSError, ValueError, TypeError, ArithmeticError):
        return []


def tags_of(acts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the rules that have tagged a request, of the fields of its acts."""
    return sorted({act["rule"] for act in acts if (act["action"], act["outcome"]) == ("tag", "done")})


def _decode(content: dict[str, Any]) -> Act:
    act = Act(**content)
    value = None if act.value is None else float(act.value)
    if not all(isinstance(text, str) for text in (act.rule, act.action, act.outcome)):
        raise TypeError("names must be texts")
    if value is not None and not math.isfinite(value):
        value = None
    time_s = float(act.time_s)
    if not math.isfinite(time_s):
        raise ValueError("a time must be finite")
    return Act(act.rule, act.action, act.outcome, value, time_s)


def _path(run_dir: Path, key: TraceKey) -> Path:
    return Path(run_dir) / FOLDER / f"{key_digest(key)}.json"
