"""Which of vLLM's names glassbox uses, read from its own sources.

Owns the ways in which a name is used: what is imported of vLLM and read of that, members of the protocols of
`adapter/`, and names in tables. What is read with `getattr` is another list: it may be missing.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Final

from glassbox.config.model import SUPPORTED_INNER_BACKENDS

ROOT: Final = Path(__file__).resolve().parents[1]
# Names what is used of vLLM and uses none of it.
DECLARATIONS: Final = "adapter/internals.py"
_VLLM_PATH: Final = re.compile(r"vllm(\.\w+)+")
_REGISTRY: Final = "vllm.v1.attention.backends.registry"
# What vLLM's releases don't have and glassbox/adapter/backend_registry.py adds.
_ADDED: Final = frozenset({f"{_REGISTRY}.get_backend_config"})
# Ids of findings about vLLM look like its paths.
_FINDINGS: Final = Path("glassbox/cli/doctor")
# A table's entry is a module and what is meant of it: a class, a method. What follows is glassbox's.
_TABLE_NAMES: Final = 3


class _Uses(ast.NodeVisitor):
    """Collects from one module.

    Attributes:
        found: line of the first use, by dotted path.
    """

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._bound: dict[str, str] = {}

    def _add(self, path: str, node: ast.AST) -> None:
        self.found.setdefault(path, getattr(node, "lineno", 0))

    def visit_Import(self, node: ast.Import) -> None:
        """`import vllm.a.b as c`."""
        for alias in node.names:
            if alias.name.partition(".")[0] == "vllm":
                self._add(alias.name, node)
                self._bound[alias.asname or "vllm"] = alias.name if alias.asname else "vllm"

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from vllm.a import b`."""
        if not node.level and node.module and node.module.partition(".")[0] == "vllm":
            for alias in node.names:
                self._bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._add(f"{node.module}.{alias.name}", node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`b.c.d`, if b was imported from vLLM."""
        names, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            names.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in self._bound:
            self._add(".".join([self._bound[value.id], *reversed(names)]), node)
        else:
            self.visit(value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """A protocol: its docstring's first paragraph names the classes, or the modules, that have its members."""
        if any(ast.unparse(base) == "Protocol" for base in node.bases):
            first, _, _ = (ast.get_docstring(node) or "").partition("\n\n")
            for owner in _VLLM_PATH.finditer(first):
                self._add(owner[0], node)
                for entry in node.body:
                    if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                        self._add(f"{owner[0]}.{entry.target.id}", entry)
                    elif isinstance(entry, ast.FunctionDef):
                        self._add(f"{owner[0]}.{entry.name}", entry)
        self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        """("vllm.a.b", "Class")."""
        self._table_entry(node.elts, node)

    def visit_Call(self, node: ast.Call) -> None:
        """Patch("vllm.a.b", "Class", "method", ...)."""
        self._table_entry(node.args, node)

    def _table_entry(self, entries: Sequence[ast.expr], node: ast.AST) -> None:
        constants = (entry.value if isinstance(entry, ast.Constant) else None for entry in entries)
        texts = list(takewhile(lambda text: isinstance(text, str), constants))[:_TABLE_NAMES]
        if texts and _VLLM_PATH.fullmatch(str(texts[0])):
            self._add(".".join(map(str, texts)), node)
        self.generic_visit(node)


def used_names(package: Path = ROOT / "glassbox") -> Mapping[str, str]:
    """Dotted paths into vLLM that a package uses, each with the first file and line that do."""
    names: dict[str, str] = {}
    for path, tree in _modules(package):
        if _FINDINGS in path.relative_to(package.parent).parents:
            continue
        uses = _Uses()
        uses.visit(tree)
        for name, line in uses.found.items():
            names.setdefault(name, f"{path.relative_to(package.parent)}:{line}")
    for backend in SUPPORTED_INNER_BACKENDS:
        names[f"{_REGISTRY}.AttentionBackendEnum.{backend}"] = "glassbox/config/model.py"
    return {name: where for name, where in sorted(names.items()) if name not in _ADDED}


def attributes_asked_for(package: Path = ROOT / "glassbox" / "adapter") -> Mapping[str, str]:
    """Names that a package reads with `getattr` and a default, or asks for with `hasattr`: nobody knows of what.

    Each with the first file and line; glassbox's own attributes and those of Python's modules are left out.
    """
    names: dict[str, str] = {}
    for path, tree in _modules(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and len(node.args) >= 2 and ast.unparse(node.func) in {"getattr", "hasattr"}:
                of, name = ast.unparse(node.args[0]), node.args[1]
                if (
                    isinstance(name, ast.Constant)
                    and not str(name.value).startswith(("glassbox", "_glassbox", "__"))
                    and not of.endswith("__spec__")
                ):
                    names.setdefault(str(name.value), f"{path.relative_to(package.parent.parent)}:{node.lineno}")
    return dict(sorted(names.items()))


def _modules(package: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(package.rglob("*.py")):
        if path != package / DECLARATIONS:
            yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))
