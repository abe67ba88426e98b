"""docs/architecture.md says what is: its picture, its rooms, its paths, and the numbers that it quotes."""

import csv
import re
import statistics
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

from tools import draw_rooms

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "architecture.md"
TEXT: Final = PAGE.read_text(encoding="utf-8")
PROSE: Final = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
SVG: Final = "{http://www.w3.org/2000/svg}"


def contract() -> list[str]:
    """The rooms of the layers contract, those of the top line first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (entry["layers"] for entry in settings["contracts"] if entry["type"] == "layers")
    return [room.strip() for layer in layers for room in layer.split("|")]


class TestPicture:
    def test_it_is_current(self) -> None:
        """The committed one is what the imports make of it; if not: tools/draw_rooms.py."""
        assert draw_rooms.current() == draw_rooms.PICTURE.read_text(encoding="utf-8")

    def test_a_box_for_each_room_and_an_arrow_for_each_pair(self) -> None:
        """Every room of the contract stands there, and who imports whom can be read."""
        picture = ElementTree.fromstring(draw_rooms.current())
        boxes = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") == "name"]
        assert sorted(contract()) == sorted(str(name) for name in boxes)
        arrows = [title.text for way in picture.iter(f"{SVG}path") for title in way.iter(f"{SVG}title")]
        pairs = draw_rooms.imports_between(contract())
        assert sorted(f"{importer} imports {imported}" for importer, imported in pairs) == sorted(map(str, arrows))

    def test_an_import_upwards_is_not_drawn_but_refused(self) -> None:
        """It would be an arrow against the lines."""
        with pytest.raises(SystemExit, match="core imports cli, which is not below it"):
            draw_rooms.svg(draw_rooms.lines_of_contract(), {("core", "cli"): 1})

    def test_check_finds_an_old_picture(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It says what to run, and writes nothing."""
        old = tmp_path / "rooms.svg"
        monkeypatch.setattr(draw_rooms, "PICTURE", old)
        monkeypatch.setattr(draw_rooms, "ROOT", tmp_path)
        monkeypatch.setattr(draw_rooms, "current", lambda: "new")
        assert 1 == draw_rooms.main(["--check"])
        assert "rooms.svg is not current; run tools/draw_rooms.py\n" == capsys.readouterr().err
        assert not old.exists()
        assert 0 == draw_rooms.main([])
        assert 0 == draw_rooms.main(["--check"])


class TestTable:
    def test_it_has_the_rooms_of_the_contract(self) -> None:
        """The same, in the same order."""
        named = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", PROSE, re.MULTILINE)
        assert contract() == named

    def test_every_folder_of_the_package_is_a_room(self) -> None:
        """Nothing lies beside the rooms but data."""
        folders = [path for path in (ROOT / "glassbox").iterdir() if any(path.glob("*.py"))]
        assert {path.name for path in folders} == set(contract()) - {"plugin"}


class TestWords:
    def test_every_path_exists(self) -> None:
        """Below the package or the repository."""
        named = re.findall(r"`([\w.-]+(?:/[\w.-]*)+|\w+\.py)`", PROSE)
        assert len(named) > 50
        places = (ROOT / "glassbox", ROOT)
        assert [] == sorted({name for name in named if not any((place / name).exists() for place in places)})

    def test_every_link_leads_somewhere(self) -> None:
        """Relative to the page; the README leads to the page."""
        links = re.findall(r"\]\(([^)]+)\)", PROSE)
        assert links
        assert [] == [link for link in links if not (PAGE.parent / link).exists()]
        assert "docs/architecture.md" in (ROOT / "README.md").read_text(encoding="utf-8")


class TestStartUp:
    def test_its_numbers_are_the_medians_of_the_runs(self) -> None:
        """Of docs/data/worker_import.csv: modules of glassbox, those that show, others', and both times."""
        columns = ("glassbox_modules", "showing_modules", "other_modules", "cpu_ms", "wall_ms")
        runs = defaultdict(list)
        with (ROOT / "docs" / "data" / "worker_import.csv").open(encoding="utf-8", newline="") as file:
            for run in csv.DictReader(file):
                runs[run["after"].split()[-1], run["checkout"]].append([float(run[name]) for name in columns])
        assert 4 == len(runs)
        assert min(map(len, runs.values())) >= 9
        for (after, checkout), found in runs.items():
            medians = [round(statistics.median(column)) for column in zip(*found, strict=True)]
            assert f"| {after} | {checkout} | {' | '.join(map(str, medians))} |" in TEXT
