#!/usr/bin/env python3
"""Which of vLLM's internals glassbox uses, and which of them a vLLM release lacks or calls differently.

Nothing of vLLM is run: its Python files are read from a wheel or a folder, so that any release can be looked at on any
machine. What is used is read from glassbox's own sources: what they import of vLLM and read of that, what the protocols
of `adapter/` name, and the names in its tables. What is read with `getattr` and a default is not asked for.

    tools/compat_watch.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl
    tools/compat_watch.py path/to/vllm/checkout --reference .venv/lib/python3.11/site-packages
"""

import argparse
import ast
import re
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Final

import griffe

from glassbox.config.model import SUPPORTED_INNER_BACKENDS

ROOT: Final = Path(__file__).resolve().parents[1]
_VLLM_PATH: Final = re.compile(r"vllm(\.\w+)+")
_REGISTRY: Final = "vllm.v1.attention.backends.registry"
# What vLLM's releases don't have and glassbox/adapter/registry.py adds.
_ADDED: Final = frozenset({f"{_REGISTRY}.get_backend_config"})
# A table's entry is a module and what is meant of it: a class, a method. What follows is glassbox's.
_TABLE_NAMES: Final = 3
_ELSEWHERE: Final = 3


@dataclass(frozen=True)
class Finding:
    """What is wrong with one name in one release.

    Attributes:
        path: dotted.
        where: file and line of glassbox that use it.
        what: a sentence.
    """

    path: str
    where: str
    what: str


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
    for path in sorted(package.rglob("*.py")):
        uses = _Uses()
        uses.visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        for name, line in uses.found.items():
            names.setdefault(name, f"{path.relative_to(package.parent)}:{line}")
    for backend in SUPPORTED_INNER_BACKENDS:
        names[f"{_REGISTRY}.AttentionBackendEnum.{backend}"] = "glassbox/config/model.py"
    return {name: where for name, where in sorted(names.items()) if name not in _ADDED}


class Tree:
    """vLLM's sources, read and not run.

    Args:
        folder: that holds `vllm/`.

    Raises:
        ModuleNotFoundError: there is no such folder in it.
    """

    def __init__(self, folder: Path) -> None:
        loader = griffe.GriffeLoader(search_paths=[folder], allow_inspection=False)
        package = loader.load("vllm")
        assert isinstance(package, griffe.Module)
        self._package = package

    @property
    def version(self) -> str:
        """As the release says of itself; "unknown" in a checkout that was not built."""
        if "_version" not in self._package.members:
            return "unknown"
        value = getattr(self._package["_version"].members.get("__version__"), "value", None)
        return "unknown" if value is None else str(value).strip("'\"")

    def find(self, path: str) -> griffe.Object | None:
        """What a dotted path leads to, through imports and base classes; None if nothing.

        What a module sets on objects of others counts as its own. Of what a value holds nothing is known, so a path
        that goes on behind one leads to the value; one that leaves vLLM leads to where it does.
        """
        node: griffe.Object = self._package
        for name in path.split(".")[1:]:
            if node.is_attribute or node.is_function:
                return node
            member = (node.all_members if node.is_class else node.members).get(name)
            if member is None:
                return node if node.is_module and _sets(node, name) else None
            if isinstance(member, griffe.Alias):
                try:
                    member = member.final_target
                except (griffe.AliasResolutionError, griffe.CyclicAliasError):
                    return node
            node = member
        return node

    def elsewhere(self, name: str) -> list[str]:
        """Paths of what is defined under that name, in the order of the modules."""
        return self._defined[name]

    @cached_property
    def _defined(self) -> defaultdict[str, list[str]]:
        found: defaultdict[str, list[str]] = defaultdict(list)
        for node in _definitions(self._package):
            found[node.name].append(node.path)
        return found


def _sets(module: griffe.Object, attribute: str) -> bool:
    """Whether it has a statement like `layer.attribute = ...`."""
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and node.attr == attribute
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
        for node in ast.walk(ast.parse(module.source))
    )


