"""The rooms stay apart: what a worker and an API server load, and names that are found where somebody looks for them.

Which room may import which is import-linter's (`lint-imports`); here is what it does not see: what one process has in
memory, and what names and comments say.
"""

import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = ROOT / "glassbox"
MODULES: Final = sorted(
    path
    for folder in (PACKAGE, ROOT / "kernels")
    for path in folder.rglob("*.py")
    # glassbox/kernels is a link to kernels/
    if path.relative_to(folder).parts[0] != "kernels"
)


def room_of(path: Path) -> str:
    """The folder below the package; "" for `plugin.py` and `__init__.py`, which are above all rooms."""
    parts = path.relative_to(ROOT).parts
    return "kernels" if parts[0] == "kernels" else parts[1] if len(parts) > 2 else ""


def loaded_by(program: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after a program."""
    program += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def below(modules: set[str], *packages: str) -> list[str]:
    return sorted(name for name in modules if any(f"{name}.".startswith(f"{package}.") for package in packages))


def imported_by(path: Path, *, but_in: str = "") -> list[str]:
    """Modules of glassbox that a file imports when it runs, inside of functions too, `but_in` one of them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    left_out = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == but_in]
    passed = {id(node) for part in for_types + left_out for node in ast.walk(part)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in passed]
    statements = [ast.unparse(node) for node in found if (node.module or "").startswith("glassbox.")]
    assert statements
    return statements


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """By what a worker imports: the step hook, and what the entry point's module needs."""
    return loaded_by("import glassbox.plugin, glassbox.processes.registration, glassbox.processes.worker.hook")


class TestWorker:
    def test_nothing_that_exports_or_shows(self, loaded: set[str]) -> None:
        """No sink, no page, no view, no command: a worker writes snapshots, others read them."""
        assert "glassbox.processes.worker.observer" in loaded
        assert [] == below(loaded, "glassbox.export", "glassbox.web", "glassbox.view", "glassbox.cli")

    @pytest.mark.parametrize(
        "package", ["prometheus_client", "opentelemetry", "starlette", "uvicorn", "httpx", "rich", "typer", "vllm"]
    )
    def test_no_package_that_only_others_need(self, loaded: set[str], package: str) -> None:
        """As far as glassbox is the one that imports it: vLLM has its own reasons to load some of them."""
        assert [] == below(loaded, package)


class TestApiServer:
    def test_registering_needs_no_torch(self) -> None:
        """Nothing that `register()` imports brings torch, but for the hook, which the first observed layer asks for."""
        registration = PACKAGE / "processes" / "registration.py"
        assert "_make_hook" in registration.read_text(encoding="utf-8")
        loaded = loaded_by("\n".join(imported_by(registration, but_in="_make_hook")))
        assert "glassbox.processes.api_server.shown_metrics" in loaded
        assert [] == below(loaded, "torch", "vllm", "glassbox.kernels", "glassbox.processes.worker")

    def test_what_shows_waits_for_a_scrape(self) -> None:
        """Every process of a server registers, a worker, too: what reads and translates comes with the first scrape."""
        program = """
import sys
from pathlib import Path
from glassbox.config.load import GlassboxConfig
from glassbox.processes.api_server.shown_metrics import ShownMetrics, install
shown = ShownMetrics(GlassboxConfig, Path("nowhere"))
undo = install(shown)
showing = ("glassbox.export", "glassbox.web", "glassbox.view", "prometheus_client", "numpy")
assert not [name for name in sys.modules if name.startswith(showing)]
from prometheus_client import REGISTRY
assert shown in REGISTRY._collector_to_names
assert "glassbox.export.prometheus" not in sys.modules
list(REGISTRY.collect())
assert "glassbox.export.prometheus" in sys.modules
undo()
assert shown not in REGISTRY._collector_to_names
"""
        assert "glassbox.export.family_source" in loaded_by(program)

    def test_the_hook_waits_for_a_worker(self) -> None:
        """The seat makes it when a worker of vLLM warms up, and not before."""
        program = """
import sys
from pathlib import Path
from glassbox.adapter.seat import SEAT
from glassbox.config.load import find_config, load_config
from glassbox.config.settings import Settings
from glassbox.processes.registration import _make_hook
settings = Settings(Path(find_config()), load_config(find_config()), publish=lambda config: None, read=lambda: None)
SEAT.take(settings, lambda: _make_hook(settings))
assert "torch" not in sys.modules
SEAT.warm_up_begins(None)
assert "torch" in sys.modules
"""
        assert "glassbox.processes.worker.hook" in loaded_by(program)


class TestNames:
    def test_a_module_has_a_name_of_its_own(self) -> None:
        """No two rooms have a module of the same name: a name in a traceback or a comment leads to one file."""
        rooms: dict[str, set[str]] = defaultdict(set)
        for path in MODULES:
            if path.name not in {"__init__.py", "__main__.py"}:
                rooms[path.name].add(room_of(path))
        assert {} == {name: where for name, where in rooms.items() if len(where) > 1}

    def test_files_that_are_spoken_of_exist(self) -> None:
        """`name.py` is in the same folder, `room/name.py` below the package or the repository."""
        missing = defaultdict(set)
        for path in MODULES:
            places = (path.parent, PACKAGE, ROOT)
            for name in spoken(path, r"`([\w./-]+\.(?:py|cpp|js|html|j2))`"):
                if not any((place / name).is_file() for place in places):
                    missing[str(path.relative_to(ROOT))].add(name)
        assert {} == missing

    def test_files_that_documents_and_settings_name_exist(self) -> None:
        """Paths in Markdown, YAML, TOML, Makefile and Dockerfile, and at the top of generated files."""
        kinds = ("*.md", "*.toml", "docs/**/*.md", "deploy/**/*.md", "deploy/**/*.yaml", "dashboards/**/*.md")
        files = [path for kind in kinds for path in ROOT.glob(kind)]
        files += [ROOT / "Makefile", ROOT / "Dockerfile", ROOT / ".ci" / "run"]
        missing = defaultdict(set)
        for path in files:
            text = path.read_text(encoding="utf-8")
            for name in re.findall(r"(?<![\w./<-])((?:glassbox|kernels|tests|tools|examples|configs)/[\w./-]+)", text):
                place = name.rstrip(".")
                if not (ROOT / place).exists() and not (PACKAGE / place).exists():
                    missing[str(path.relative_to(ROOT))].add(place)
        assert {} == missing

    def test_modules_that_are_spoken_of_exist(self) -> None:
        """`glassbox.room.name` is a module, or something in one."""
        missing = defaultdict(set)
        for path in MODULES:
            for name in spoken(path, r"`(glassbox(?:\.\w+)+)`"):
                # Spans and metrics of OpenTelemetry are called glassbox.attention, glassbox.attention.entropy_ratio ...
                if not f"{name}.".startswith("glassbox.attention.") and not is_module_or_in_one(name):
                    missing[str(path.relative_to(ROOT))].add(name)
        assert {} == missing


def spoken(path: Path, pattern: str) -> set[str]:
    """What of the docstrings and comments of a file the pattern's group finds."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
    return {name for part in found for name in re.findall(pattern, part)}


def is_module_or_in_one(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    for holder in (path.parent, path.parent.parent):  # of a function, of a method
        file = holder.with_suffix(".py") if holder.with_suffix(".py").is_file() else holder / "__init__.py"
        if file.is_file() and path.name in defined_in(file):
            return True
    return False


def defined_in(path: Path) -> set[str]:
    """Names that a module's statements bind, those of its classes and what it imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found
