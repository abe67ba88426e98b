"""The tables of docs/models.md: families of models, and kinds of attention, made of what was served and compared.

Owns docs/data/models.json: a row for each family of tests/families/table.py, which `make families` writes. README can
have the summary, too: whatever file has its markers.

    python -m tools.models_table            # write them
    python -m tools.models_table --check    # fail if a file is not current
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tools.recorded_rows import Row, between, read_rows, write_rows

ROOT: Final = Path(__file__).resolve().parents[1]
DATA: Final = ROOT / "docs" / "data" / "models.json"
DOCUMENTS: Final = (ROOT / "docs" / "models.md", ROOT / "README.md")
COMMAND: Final = "make families"
# Of a row in this order, with what stands there where a run said nothing. `layers` are parts of one kind of attention
# each: kind, layers, and the reason if they are not observed.
FIELDS: Final[Mapping[str, Any]] = {
    "family": "",
    "architecture": "",
    "special": "",
    "layers": [],
    "truth": "",
    "differs": "",
    "deviation": None,
    "tokens_equal": None,
    "unserved": "",
    "fault": "",
    "vllm": "",
    "date": "",
    "command": "",
}
_FAMILIES_HEAD: Final = (
    "| family | architecture | what it has | observed | not observed | largest deviation | tokens | run |",
    "|---|---|---|---|---|---|---|---|",
)
_KINDS_HEAD: Final = (
    "| attention | observed | not observed | largest deviation |",
    "|---|---|---|---|",
)

# Families that a line of the summary names.
_NAMED: Final = 8


def read(path: Path = DATA) -> list[Row]:
    """The rows; see `read_rows`."""
    return read_rows(path, FIELDS)


def record(path: Path, rows: Sequence[Row]) -> None:
    """Write rows over those of the same families; others stay. What a row doesn't say was not found out.

    Raises:
        ValueError: a row has a field that there isn't.
    """
    known = {row["family"]: row for row in read(path)}
    for row in rows:
        if unknown := row.keys() - FIELDS.keys():
            raise ValueError(f"a row must have fields of {', '.join(FIELDS)}, got {', '.join(sorted(unknown))}")
        known[row["family"]] = {**FIELDS, **row}
    write_rows(path, [known[name] for name in sorted(known, key=str.casefold)])


def families(rows: Sequence[Row]) -> str:
    """A line for each, in Markdown."""
    return "\n".join([*_FAMILIES_HEAD, *(f"| {' | '.join(_cells(row))} |" for row in rows)])


def _cells(row: Row) -> Iterable[str]:
    observed = [part for part in row["layers"] if part["reason"] is None]
    others = [part for part in row["layers"] if part["reason"] is not None]
    yield row["family"]
    yield f"`{row['architecture']}`"
    yield row["special"] or "-"
    if row["unserved"]:
        yield from ("vLLM can't serve it on a CPU", _code(row["unserved"]), "-", "-")
    elif row["fault"]:
        yield from ("**wrong**", row["fault"], "-", _tokens(row))
    else:
        yield _kinds(observed) or "-"
        yield "<br>".join(f"{part['kind']}: {part['reason']} ({_layers(part)})" for part in others) or "-"
        yield _deviation([row]) + (f" ({row['truth']}: {row['differs']})" if row["differs"] else "")
        yield _tokens(row)
    yield f"{row['vllm']}, {row['date']}, `{row['command']}`"


def _code(text: str) -> str:
    return f"`{text.replace('|', '/').replace('`', '')}`"


def _kinds(parts: Sequence[Row]) -> str:
    return "<br>".join(f"{part['kind']} ({_layers(part)})" for part in parts)


def _layers(part: Row) -> str:
    count = len(part["layers"])
    return f"{count} layer{'s' * (count != 1)}"


def _tokens(row: Row) -> str:
    return {True: "equal", False: "**differ**", None: "-"}[row["tokens_equal"]]


def _deviation(rows: Iterable[Row]) -> str:
    found = [row["deviation"] for row in rows if row["deviation"] is not None]
    return f"{max(found):.0e}" if found else "-"


def kinds(rows: Sequence[Row]) -> str:
    """A line for each kind of attention, in Markdown: the most common first."""
    served = [row for row in rows if row["layers"] and not row["unserved"]]
    names = dict.fromkeys(part["kind"] for row in served for part in row["layers"])
    by_kind = {kind: [row for row in served if kind in {part["kind"] for part in row["layers"]}] for kind in names}
    lines = list(_KINDS_HEAD)
    for kind, of in sorted(by_kind.items(), key=lambda one: -len(one[1])):
        observed, others = [], []
        for row in of:
            reasons = {part["reason"] for part in row["layers"] if part["kind"] == kind} - {None}
            if row["fault"]:
                others.append(f"{row['family']} (wrong)")
            elif reasons:
                others.append(f"{row['family']} ({', '.join(sorted(reasons))})")
            else:
                observed.append(row)
        cells = [kind, _names(observed), ", ".join(others) or "-", _deviation(observed)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _names(rows: Sequence[Row]) -> str:
    names = [row["family"] for row in rows]
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more]) or "-"


TABLES: Final = {"families": families, "kinds of attention": kinds}


def with_tables(text: str, rows: Sequence[Row]) -> str:
    """A text with each table of which it has the markers between them."""
    for name, table in TABLES.items():
        text = between(text, *markers(name), table(rows)) or text
    return text


def markers(table: str) -> tuple[str, str]:
    """Lines between which a table stands."""
    return f"<!-- {table}: tools/models_table.py -->", f"<!-- end of {table} -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables, or say whether they are current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file is not current")
    args = parser.parse_args(arguments)
    status = 0
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        current = with_tables(text, read())
        if args.check and text != current:
            print(f"{path.name}: tables are not current; run python -m tools.models_table", file=sys.stderr)
            status = 1
        elif text != current:
            path.write_text(current, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
