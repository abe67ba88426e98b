"""Compiles a C++ file of this package for this machine's CPU, once, and loads it.

Owns finding the compiler, its flags and the cache of what it made. vLLM on a CPU needs a compiler for torch.compile; a
server that runs without one (--enforce-eager) is no reason to fail, so whoever calls this has another way.

What is loaded is run: it is taken from the cache only if no other user could have put it there. Where the cache can't
be trusted, written to or run from, the file is compiled at each start, in a folder of this process's own. Which of the
two it is doesn't depend on what lies in the cache.

Workers that start together, and threads, compile a file once: the others wait for the one that began.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glassbox.core.cache import cache_dir
from glassbox.core.cpu import cpu_flags
from glassbox.core.logs import get_logger, log_once
from glassbox.core.trusted_path import distrusted_file, distrusted_folder

logger = get_logger(__name__)

# Without -ffast-math: NaN must stay NaN, and nothing may be reordered but the sums that say so (omp simd).
_FLAGS: Final = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip
# The CPU's own instructions, in the words of GCC and Clang for x86 and for Arm; the last resort is the baseline.
_TARGETS: Final = (("-march=native",), ("-mcpu=native",), ())
_COMPILERS: Final = ("g++", "clang++", "c++")
_TIMEOUT_S: Final = 120
# For another that compiles it, and between two looks at it.
_LONGEST_WAIT_S: Final = 120.0
_WAIT_S: Final = 0.02
_CACHE_REMEDY: Final = "set XDG_CACHE_HOME to a directory of this user's from which files can be executed"
_TEMPORARY_REMEDY: Final = "set XDG_CACHE_HOME or TMPDIR to such a directory"


class NativeError(RuntimeError):
    """There is no compiler, or it refused, or there is no place for what it makes; the message says why."""


class _NoPlaceError(NativeError):
    """The cache can't be used."""


@dataclass(frozen=True)
class _Job:
    """A file to compile.

    Attributes:
        compiler, options: its command.
        name: of the result, which says all that it depends on.
    """

    compiler: Sequence[str]
    options: Sequence[str]
    source: Path
    name: str

    @classmethod
    def of(cls, source: Path, defines: Mapping[str, str] | None) -> "_Job":
        compiler = _compiler()
        options = (*_FLAGS, *(f"-D{macro}={text}" for macro, text in (defines or {}).items()))
        key = hashlib.sha256(source.read_bytes())
        machine = (os.path.realpath(compiler[0]), compiler[1:], options, _TARGETS, sorted(cpu_flags()))
        key.update(repr(machine).encode())
        return cls(compiler, options, source, f"{source.stem}-{key.hexdigest()[:20]}.so")

    def compile_to(self, target: Path) -> Path:
        return _compile(self.compiler, self.options, self.source, target)


def compile_cpp(source: Path, defines: Mapping[str, str] | None = None) -> None:
    """Compile a C++ file into the cache, unless it lies there, so that `load_cpp` finds it.

    Raises:
        NativeError: it can't be compiled, or the cache can't be used.
        OSError: the source can't be read.
    """
    job = _Job.of(source, defines)
    path = _cache_folder() / job.name
    if not _is_kept(path):
        _compile_once(job, path)


def load_cpp(source: Path, defines: Mapping[str, str] | None = None) -> ctypes.CDLL:
    """Load a C++ file as a shared library, compiling it unless that has been done on a CPU like this one.

    Args:
        source: the file.
        defines: what macros of the file stand for, by name; so a table of this package need not be written there again.

    Raises:
        NativeError: it can't be compiled, or there is no folder from which it may be loaded.
        OSError: the result can't be written or loaded.
    """
    job = _Job.of(source, defines)
    try:
        return _from_cache(job, _cache_folder() / job.name)
    except _NoPlaceError as error:
        return _compiled_alone(job, error)


