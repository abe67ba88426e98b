"""Ten ways in which a configuration file can be broken, and what glassbox must say about each."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class Broken:
    """One way to break the file.

    Attributes:
        name: of the test case.
        apply: breaks the file at a path, where a good one may be.
        problem: what the message says after the path: key, rule, value and remedy, as far as there are such.
        lacks_permission: True if it shows only to a process that may not read every file.
    """

    name: str
    apply: Callable[[Path], None]
    problem: str
    lacks_permission: bool = False

    def message(self, path: Path) -> str:
        """The error's whole line."""
        return f"{path}: {self.problem}"


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: _write(path, text.encode())


def _write(path: Path, data: bytes) -> None:
    # In place, as `echo > file` does: a half-written file is part of the case.
    path.write_bytes(data)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)


def _directory(path: Path) -> None:
    _delete(path)
    path.mkdir()


def _forbid(path: Path) -> None:
    path.touch()
    path.chmod(0)


BROKEN: Final = (
    Broken(
        "bad-yaml",
        _text("sample_rate: [0.5\nlog_level: info\n"),
        "is not valid YAML in line 2, column 10: expected ',' or ']', but got ':'; "
        "check quotes, colons and indentation there",
    ),
    Broken("unknown-key", _text("sample_rat: 0.5\n"), "sample_rat is not a known key; did you mean sample_rate?"),
    Broken(
        "wrong-type",
        _text("sampling:\n  max_rows_per_step: many\n"),
        "sampling.max_rows_per_step must be a whole number, got the string 'many'; write a plain number",
    ),
    Broken(
        "out-of-range",
        _text("sample_rate: 3\n"),
        "sample_rate must be between 0 and 1, got 3; use 0 to stop sampling",
    ),
    Broken("empty", _text(""), "must not be empty; write at least `enabled: true`"),
    Broken("deleted", _delete, "must be a file, but does not exist; create it or correct GLASSBOX_CONFIG"),
    Broken(
        "not-utf8",
        lambda path: _write(path, "log_level: info  # für alle\n".encode("latin-1")),
        "must be UTF-8 text, got byte 0xfc at offset 20; save it as UTF-8",
    ),
    Broken("directory", _directory, "must be a file, got a directory; name the YAML file in it"),
    Broken(
        "no-permission",
        _forbid,
        f"must be readable by user {os.geteuid()}, permission denied; use chmod",
        lacks_permission=True,
    ),
    Broken(
        "junk",
        lambda path: _write(path, os.urandom(5_000_000)),
        "must be at most 1000000 bytes, got more; is it the right file?",
    ),
)
