"""tools/releases_table.py: README's table of vLLM releases is what docs/data/releases.json says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools import releases_table
from tools.releases_table import BEGIN, END, read, record, table, with_table
from tools.vllm_releases import releases


def row(release: str, device: str, **changes: Any) -> dict[str, Any]:
    return {
        "release": release,
        "version": f"{release}.0",
        "device": device,
        "torch": "2.13.0+cpu",
        "python": "3.11.7",
        "date": "2026-11-30",
        "command": "make releases",
        "checks": {"smoke": "passed"},
        **changes,
    }


class TestCommitted:
    def test_readme_is_current(self) -> None:
        """If not: tools/releases_table.py."""
        text = releases_table.README.read_text(encoding="utf-8")
        assert with_table(text, read()) == text

    def test_every_supported_release_has_a_row(self) -> None:
        """At least its files were read, and nothing failed."""
        rows = read()
        assert {release.name for release in releases()} == {row["release"] for row in rows}
        assert {"passed"} == {outcome for row in rows for outcome in row["checks"].values()}


class TestTable:
    def test_cells(self) -> None:
        """The newest release first; what was read, run on a CPU, and on other devices by their names."""
        rows = [
            row("0.9", "source", checks={"internals": "passed"}),
            row("0.10", "cpu", checks={"served": "passed", "smoke": "passed"}),
            row("0.10", "NVIDIA H200", torch="2.14.0+cu130", checks={"smoke": "passed", "graphs": "failed"}),
        ]
        assert [
            "| 0.10.0 | - | smoke, served (torch 2.13.0, 2026-11-30) "
            "| **failed: graphs** (NVIDIA H200, torch 2.14.0, 2026-11-30) |",
            "| 0.9.0 | internals (2026-11-30) | - | - |",
        ] == table(rows).splitlines()[2:]

    def test_between_the_markers(self) -> None:
        """What stands around them stays; a text without them is refused."""
        text = with_table(f"a\n{BEGIN}\nold\n{END}\nb\n", [row("0.9", "cpu")])
        assert text == f"a\n{BEGIN}\n{table([row('0.9', 'cpu')])}\n{END}\nb\n"
        with pytest.raises(ValueError, match="must have the lines"):
            with_table("a", [])


class TestRecord:
    def test_rows_are_merged(self, tmp_path: Path) -> None:
        """By release and device: checks that were not repeated stay, unless they are of another version."""
        path = tmp_path / "releases.json"
        record(path, [row("0.10", "cpu"), row("0.9", "cpu"), row("0.9", "NVIDIA H200")])
        record(path, [row("0.9", "cpu", date="2026-12-01", checks={"served": "failed"})])
        assert [("0.9", "NVIDIA H200"), ("0.9", "cpu"), ("0.10", "cpu")] == [
            (one["release"], one["device"]) for one in read(path)
        ]
        assert {"smoke": "passed", "served": "failed"} == read(path)[1]["checks"]
        assert "2026-12-01" == read(path)[1]["date"]
        record(path, [row("0.9", "cpu", version="0.9.1", checks={"served": "passed"})])
        assert {"served": "passed"} == read(path)[1]["checks"]

    def test_a_row_with_other_fields(self, tmp_path: Path) -> None:
        """Is refused, with those that it must have."""
        path = tmp_path / "releases.json"
        path.write_text(json.dumps({"results": [{"release": "0.9"}]}), encoding="utf-8")
        with pytest.raises(ValueError, match="must have the fields release, version, device"):
            read(path)

    def test_no_file(self, tmp_path: Path) -> None:
        """Nothing was tested yet."""
        assert [] == read(tmp_path / "releases.json")


class TestCommand:
    def test_write_and_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checking fails until it was written."""
        readme, data = tmp_path / "README.md", tmp_path / "releases.json"
        readme.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
        record(data, [row("0.9", "cpu")])
        monkeypatch.setattr(releases_table, "README", readme)
        monkeypatch.setattr(releases_table, "read", lambda: read(data))
        assert [1, 0, 0] == [releases_table.main(arguments) for arguments in (["--check"], [], ["--check"])]
        assert "| 0.9.0 |" in readme.read_text(encoding="utf-8")
