"""Compiles a C++ file of this package for this machine's CPU, once, and loads it.

Owns finding the compiler, its flags and the cache of what it made. vLLM on a CPU needs a compiler for torch.compile; a
server that runs without one (--enforce-eager) is no reason to fail, so whoever calls this has another way.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from glassbox.core.cache import cache_dir
from glassbox.core.cpu import cpu_flags

# Without -ffast-math: NaN must stay NaN, and nothing may be reordered but the sums that say so (omp simd).
_FLAGS: Final = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip
# The CPU's own instructions, in the words of GCC and Clang for x86 and for Arm; the last resort is the baseline.
_TARGETS: Final = (("-march=native",), ("-mcpu=native",), ())
_COMPILERS: Final = ("g++", "clang++", "c++")
_TIMEOUT_S: Final = 120


class NativeError(RuntimeError):
    """There is no compiler, or it refused; the message says why."""


def load_cpp(source: Path, defines: Mapping[str, str] | None = None) -> ctypes.CDLL:
    """Load a C++ file as a shared library, compiling it unless that has been done on a CPU like this one.

    Args:
        source: the file.
        defines: what macros of the file stand for, by name; so a table of this package need not be written there again.

    Raises:
        NativeError: it can't be compiled.
        OSError: the result can't be written or loaded.
    """
    compiler = _compiler()
    options = (*_FLAGS, *(f"-D{macro}={text}" for macro, text in (defines or {}).items()))
    key = hashlib.sha256(source.read_bytes())
    key.update(repr((os.path.realpath(compiler[0]), compiler[1:], options, _TARGETS, sorted(cpu_flags()))).encode())
    name = f"{source.stem}-{key.hexdigest()[:20]}.so"
    try:
        folder = cache_dir() / "native"
        if (folder / name).is_file():
            return ctypes.CDLL(str(folder / name))
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".partial-", dir=folder)
    except (OSError, RuntimeError):
        # No home (RuntimeError), or one that can't be written: compiled at each start. A library stays loaded when its
        # file is gone.
        with tempfile.TemporaryDirectory(prefix="glassbox-") as alone:
            return ctypes.CDLL(str(_compile(compiler, options, source, Path(alone) / name)))
    with scratch as partial:
        # Renamed when it is whole: several workers may start at once.
        _compile(compiler, options, source, Path(partial) / name).replace(folder / name)
    return ctypes.CDLL(str(folder / name))


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