def _definitions(node: griffe.Object) -> Iterator[griffe.Object]:
    for member in node.members.values():
        if isinstance(member, griffe.Object):
            yield member
            yield from _definitions(member)


def missing(tree: Tree, names: Mapping[str, str]) -> list[Finding]:
    """The names that a release lacks, with where it has what is called the same."""
    findings = []
    for path, where in names.items():
        if tree.find(path) is None:
            name = path.rpartition(".")[2]
            others = tree.elsewhere(name)
            more = f" and {len(others) - _ELSEWHERE} more" if len(others) > _ELSEWHERE else ""
            what = f"{name} is in {', '.join(others[:_ELSEWHERE])}{more}" if others else f"nothing is called {name}"
            findings.append(Finding(path, where, f"missing: {what}"))
    return findings


def changed(tree: Tree, reference: Tree, names: Mapping[str, str]) -> list[Finding]:
    """What is another kind of thing than in the reference, or has other parameters; their types don't count."""
    findings = []
    for path, where in names.items():
        before, after = reference.find(path), tree.find(path)
        if before is None or after is None:
            continue
        if before.kind is not after.kind:
            findings.append(Finding(path, where, f"was a {before.kind.value}, is a {after.kind.value}"))
        elif difference := _difference(_parameters(before), _parameters(after)):
            findings.append(Finding(path, where, difference))
    return findings


def _parameters(node: griffe.Object) -> dict[str, str]:
    """Each with its kind and whether it must be given, in order; none of what is no function."""
    if not isinstance(node, griffe.Function):
        return {}
    return {one.name: f"{one.kind.value if one.kind else ''}{', required' * one.required}" for one in node.parameters}


def _difference(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Between two functions' parameters; empty if there is none."""
    parts = [f"lacks parameter {name}" for name in was if name not in now]
    parts += [f"has a parameter {name} ({kind})" for name, kind in now.items() if name not in was]
    parts += [f"{name} was {was[name]}, is {now[name]}" for name in was if was[name] != now.get(name, was[name])]
    both = [[name for name in names if name in was and name in now] for names in (was, now)]
    if both[0] != both[1]:
        parts.append(f"order was {', '.join(both[0])}, is {', '.join(both[1])}")
    return "; ".join(parts)


def worth_a_line(findings: Sequence[Finding]) -> Iterator[Finding]:
    """All but those of a class or a module that is among them: it is said once."""
    paths = {finding.path for finding in findings}
    return (finding for finding in findings if not any(finding.path.startswith(f"{path}.") for path in paths))


def _unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if re.match(r"vllm/.*\.py$", name)])
    return folder


def installed() -> Path | None:
    """The folder that holds the installed vLLM; None if there is none."""
    spec = find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at each release; returns 1 if one lacks a name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("release", type=Path, nargs="+", help="a wheel of vLLM, or a folder that holds vllm/")
    parser.add_argument("--reference", type=Path, default=installed(), help="folder; default: where vLLM is installed")
    args = parser.parse_args(arguments)
    for path in args.release:
        if not (path.is_file() or (path / "vllm").is_dir()):
            parser.error(f"release must be a wheel or a folder that holds vllm/, got {path}")
    names = used_names()
    reference = None if args.reference is None else Tree(args.reference)
    lacks = False
    for path in args.release:
        with tempfile.TemporaryDirectory() as scratch:
            tree = Tree(_unpacked(path, Path(scratch)) if path.is_file() else path)
        gone = missing(tree, names)
        print(f"vLLM {tree.version}: has {len(names) - len(gone)} of {len(names)} names that glassbox uses", end="")
        differ = [] if reference is None else changed(tree, reference, names)
        print("" if reference is None else f"; {len(differ)} called otherwise than in {reference.version}")
        for finding in (*worth_a_line(gone), *differ):
            print(f"  {finding.path} ({finding.where})\n    {finding.what}")
        lacks = lacks or bool(gone)
    return int(lacks)


if __name__ == "__main__":
    sys.exit(main())
