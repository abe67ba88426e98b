"""One release of vLLM, its Python files read and not run.

Owns the finding of what a dotted path leads to: through imports, base classes and what methods set on `self`. Files are
parsed when a path leads into them, so that a release costs a second or two and not the time of its two thousand files.
"""

import ast
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Final

import griffe

# Imports that lead in circles are no way to anything.
_MAX_STEPS: Final = 50


class Tree:
    """vLLM's sources.

    Args:
        folder: that holds `vllm/`.

    Raises:
        ModuleNotFoundError: there is no such folder in it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, griffe.Module | None] = {}
        if self._module("vllm") is None:
            raise ModuleNotFoundError(f"{folder} must hold vllm/ with an __init__.py")

    @property
    def version(self) -> str:
        """As the release says of itself; "unknown" in a checkout that was not built."""
        value = getattr(self.find("vllm._version.__version__"), "value", None)
        return "unknown" if value is None else str(value).strip("'\"")

    def find(self, path: str) -> griffe.Object | None:
        """What a dotted path leads to; None if nothing.

        What a module sets on objects of others counts as its own. Of what a value holds nothing is known, so a path
        that goes on behind one leads to the value; one that leaves vLLM leads to where it does.
        """
        return self._find(path, _MAX_STEPS)

    def _find(self, path: str, steps: int) -> griffe.Object | None:
        first, *names = path.split(".")
        node: griffe.Object | None = self._module(first)
        for name in names:
            if node is None or node.is_attribute or node.is_function:
                return node
            owner = node
            member = self._member(owner, name, steps)
            if isinstance(member, griffe.Alias):
                # To a place outside of vLLM, or to what is not there: then its owner is where the way ends.
                node = (self._find(member.target_path, steps - 1) if self._is_ours(member, steps) else None) or owner
                if node is owner:
                    return owner
            elif member is None and isinstance(owner, griffe.Module):
                return owner if _sets(owner, name) else None
            else:
                node = member
        return node

    @staticmethod
    def _is_ours(alias: griffe.Alias, steps: int) -> bool:
        return steps > 0 and alias.target_path.partition(".")[0] == "vllm"

    def _member(self, owner: griffe.Object, name: str, steps: int) -> griffe.Object | griffe.Alias | None:
        """Of a module or a class, or of what it has all names of: modules with a star, base classes."""
        member = owner.members.get(name)
        if isinstance(owner, griffe.Module):
            member = self._module(f"{owner.path}.{name}") if member is None else member
            stars = (one for one in owner.members.values() if isinstance(one, griffe.Alias) and one.wildcard)
            sources = [alias.target_path for alias in stars]
        elif isinstance(owner, griffe.Class):
            sources = [str(getattr(base, "canonical_path", base)) for base in owner.bases]
        else:
            sources = []
        for source in sources if member is None and steps > 0 else []:
            other = self._find(source, steps - 1) if source.startswith("vllm.") else None
            if other is not None and (other.is_class or other.is_module):
                member = self._member(other, name, steps - 1)
                if member is not None:
                    break
        return member

    def _module(self, path: str) -> griffe.Module | None:
        if path not in self._modules:
            outer, _, name = path.rpartition(".")
            place = self._folder.joinpath(*path.split("."))
            files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
            file = next((file for file in files if file.is_file()), None)
            found = None
            if file is not None:
                # Relative imports are counted from the parent.
                parent = self._module(outer) if outer else None
                found = griffe.visit(name, file, file.read_text(encoding="utf-8"), parent=parent)
            self._modules[path] = found
        return self._modules[path]

    def elsewhere(self, name: str, near: str = "") -> list[str]:
        """Paths of what is defined under that name.

        Args:
            near: a path; those that have more of its beginning come first, else the order is that of the files.
        """
        found = [module for module in self._files if module.rpartition(".")[2] == name]
        for module in self._mentioning(name):
            found += [f"{module}.{inner}" for inner in _definitions(ast.parse(self._files[module]), name)]
        return sorted(dict.fromkeys(found), key=lambda path: -_alike(path, near))

    def mentions(self, name: str) -> bool:
        """Whether the name stands in any file."""
        return bool(self._mentioning(name))

    def _mentioning(self, name: str) -> list[str]:
        word = re.compile(rf"\b{re.escape(name)}\b")
        return [module for module, text in self._files.items() if name in text and word.search(text)]

    @cached_property
    def _files(self) -> dict[str, str]:
        """Text of every module, by dotted path."""
        texts = {}
        for file in sorted((self._folder / "vllm").rglob("*.py")):
            parts = file.relative_to(self._folder).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            texts[module] = file.read_text(encoding="utf-8")
        return texts


def _alike(path: str, other: str) -> int:
    """How many names at the beginning of two paths are the same."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _sets(module: griffe.Module, attribute: str) -> bool:
    """Whether it has a statement like `layer.attribute = ...`."""
    assert isinstance(module.filepath, Path)
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and node.attr == attribute
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
        for node in ast.walk(ast.parse(module.filepath.read_text(encoding="utf-8")))
    )


def _definitions(node: ast.AST, name: str, cls: str = "", *, local: bool = False) -> Iterator[str]:
    """Where a module defines a name, by the name within it: as a class, a function, a value, or on a class's `self`.

    Args:
        node: what to look into.
        name: to look for.
        cls: prefix of a class's members.
        local: whether the node is in a function, of which only what it sets on `self` is anybody's to read.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if child.name == name and not local:
                yield f"{cls}{name}"
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, name, f"{cls}{child.name}.", local=local)
            else:
                yield from _definitions(child, name, cls, local=True)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and child.attr == name:
            if cls and ast.unparse(child.value) == "self":
                yield f"{cls}{name}"
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store) and child.id == name:
            if not local:
                yield f"{cls}{name}"
        else:
            yield from _definitions(child, name, cls, local=local)
