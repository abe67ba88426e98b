"""The documents say what is: links, commands, settings, metrics, and numbers that they quote of files and each other.

Pages with tests of their own: docs/architecture.md (`test_architecture.py`), docs/serving.md's table of series
(`export/test_series_table.py`), runbooks (`cli/test_rules.py`), and tables that a tool writes.
"""

import csv
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from glassbox.cli.main import main
from glassbox.config.load import GlassboxConfig, all_keys
from glassbox.core.trace_options import CLIENT_KEYS

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [
    ROOT / "README.md",
    *sorted(path for folder in ("docs", "deploy", "dashboards") for path in (ROOT / folder).rglob("*.md")),
]
FENCE: Final = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code(page: str) -> list[str]:
    """What a reader may copy: lines of blocks, fenced or indented, and spans between backquotes."""
    blocks = [line for block in FENCE.finditer(page) for line in block[2].splitlines()]
    prose = FENCE.sub("", page)
    return blocks + re.findall(r"^ {4,}(\S.*)$", prose, re.MULTILINE) + re.findall(r"`([^`\n]+)`", prose)


def anchor(heading: str) -> str:
    """As GitHub makes it: links are their text, punctuation goes, blanks are dashes."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return set(map(anchor, re.findall(r"^#+ (.*)$", FENCE.sub("", text(path)), re.MULTILINE)))


def dead_links(path: Path) -> list[str]:
    """Those of a page that lead to no file, or to no heading of it; other sites' are not asked."""
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", FENCE.sub("", text(path)))
    dead = []
    for link in filter(lambda link: not re.match(r"https?://", link), map("".join, links)):
        name, _, place = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (place and place not in anchors(target)):
            dead.append(link)
    return dead


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def commands(group: Any, before: str = "") -> dict[str, set[str]]:
    """Every command with its options; `baseline save` is one."""
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{before}{name} ")
        else:
            found[before + name] = options(command)
    return found


class TestLinks:
    @pytest.mark.parametrize("path", PAGES, ids=named)
    def test_lead_somewhere(self, path: Path) -> None:
        """To a file of the repository, and to a heading that it has."""
        assert [] == dead_links(path)

    def test_dead_ones_are_found(self, tmp_path: Path) -> None:
        """A page that isn't there, a heading that isn't there, a picture; not what is only shown in a block."""
        page = tmp_path / "page.md"
        page.write_text(
            "# Who gets in, and `how`\n[a](#who-gets-in-and-how) [b](#who) [c](none.md) [d](page.md#how)\n"
            '<img src="none.png"> [e](https://example.org/none)\n```\n[f](none.md)\n# how\n```\n'
        )
        assert ["#who", "none.md", "page.md#how", "none.png"] == dead_links(page)

    def test_every_page_is_linked(self) -> None:
        """From README, or from a page that is: none is only found by who lists the folder."""
        reached, waiting = set(), [ROOT / "README.md"]
        while waiting:
            path = waiting.pop()
            if path not in reached:
                reached.add(path)
                links = re.findall(r"\]\(([^)\s#]+\.md)(?:#[^)]*)?\)", FENCE.sub("", text(path)))
                waiting += [(path.parent / link).resolve() for link in links]
        assert [] == [named(path) for path in PAGES if path not in reached]


class TestCommands:
    KNOWN: Final = commands(get_command(main))

    @pytest.mark.parametrize("path", PAGES, ids=named)
    def test_and_their_options_exist(self, path: Path) -> None:
        """`glassbox NAME --option`, in blocks and between backquotes."""
        # What is shown of outputs and logs has the word elsewhere.
        called = re.compile(r"(?:^|^\$ |-- |CONTAINER |[|&(] )glassbox ((?:baseline )?[a-z]+)\b([^`|#&;]*)")
        used = [found for line in code(text(path)) for found in called.findall(line)]
        assert [] == [name for name, _ in used if name not in self.KNOWN]
        given = [(name, option) for name, rest in used for option in re.findall(r"(?<!\S)--[a-z-]+", rest)]
        assert [] == [(name, option) for name, option in given if option not in self.KNOWN[name]]

    def test_example_of_check(self) -> None:
        """docs/cli.md shows what is printed, but for the environment's vLLM."""
        blocks = [block[2] for block in FENCE.finditer(text(ROOT / "docs" / "cli.md"))]
        (example,) = [block for block in blocks if block.startswith("$ glassbox check")]
        asked, *shown = example.splitlines()
        printed = CliRunner().invoke(main, asked.removeprefix("$ glassbox ").split()).output.splitlines()
        assert len(shown) > 8
        assert [] == [line for line in shown if line not in printed and line != "..." and "vLLM" not in line]


