"""The table of vLLM releases in README, made of what was tested.

Owns docs/data/releases.json: a row for each release and device that something was run on, or `source` where its files
were only read, with the outcome of each check. `make releases` writes the rows of this machine's CPU; rows of others
(a GPU) are added by hand or by whoever tests there, and stay.

    python -m tools.releases_table            # write it into README
    python -m tools.releases_table --check    # fail if README is not current
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools.recorded_rows import Row, between, read_rows, write_rows

ROOT: Final = Path(__file__).resolve().parents[1]
DATA: Final = ROOT / "docs" / "data" / "releases.json"
README: Final = ROOT / "README.md"
# Devices that are no hardware's name.
SOURCE, CPU = "source", "cpu"
BEGIN: Final = "<!-- releases: tools/releases_table.py -->"
END: Final = "<!-- end of releases -->"
# Of a row, in this order; `checks` maps names to pytest's words.
FIELDS: Final = ("release", "version", "device", "torch", "python", "date", "command", "checks")
_HEAD: Final = (
    "| vLLM | read | on a CPU | on a GPU |",
    "|---|---|---|---|",
)
# Checks in the order of the table; others come after these.
_ORDER: Final = ("internals", "smoke", "served")


def read(path: Path = DATA) -> list[Row]:
    """The rows; see `read_rows`."""
    return read_rows(path, FIELDS)


def record(path: Path, rows: Sequence[Row]) -> None:
    """Write rows over those of the same release and device; checks that were not repeated stay, as do other rows."""
    known = {(row["release"], row["device"]): row for row in read(path)}
    for row in rows:
        key = (row["release"], row["device"])
        before = known.get(key)
        same = before is not None and before["version"] == row["version"]
        known[key] = {**row, "checks": {**(before["checks"] if before and same else {}), **row["checks"]}}
    ordered = sorted(known.values(), key=lambda row: (_number(row["release"]), row["device"]))
    write_rows(path, [{name: row[name] for name in FIELDS} for row in ordered])


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def table(rows: Sequence[Row]) -> str:
    """In Markdown, newest release first."""
    lines = list(_HEAD)
    for release in sorted({row["release"] for row in rows}, key=_number, reverse=True):
        of = [row for row in rows if row["release"] == release]
        read_only = [row for row in of if row["device"] == SOURCE]
        cpu = [row for row in of if row["device"] == CPU]
        others = [row for row in of if row["device"] not in {SOURCE, CPU}]
        version = max((row["version"] for row in of), key=_number)
        cells = [version, _cell(read_only), _cell(cpu), _cell(others, named=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row], *, named: bool = False) -> str:
    return "<br>".join(_result(row, named=named) for row in rows) or "-"


def _result(row: Row, *, named: bool) -> str:
    checks = sorted(row["checks"].items(), key=lambda check: [*_ORDER, check[0]].index(check[0]))
    failed = [name for name, outcome in checks if outcome != "passed"]
    passed = [name for name, outcome in checks if outcome == "passed"]
    where = [row["device"]] * named + [f"torch {row['torch'].partition('+')[0]}"] * (row["device"] != SOURCE)
    said = f"**failed: {', '.join(failed)}**" if failed else ", ".join(passed)
    return f"{said} ({', '.join([*where, row['date']])})"


def with_table(text: str, rows: Sequence[Row]) -> str:
    """A text with the table between its markers.

    Raises:
        ValueError: it has no markers.
    """
    changed = between(text, BEGIN, END, table(rows))
    if changed is None:
        raise ValueError(f"the text must have the lines {BEGIN} and {END}")
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, or say whether it is current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if README is not current")
    args = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    current = with_table(text, read())
    if args.check:
        if text != current:
            print("README.md: not current; run python -m tools.releases_table", file=sys.stderr)
        return int(text != current)
    README.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
