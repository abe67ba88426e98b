"""The table of docs/signals.md, made of `glassbox/core/signal_table.py`.

python -m tools.signals_table            # write it
python -m tools.signals_table --check    # fail if the document is not current
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from glassbox.core.signal_table import SIGNALS, Signal
from tools.recorded_rows import between

ROOT: Final = Path(__file__).resolve().parents[1]
DOCUMENT: Final = ROOT / "docs" / "signals.md"
BEGIN: Final = "<!-- signals: tools/signals_table.py -->"
END: Final = "<!-- end of signals -->"
_HEAD: Final = (
    "| signal | what it tells | values | formula | source | cost | bounds | no value if |",
    "|---|---|---|---|---|---|---|---|",
)
_NUMBERED: Final = re.compile(r"(?P<name>.*)_(?P<number>\d+)")


def table(signals: Sequence[Signal] = SIGNALS) -> str:
    """A line for each, in Markdown."""
    return "\n".join([*_HEAD, *(f"| {' | '.join(_cells(signal))} |" for signal in signals)])


def _cells(signal: Signal) -> Iterable[str]:
    yield f"`{signal.name}`"
    yield _cell(signal.meaning)
    yield "<br>".join(_values(signal))
    yield f"`{_cell(signal.formula)}`".replace("; ", "`<br>`")
    yield _cell(signal.source)
    yield signal.cost + (", all rows" if signal.prompt else "")
    yield _cell(signal.bounds)
    yield _cell(signal.refuses)


def _values(signal: Signal) -> Iterable[str]:
    """Names, those that are numbered as one, and what there is one of."""
    of_request = [name for name in signal.values if name in signal.of_request]
    of_places = [name for name in signal.values if name not in signal.of_request]
    yield from _joined(of_places)
    yield from (f"`{name}_SPAN`" for name in signal.by_span)
    yield from (f"{name} (of the request)" for name in _joined(of_request))
    yield from (f"{name} (by token)" for name in _joined(signal.by_token))


def _joined(names: Iterable[str]) -> Iterable[str]:
    last: dict[str, str] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        last[match["name"] if match else name] = match["number"] if match else ""
    return (f"`{name}_0` ... `{number}`" if number else f"`{name}`" for name, number in last.items())


def _cell(text: str) -> str:
    """A cell's text: a bar would end it."""
    return text.rstrip(".").replace("||", "‖").replace("|", "\\|")


def with_table(text: str) -> str:
    """A document with the table in its place.

    Raises:
        ValueError: it has no such place.
    """
    changed = between(text, BEGIN, END, table())
    if changed is None:
        raise ValueError(f"the text must have the lines {BEGIN} and {END}")
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, or say whether it is current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if it is not current")
    args = parser.parse_args(arguments)
    text = DOCUMENT.read_text(encoding="utf-8")
    current = with_table(text)
    if args.check:
        if text != current:
            print("docs/signals.md: not current; run python -m tools.signals_table", file=sys.stderr)
        return int(text != current)
    DOCUMENT.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
