"""tools/signals_table.py: docs/signals.md says what the table of signals does."""

from importlib import import_module
from pathlib import Path

import pytest

from glassbox.core.signal_table import SIGNALS, Signal
from glassbox.signals.registry import COMPUTE
from tools import signals_table
from tools.signals_table import BEGIN, DOCUMENT, END, table, with_table

SIGNAL = Signal(
    name="heat",
    prompt=True,
    arrays=("stats",),
    cost="streaming",
    values=("hot", "eigval_0", "eigval_1", "eigval_2", "total"),
    meaning="How warm ||A|| is.",
    formula="hot = |a|; total = sum",
    source="nobody",
    bounds="none",
    refuses="it is cold",
    of_request=("total",),
    by_span=("hot",),
    by_token=("row",),
)


class TestCommitted:
    def test_the_document_is_current(self) -> None:
        """If not: tools/signals_table.py."""
        text = DOCUMENT.read_text(encoding="utf-8")
        assert with_table(text) == text

    def test_the_module_of_each_has_its_formula(self) -> None:
        """The module of a signal begins with its name and what it is."""
        for signal in SIGNALS:
            module = import_module(COMPUTE[signal.name].__module__)
            assert (module.__doc__ or "").startswith(f"`{signal.name}`: ")


class TestTable:
    def test_cells(self) -> None:
        """Numbered values are one, bars don't end a cell, and what there is one of a request, span or token is told."""
        (line,) = table([SIGNAL]).splitlines()[2:]
        assert (
            "| `heat` | How warm ‖A‖ is | `hot`<br>`eigval_0` ... `2`<br>`hot_SPAN`<br>`total` (of the request)<br>"
            "`row` (by token) | `hot = \\|a\\|`<br>`total = sum` | nobody | streaming, all rows | none | it is cold |"
        ) == line

    def test_without_a_place(self) -> None:
        """Nothing is written into another text."""
        with pytest.raises(ValueError, match="must have the lines <!-- signals"):
            with_table("a")


class TestCommand:
    def test_write_and_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checking fails until it was written."""
        document = tmp_path / "signals.md"
        document.write_text(f"a\n{BEGIN}\n{END}\n", encoding="utf-8")
        monkeypatch.setattr(signals_table, "DOCUMENT", document)
        assert [1, 0, 0] == [signals_table.main(arguments) for arguments in (["--check"], [], ["--check"])]
        assert "| `spectral` |" in document.read_text(encoding="utf-8")
