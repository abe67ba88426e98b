"""What traced requests were scored: a small file for each, as long as its trace is kept.

Owns the files and what may stand in them. The exporter scores a request once, when it has ended; the pages, the records
and the spans take it from here. What a score is made of is `signals/scores.py`'s.
"""

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from glassbox.core.files import FileVersion
from glassbox.store import recent_note
from glassbox.store.file_cache import FileCache
from glassbox.store.file_names import key_digest
from glassbox.store.trace_directory import TraceKey
from glassbox.store.trusted_file import list_files, make_folder, read_json, write_file

FOLDER: Final = "scores"
AWAITED_NAME: Final = "scores.awaited"
# Where nobody has asked for so long, no exporter is started for it.
AWAITED_S: Final = 600.0
_PREFIX: Final = "score-"
_SUFFIX: Final = ".json"
# A summary has 16 probes and a few hundred numbers, and on demand there are 32 layers x heads.
MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class StoredScores:
    """What is kept of one request.

    Attributes:
        summary: of `Scores.summary`.
        places: of signals on demand, which take long, by name and value: numbers [layer][head] at the trace's layers
            and heads, None for no value. Those of other signals are made again of the trace whenever they are shown.
        seconds: that scoring took.
    """

    summary: dict[str, Any]
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


class ScoreFiles:
    """The scores of a run directory; a file is read again only when it was replaced."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = Path(run_dir) / FOLDER
        self._files = FileCache(lambda name: _read(self._folder / name))
        self._versions: dict[str, FileVersion] = {}

    def write(self, key: TraceKey, scores: StoredScores) -> None:
        """Keep the scores of a request.

        Raises:
            OSError: they can't be written.
            ValueError: they are larger than `MAX_BYTES`.
        """
        data = json.dumps(vars(scores), allow_nan=False, separators=(",", ":")).encode()
        if len(data) > MAX_BYTES:
            raise ValueError(f"scores of a request must take at most {MAX_BYTES} bytes, got {len(data)}")
        make_folder(self._folder)
        write_file(self._folder / _name(key), data)

    def refresh(self) -> Mapping[str, FileVersion]:
        """Look at what is there now; `of` answers from it.

        Returns:
            the version of each file.

        Raises:
            OSError: the folder may not be listed.
        """
        self._versions = list_files(self._folder, _PREFIX, _SUFFIX)
        self._files.keep(self._versions)
        return self._versions

    def of(self, key: TraceKey) -> StoredScores | None:
        """The scores of a request; None if it has none, or they can't be read."""
        name = _name(key)
        version = self._versions.get(name)
        return None if version is None else self._files.of(name, version)

    def keep(self, keys: Collection[TraceKey]) -> None:
        """Remove the files of all other requests: their traces are gone.

        Raises:
            OSError: the folder may not be listed.
        """
        kept = {_name(key) for key in keys}
        for name in list_files(self._folder, _PREFIX, _SUFFIX):
            if name not in kept:
                with contextlib.suppress(OSError):
                    (self._folder / name).unlink()


def _name(key: TraceKey) -> str:
    return f"{_PREFIX}{key_digest(key)}{_SUFFIX}"


def _read(path: Path) -> StoredScores | None:
    try:
        content = read_json(path, MAX_BYTES)
        json.dumps(content, allow_nan=False)  # one that isn't JSON would make every list of requests none
        scores = StoredScores(**content)
        signals, probes, places = scores.summary["signals"], scores.summary["probes"], scores.places
        if (
            all(isinstance(of_signal, dict) for of_signal in places.values())
            and all(_is_probe(one) for one in probes.values())
            and all(isinstance(one["values"], dict) and _is(one.get("refused", ""), str) for one in signals.values())
        ):
            return scores
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return None


def _is_probe(content: dict[str, Any]) -> bool:
    """Whether what it says can be shown: a probability or none, and texts that are texts."""
    shares, texts = (content["score"], content.get("threshold")), (content.get("label"), content.get("reason"))
    return all(one is None or (_is(one, int, float) and 0 <= one <= 1) for one in shares) and all(
        one is None or isinstance(one, str) for one in texts
    )


def _is(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def note_awaited(run_dir: Path) -> None:
    """Tell the workers of this node that somebody was shown a request without what the exporter alone makes of it.

    Raises:
        OSError: it can't be written, or there is no run directory.
    """
    recent_note.note(Path(run_dir) / AWAITED_NAME)


def are_awaited(run_dir: Path) -> bool:
    """Whether somebody was of late."""
    return recent_note.is_recent(Path(run_dir) / AWAITED_NAME, AWAITED_S)
