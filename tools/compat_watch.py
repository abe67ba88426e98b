"""Which of vLLM's internals glassbox uses, and which of them a vLLM release lacks or calls differently.

Nothing of vLLM is run: its Python files are read from a kept release, a wheel or a folder, so that any release can be
looked at on any machine. What is used is read from glassbox's own sources (tools/vllm_uses.py), and what may be missing
from its declarations (glassbox/adapter/internals.py): a name fails a release unless its module is gone and an
alternative there, or the release is older than the first one that has it. A name that is used and not declared fails by
itself.

    python -m tools.compat_watch all
    python -m tools.compat_watch 0.33 vllm-0.34.0-cp38-abi3-manylinux_2_28_x86_64.whl path/to/vllm/checkout
    python -m tools.compat_watch --declared
"""

import argparse
import importlib
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

import griffe

from tools import vllm_releases
from tools.vllm_tree import Tree
from tools.vllm_uses import DECLARATIONS, attributes_asked_for, used_names

_ELSEWHERE: Final = 3


class Internal(Protocol):
    """An entry of glassbox's declarations.

    Attributes:
        path: dotted, of something in a module. One that has no entries below it covers what is below it.
        module: of it.
        serves: what glassbox can't do without it.
        required: without it nothing is observed.
        alternatives: modules that do the same where its own is gone.
        since: first release that has it, "0.29"; empty if all supported ones do.
    """

    @property
    def path(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def serves(self) -> Enum: ...
    @property
    def required(self) -> bool: ...
    @property
    def alternatives(self) -> Sequence[str]: ...
    @property
    def since(self) -> str: ...


@dataclass(frozen=True)
class Finding:
    """What is wrong with one name in one release.

    Attributes:
        path: dotted.
        where: file and line of glassbox that use it.
        what: a sentence.
        fails: whether the release can't be supported as long as it is so.
    """

    path: str
    where: str
    what: str
    fails: bool = True


def declared() -> tuple[Internal, ...]:
    """glassbox's declarations; none if it has no such module."""
    name = f"glassbox.{DECLARATIONS.removesuffix('.py').replace('/', '.')}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return ()
    return tuple(module.INTERNALS)


def entry_of(name: str, internals: Iterable[Internal]) -> Internal | None:
    """The nearest declaration at or above a name; None if there is none."""
    above = [internal for internal in internals if f"{name}.".startswith(f"{internal.path}.")]
    return max(above, key=lambda internal: len(internal.path), default=None)


def undeclared(names: Mapping[str, str], internals: Sequence[Internal]) -> list[Finding]:
    """Names that are used and that no declaration covers.

    A module or a class that holds a declared name is covered, and what is below a declared name, too, unless some of
    that is declared by itself: then all of it must be.
    """
    paths = {internal.path for internal in internals}

    def holds_declared(name: str) -> bool:
        return any(path.startswith(f"{name}.") for path in paths)

    findings = []
    for name, where in names.items():
        entry = entry_of(name, internals)
        covered = entry is not None and not holds_declared(entry.path)
        if name not in paths and not covered and not holds_declared(name):
            findings.append(Finding(name, where, f"not declared: add it to glassbox/{DECLARATIONS}"))
    return findings


def to_look_for(names: Mapping[str, str], internals: Iterable[Internal]) -> dict[str, str]:
    """The used names and the declared ones, which code may reach by their declaration alone."""
    return {**{internal.path: f"glassbox/{DECLARATIONS}" for internal in internals}, **names}


def missing(tree: Tree, names: Mapping[str, str], internals: Sequence[Internal] = ()) -> list[Finding]:
    """The names that a release lacks, with where it has what is called the same.

    Nothing is missing of a module that is gone and has an alternative; what a release is too old for is no failure.
    """
    findings = []
    for path, where in names.items():
        if tree.find(path) is not None:
            continue
        what, fails = f"missing: {_now_in(tree, path)}", True
        entry = entry_of(path, internals)
        if entry is not None:
            if tree.find(entry.module) is None and any(tree.find(module) is not None for module in entry.alternatives):
                continue
            fails = not _is_older(tree.version, entry.since)
            what += "; nothing is observed without it" if entry.required else f"; {entry.serves.value} needs it"
            what += "" if fails else f", and is not there in releases before {entry.since}"
        findings.append(Finding(path, where, what, fails))
    return findings


def _now_in(tree: Tree, path: str) -> str:
    name = path.rpartition(".")[2]
    others = tree.elsewhere(name, near=path)
    more = f" and {len(others) - _ELSEWHERE} more" if len(others) > _ELSEWHERE else ""
    return f"{name} is in {', '.join(others[:_ELSEWHERE])}{more}" if others else f"nothing is called {name}"


def _is_older(version: str, since: str) -> bool:
    """Whether a release comes before another one; what has no number is newer than all."""
    numbers = [[int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version, since)]
    return bool(numbers[0] and numbers[1]) and numbers[0] < numbers[1]


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


def not_called(tree: Tree, names: Mapping[str, str]) -> list[Finding]:
    """Attributes that are asked for and that the release has under no such name: what they serve is not there."""
    return [
        Finding(name, where, "asked for, and nothing is called so", fails=False)
        for name, where in names.items()
        if not tree.mentions(name)
    ]


@contextmanager
def opened(release: str) -> Iterator[Tree]:
    """The tree of a supported release by its name, of a wheel, or of a folder that holds vllm/.

    Raises:
        ReleaseError: it is none of these.
    """
    path = Path(release)
    if path.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(scratch, [name for name in wheel.namelist() if re.match(r"vllm/.*\.py$", name)])
            yield Tree(Path(scratch))
    elif (path / "vllm").is_dir():
        yield Tree(path)
    else:
        yield Tree(vllm_releases.folder_of(vllm_releases.find(release), whole=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at each release; returns 1 if one lacks a name, or a name is not declared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("release", nargs="*", help='"0.31", "all", a wheel of vLLM, or a folder that holds vllm/')
    parser.add_argument(
        "--reference", type=Path, default=vllm_releases.installed(), help="folder; default: where vLLM is installed"
    )
    parser.add_argument("--declared", action="store_true", help="look for names that are used and not declared")
    args = parser.parse_args(arguments)
    if not args.release and not args.declared:
        parser.error("name a release, or ask for --declared")
    used, internals = used_names(), declared()
    failures = 0
    if args.declared or internals:
        found = undeclared(used, internals)
        failures += len(found)
        print(f"glassbox uses {len(used)} names of vLLM, of which {len(found)} are not declared")
        _print(found)
    names = to_look_for(used, internals)
    reference = None if args.reference is None else Tree(args.reference)
    every = [release.name for release in vllm_releases.releases()]
    for release in every if args.release == ["all"] else args.release:
        try:
            with opened(release) as tree:
                failures += _look_at(tree, reference, names, internals)
        except vllm_releases.ReleaseError as error:
            parser.error(f"{error}; or give a wheel, or a folder that holds vllm/")
    return int(failures > 0)


def _look_at(tree: Tree, reference: Tree | None, names: Mapping[str, str], internals: Sequence[Internal]) -> int:
    """Print what is to be said of one release; returns the number of failures."""
    gone = missing(tree, names, internals)
    print(f"vLLM {tree.version}: has {len(names) - len(gone)} of {len(names)} names that glassbox uses", end="")
    differ = [] if reference is None else changed(tree, reference, names)
    print("" if reference is None else f"; {len(differ)} called otherwise than in {reference.version}")
    _print([*worth_a_line(gone), *differ, *not_called(tree, attributes_asked_for())])
    return sum(finding.fails for finding in gone)


def _print(findings: Iterable[Finding]) -> None:
    for finding in findings:
        print(f"  {finding.path} ({finding.where})\n    {finding.what}")


if __name__ == "__main__":
    sys.exit(main())
