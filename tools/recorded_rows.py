"""Rows of what was run, kept as JSON, and the tables that documents have of them between two marker lines.

Owns the file and the markers; what a row says, and how it is shown, is `releases_table.py`'s and `models_table.py`'s.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def read_rows(path: Path, fields: Collection[str]) -> list[Row]:
    """The rows; none if there is no file.

    Args:
        fields: of every row, in this order.

    Raises:
        ValueError: a row lacks a field, or has one more.
    """
    if not path.is_file():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["results"]
    for row in rows:
        if list(row) != list(fields):
            raise ValueError(f"a row of {path.name} must have the fields {', '.join(fields)}, got {', '.join(row)}")
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, one a line, so that a change shows as one."""
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    path.write_text(f'{{\n  "results": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def between(text: str, begin: str, end: str, table: str) -> str | None:
    """A text with a table between two lines of it; None if it hasn't got these."""
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}" if found and ended else None
