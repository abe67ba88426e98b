"""Servers on this CPU as on one that knows fewer instructions: AVX2 alone where there is AVX-512.

Owns what must be told, each in its own way: torch (which says to vLLM and to torch.compile what the CPU knows), oneDNN,
MKL, and the compiler that torch.compile and glassbox call. What was in fact loaded can be seen in a server's processes.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil

from glassbox.core.cpu import cpu_flags

NATIVE: Final = "native"
AVX2: Final = "avx2"
CHOICES: Final = (NATIVE, AVX2)

# vLLM has a library for each set of instructions, and takes the one that torch.cpu's capabilities name.
_LIBRARY_OF_AVX2: Final = "_C_AVX2.abi3.so"
_LIBRARIES: Final = ("_C.abi3.so", "_C_AVX512.abi3.so", _LIBRARY_OF_AVX2)
# Run by Python at its start, in every process of a server.
_SITECUSTOMIZE: Final = '''"""Takes AVX-512, AVX10 and AMX out of what torch says that this CPU knows."""

import importlib.machinery
import sys


class Finder:
    def find_spec(self, name, path, target=None):
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            known = module.get_capabilities
            module.get_capabilities = lambda: {
                what: False if what.startswith(("avx512", "avx10", "amx")) else has for what, has in known().items()
            }

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


class InstructionsError(RuntimeError):
    """A server can't be run with these instructions, or was not; the message says why."""


def environment(choice: str, folder: Path) -> dict[str, str]:
    """Environment variables of servers that use only the chosen instructions.

    Args:
        choice: one of CHOICES.
        folder: for the files that this needs, of this user alone; it must last as long as the servers.

    Raises:
        InstructionsError: the CPU doesn't know them, or there is no compiler.
    """
    if choice == NATIVE:
        return {}
    if "avx2" not in cpu_flags():
        raise InstructionsError("instructions must be of this CPU, which has no AVX2; leave --instructions out")
    compiler = shutil.which("g++")
    if compiler is None:
        raise InstructionsError("there must be a g++ on PATH, which vLLM compiles with as well; install it")
    modules, programs = folder / "modules", folder / "programs"
    for part in (modules, programs):
        part.mkdir(parents=True)
    (modules / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    # The last word, since both callers ask for all that this CPU has; with AVX512F go all that need it.
    wrapper = programs / "g++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -mno-avx512f\n')
    wrapper.chmod(0o700)
    return {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PYTHONPATH": os.pathsep.join([str(modules), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
        "CXX": str(wrapper),
        # Nothing that was compiled for all of this CPU.
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def loaded_library(choice: str, processes: Iterable[psutil.Process]) -> str:
    """Which of vLLM's libraries a server's processes have loaded, by their names.

    Raises:
        InstructionsError: not the one for the chosen instructions.
    """
    loaded: set[str] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            loaded |= {Path(mapped.path).name for mapped in process.memory_maps()}
    found = ", ".join(sorted(loaded.intersection(_LIBRARIES)))
    if choice == AVX2 and found != _LIBRARY_OF_AVX2:
        raise InstructionsError(
            f"a server for --instructions {choice} must have loaded {_LIBRARY_OF_AVX2} alone, got {found or 'none'}; "
            "this vLLM chooses its library in another way than 0.32 does, leave the option out"
        )
    return found or "unknown"
