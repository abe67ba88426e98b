"""tools/models_table.py: docs/models.md says what docs/data/models.json does, and that has every family."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.table import FAMILIES
from tools import models_table
from tools.models_table import DOCUMENTS, FIELDS, families, kinds, markers, read, record, with_tables


def row(family: str, *parts: tuple[str, int, str | None], **changes: Any) -> dict[str, Any]:
    layers = [{"kind": kind, "layers": list(range(count)), "reason": reason} for kind, count, reason in parts]
    return {
        **FIELDS,
        "family": family,
        "architecture": f"{family}ForCausalLM",
        "layers": layers,
        "deviation": 1.2e-5,
        "tokens_equal": True,
        "vllm": "0.9.0",
        "date": "2026-11-30",
        "command": "make families",
        **changes,
    }


class TestCommitted:
    def test_documents_are_current(self) -> None:
        """If not: tools/models_table.py."""
        for path in DOCUMENTS:
            text = path.read_text(encoding="utf-8")
            assert with_tables(text, read()) == text

    def test_every_family_has_a_row(self) -> None:
        """And what it says is what the table of families expects. If not: make families."""
        rows = {row["family"]: row for row in read()}
        assert {family.name for family in FAMILIES} == rows.keys()
        for family in FAMILIES:
            found = rows[family.name]
            assert (family.special, family.fault) == (found["special"], found["fault"])
            assert bool(family.unserved) == bool(found["unserved"])
            if not family.unserved and not family.fault:
                assert found["tokens_equal"]
                assert bool(family.observed) == (found["deviation"] is not None)
                assert (found["deviation"] or 0) <= family.tolerance

    def test_names_are_distinct(self) -> None:
        """One row of the record a family."""
        assert len(FAMILIES) == len({family.name for family in FAMILIES})


class TestFamilies:
    def test_cells(self) -> None:
        """What is observed and what isn't and why; what is compared with something else; what is wrong."""
        rows = [
            row("A", ("causal", 1, None), ("chunked local", 3, "chunked_local"), special="chunks"),
            row("B", ("ALiBi", 2, None), truth="float64", differs="another GELU"),
            row("C", unserved="ValueError: no `kernel`|none", deviation=None, tokens_equal=None),
            row("D", ("MLA", 2, "mla"), fault="nothing is said", deviation=None),
        ]
        run = "0.9.0, 2026-11-30, `make families`"
        assert [
            f"| A | `AForCausalLM` | chunks | causal (1 layer) | chunked local: chunked_local (3 layers) | 1e-05 "
            f"| equal | {run} |",
            f"| B | `BForCausalLM` | - | ALiBi (2 layers) | - | 1e-05 (float64: another GELU) | equal | {run} |",
            f"| C | `CForCausalLM` | - | vLLM can't serve it on a CPU | `ValueError: no kernel/none` | - | - | {run} |",
            f"| D | `DForCausalLM` | - | **wrong** | nothing is said | - | equal | {run} |",
        ] == families(rows).splitlines()[2:]


class TestKinds:
    def test_cells(self) -> None:
        """The most common kind first; a family that is wrong, or not observed, is not among those that are."""
        rows = [
            row("A", ("window", 1, None), ("causal", 1, None), deviation=3e-6),
            row("B", ("causal", 2, None), deviation=2e-5),
            row("C", ("causal", 2, None), fault="off by one", deviation=1.0),
            row("D", ("MLA", 2, "mla"), deviation=None),
            row("E", ("MLA", 2, None), unserved="ValueError"),
        ]
        assert [
            "| causal | A, B | C (wrong) | 2e-05 |",
            "| window | A | - | 3e-06 |",
            "| MLA | - | D (mla) | - |",
        ] == kinds(rows).splitlines()[2:]

    def test_many_families(self) -> None:
        """The first eight are named."""
        rows = [row(f"F{n}", ("causal", 2, None)) for n in range(10)]
        assert "| F0, F1, F2, F3, F4, F5, F6, F7, and 2 more |" in kinds(rows)


class TestDocuments:
    def test_between_the_markers(self) -> None:
        """What stands around them stays, and a text may have one table alone."""
        begin, end = markers("kinds of attention")
        rows = [row("A", ("causal", 2, None))]
        assert f"a\n{begin}\n{kinds(rows)}\n{end}\nb\n" == with_tables(f"a\n{begin}\nold\n{end}\nb\n", rows)
        assert "a\n" == with_tables("a\n", rows)


class TestRecord:
    def test_rows_are_merged(self, tmp_path: Path) -> None:
        """By family; what a new row doesn't say was not found out."""
        path = tmp_path / "models.json"
        record(path, [row("b"), row("A")])
        record(path, [{"family": "b", "date": "2026-12-01"}])
        assert ["A", "b"] == [one["family"] for one in read(path)]
        assert {**FIELDS, "family": "b", "date": "2026-12-01"} == read(path)[1]

    def test_other_fields(self, tmp_path: Path) -> None:
        """Are refused, with those that there are."""
        path = tmp_path / "models.json"
        with pytest.raises(ValueError, match=r"must have fields of family.*got colour"):
            record(path, [{**row("A"), "colour": "red"}])
        path.write_text(json.dumps({"results": [{"family": "A"}]}), encoding="utf-8")
        with pytest.raises(ValueError, match="must have the fields family, architecture"):
            read(path)

    def test_no_file(self, tmp_path: Path) -> None:
        """Nothing was run yet."""
        assert [] == read(tmp_path / "models.json")


class TestCommand:
    def test_write_and_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checking fails until it was written."""
        document, data = tmp_path / "models.md", tmp_path / "models.json"
        document.write_text("\n".join(markers("families")), encoding="utf-8")
        record(data, [row("A")])
        monkeypatch.setattr(models_table, "DOCUMENTS", (document,))
        monkeypatch.setattr(models_table, "read", lambda: read(data))
        assert [1, 0, 0] == [models_table.main(arguments) for arguments in (["--check"], [], ["--check"])]
        assert "| A |" in document.read_text(encoding="utf-8")