def _cache_folder() -> Path:
    """The folder of compiled files, which is there.

    Raises:
        _NoPlaceError: files there can't be loaded, or not be trusted; the message says why and what to do.
    """
    try:
        folder = cache_dir() / "native"
    except RuntimeError as error:
        raise _NoPlaceError(f"there is no home directory ({error}); {_CACHE_REMEDY}") from None
    # Glassbox's own two are closed if a umask of 002 has left them open.
    ours = (folder.parent, folder)
    reason = distrusted_folder(folder.parent.parent, shared=True)
    try:
        if reason is None:
            for missing in (*reversed(folder.parents), folder):
                missing.mkdir(mode=0o700, exist_ok=True)
            for own in ours:
                found = own.lstat()
                if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o022:
                    own.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
            reason = distrusted_folder(folder)
    except OSError as error:
        raise _NoPlaceError(f"{error.filename or folder} can't be made: {error.strerror}; {_CACHE_REMEDY}") from None
    if reason is not None:
        raise _NoPlaceError(f"{reason}, who could put code there; take their right to write, or {_CACHE_REMEDY}")
    if _is_noexec(folder):
        raise _NoPlaceError(f"{folder} is on a file system that is mounted noexec; {_CACHE_REMEDY}")
    return folder


def _is_kept(path: Path) -> bool:
    return path.exists() and distrusted_file(path) is None


def _from_cache(job: _Job, path: Path) -> ctypes.CDLL:
    """Loaded from the cache, after it was compiled there if it isn't yet.

    Raises:
        NativeError: it can't be compiled.
        _NoPlaceError: it can't be written there, or not be loaded from there.
    """
    damaged = None
    if _is_kept(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("%s can't be loaded (%s); it is compiled again", path, error)
            damaged = path.stat().st_ino
    _compile_once(job, path, damaged)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _no_place(path, error) from None


def _no_place(path: Path, error: OSError) -> _NoPlaceError:
    return _NoPlaceError(f"{path.parent} can't be used: {error.strerror or error}; {_CACHE_REMEDY}")


def _compile_once(job: _Job, path: Path, damaged: int | None = None) -> None:
    """Compile into the cache, or wait until another has.

    Args:
        job: what.
        path: where it belongs.
        damaged: inode of a file there that is of no use.

    Raises:
        NativeError: it can't be compiled.
        _NoPlaceError: it can't be written there.
    """
    try:
        with (
            _one_at_a_time(path.parent),
            tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as partial,
        ):
            if not _is_kept(path) or path.stat().st_ino == damaged:
                # Renamed when it is whole: a lock does not hold everywhere.
                job.compile_to(Path(partial) / path.name).replace(path)
    except OSError as error:
        raise _no_place(path, error) from None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with its process; where there is none, or for too long, go on without."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + _LONGEST_WAIT_S
        with suppress(OSError):  # not every file system locks folders
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_WAIT_S)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for a process that was forked meanwhile
        os.close(handle)


def _compiled_alone(job: _Job, why: _NoPlaceError) -> ctypes.CDLL:
    """Compiled for this process. A library stays loaded when its file is gone."""
    try:
        with tempfile.TemporaryDirectory(prefix="glassbox-") as alone:
            folder = Path(os.path.realpath(alone))
            if (reason := distrusted_folder(folder)) is not None:
                raise NativeError(f"{why}. Nor can the temporary directory be used: {reason}; {_TEMPORARY_REMEDY}")
            if _is_noexec(folder):
                raise NativeError(
                    f"{why}. Nor can the temporary directory be used: {folder.parent} is on a file system that is "
                    f"mounted noexec; {_TEMPORARY_REMEDY}"
                )
            library = ctypes.CDLL(str(job.compile_to(folder / job.name)))
    except FileNotFoundError as error:  # tempfile finds no directory that can be written to
        raise NativeError(f"{why}. Nor is there a temporary directory: {error.strerror}; {_TEMPORARY_REMEDY}") from None
    log_once(
        logger,
        logging.WARNING,
        "native-cache",
        "The compiled kernel can't be kept, and is compiled at each start: %s",
        why,
    )
    return library


def _is_noexec(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def _compiler() -> list[str]:
    """The words of $CXX (which may begin with ccache), else the first compiler that is there."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name, *options in [wanted] if wanted else [[name] for name in _COMPILERS]:
        if (found := shutil.which(name)) is not None:
            return [found, *options]
    names = wanted[:1] or _COMPILERS
    raise NativeError(f"no C++ compiler: none of {', '.join(names)} is on PATH; install g++ or set CXX")


def _compile(compiler: Sequence[str], options: Sequence[str], source: Path, target: Path) -> Path:
    message = ""
    for of_target in _TARGETS:
        message = _run([*compiler, *options, *of_target, str(source), "-o", str(target)])
        if not message:
            return target
    raise NativeError(f"{shlex.join(compiler)} can't compile {source.name}: {message}")


def _run(command: Sequence[str]) -> str:
    """Empty, or what went wrong."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return lines[0] if lines else f"exit status {done.returncode}"
