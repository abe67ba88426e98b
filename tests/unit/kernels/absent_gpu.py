"""A GPU that isn't there, for Triton: its compiler makes a program of it that the GPU could load, which is not run.

So a machine without one sees what the interpreter doesn't: what the compiler or the assembler refuses, memory that a
multiprocessor doesn't have, and a kernel that is compiled again where it should be known.
"""

import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton came with its interpreter, which compiles nothing; run this by itself", allow_module_level=True)

import torch
import triton
from triton.backends.compiler import GPUTarget

from glassbox.kernels import prompt_rows, row_stats

# Bytes of shared memory that one program may have.
SHARED_MEMORY: Final = {80: 163 << 10, 90: 227 << 10}

_NUMBERS: Final = itertools.count(1000)


class Program(NamedTuple):
    """One that was compiled: its kernel, the bytes of shared memory that it takes, and whether a product and a sum may
    be one instruction in it."""

    kernel: str
    shared: int
    fused: bool


class AbsentGpu:
    """Triton's driver of a GPU; see `triton.backends.driver.DriverBase` for what is asked of one.

    Args:
        capability: its compute capability, 80 or 90.
        compiles: programs are made; otherwise it is only told which ones would be, in milliseconds instead of seconds.

    Attributes:
        compiled: programs that were made for it, or found in the cache on the disk, in this order; a kernel that was
            launched on it before has none.
        asked: kernels whose programs were asked for, each of them once, in this order.
    """

    def __init__(self, capability: int, *, compiles: bool = True) -> None:
        self.capability, self._number = capability, next(_NUMBERS)
        self.compiled: list[Program] = []
        self.asked: list[str] = []
        self._compiles, self._known = compiles, set[tuple[str, object]]()
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY[capability]},
            # Module, function, registers, spilled ones, and threads that a program may have.
            load_binary=lambda name, program, *_: (None, None, 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Kernels are known by its number, which no real one has."""
        return self._number

    def get_current_stream(self, _device: int) -> int:
        return 0

    def launcher_cls(self, _source: object, _metadata: object) -> Callable[..., None]:
        """What a kernel is launched with."""
        return lambda *_: None

    def note(self, *, metadata: dict[str, Any], **_: Any) -> None:
        """Triton's compiler tells of a program that it made."""
        self.compiled.append(Program(metadata["name"], metadata["shared"], metadata["enable_fp_fusion"]))

    def ask(self, *, key: object, fn: Any, **_: Any) -> bool:
        """Triton is about to make a program of a kernel for arguments of a kind; returns whether it must not."""
        if (fn.name, key) not in self._known:
            self._known.add((fn.name, key))
            self.asked.append(fn.name)
        return not self._compiles


def absent_gpu(monkeypatch: pytest.MonkeyPatch, capability: int, *, compiles: bool = True) -> AbsentGpu:
    """As if all tensors were on such a GPU."""
    gpu = AbsentGpu(capability, compiles=compiles)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", gpu.ask)
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    monkeypatch.setattr(triton.knobs.compilation, "listener", gpu.note)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    for module in (row_stats, prompt_rows):
        monkeypatch.setattr(module, "is_hopper", lambda _: capability == 90)
    return gpu