class TestSettings:
    @pytest.mark.parametrize("path", PAGES, ids=named)
    def test_keys_exist(self, path: Path) -> None:
        """`section.key` between backquotes."""
        keys = all_keys(GlassboxConfig)
        known = {key[:end] for key in keys for end in (*(dot.start() for dot in re.finditer(r"\.", key)), len(key))}
        tops = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
        spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text(path)))
        asked = [key for span in spans for key in re.findall(rf"^(?:{tops})\.[a-z_.]*[a-z_](?=[:\s]|$)", span)]
        assert [] == [key for key in asked if key not in known and not key.endswith((".npz", ".md"))]

    @pytest.mark.parametrize("path", PAGES, ids=named)
    def test_examples_are_valid(self, path: Path) -> None:
        """Blocks of YAML whose keys are glassbox's; whether what they name is there is not asked."""
        for block in FENCE.finditer(text(path)):
            shown = yaml.safe_load(block[2]) if block[1] == "yaml" else None
            if isinstance(shown, dict) and shown.keys() & GlassboxConfig.model_fields.keys():
                GlassboxConfig.model_validate(shown)

    def test_environment_variables_exist(self) -> None:
        """`GLASSBOX_...` is read somewhere in the package, the tests or the tools."""
        places = [path for folder in ("glassbox", "tests", "tools") for path in (ROOT / folder).rglob("*.py")]
        sources = "".join(text(path) for path in places if path != Path(__file__))
        read = set(re.findall(r"GLASSBOX_[A-Z_]+", sources))
        shown = {name for path in PAGES for name in re.findall(r"GLASSBOX_[A-Z_]*[A-Z]", text(path))}
        assert "GLASSBOX_CONFIG" in shown
        assert set() == shown - read


class TestMetrics:
    METRICS = frozenset(re.findall(r"^\| `(glassbox_\w+)` \|", text(ROOT / "docs" / "metrics.md"), re.MULTILINE))

    @pytest.mark.parametrize("path", PAGES, ids=named)
    def test_exist(self, path: Path) -> None:
        """Every `glassbox_...` is a metric of the table, the beginning of some, or a key of a request or an answer."""
        others = {*CLIENT_KEYS, "glassbox_rules"}
        recorded = re.compile(r"\w+:glassbox_\w+:[\w:]+")
        wrong = []
        for name in set(re.findall(r"\bglassbox_\w+", recorded.sub("", text(path)))):
            family = re.sub(r"_(bucket|sum|count)$", "", name)
            if not {name, family} & (self.METRICS | others) and not any(m.startswith(name) for m in self.METRICS):
                wrong.append(name)
        assert [] == sorted(wrong)


class TestNumbers:
    def test_serving_on_a_gpu(self) -> None:
        """docs/performance.md's first table has the median of the rounds, the smallest and the largest."""
        rounds: dict[tuple[str, str], list[Decimal]] = {}
        lines = text(ROOT / "docs" / "data" / "serving_h200.csv").splitlines()
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            rounds.setdefault((row["case"], row["setting"]), []).append(Decimal(row["ratio"]))
        settings = ("enabled: false", "sample_rate 0", "sample_rate 0.01", "sample_rate 0.1", "sample_rate 1.0")
        page = text(ROOT / "docs" / "performance.md")
        for case in {case for case, _ in rounds}:
            cells = []
            for setting in settings:
                found = sorted(rounds[case, setting])
                assert len(found) == 5
                middle, least, most = (
                    number.quantize(Decimal("0.001"), ROUND_HALF_UP) for number in (found[2], found[0], found[-1])
                )
                cells.append(f"{middle} [{least}, {most}]")
            assert f"| {case} | {' | '.join(cells)} | " in page

    def test_incidents_in_readme(self) -> None:
        """They are those of the run that docs/incidents.md shows."""
        shown = re.findall(r"\d[\d.]* → \d[\d.]*\d|index \d+\.\d+", text(ROOT / "README.md"))
        assert len(shown) >= 6
        assert [] == [number for number in shown if number not in text(ROOT / "docs" / "incidents.md")]
