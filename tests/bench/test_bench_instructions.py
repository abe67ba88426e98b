"""Servers on fewer instructions than the CPU has: what torch, vLLM and the compiler take from the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from glassbox.cli.bench import instructions
from glassbox.cli.bench.instructions import AVX2, NATIVE, InstructionsError, environment, loaded_library
from glassbox.core.cpu import cpu_flags

needs_avx2 = pytest.mark.skipif("avx2" not in cpu_flags(), reason="needs a CPU with AVX2")

# Of a process as a worker is: vLLM's library is loaded when its platform imports it.
_REPORT = """
import json, psutil, torch
from vllm.platforms import current_platform
from glassbox.cli.bench.instructions import AVX2, loaded_library
current_platform.import_kernels()
print(json.dumps([
    torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx2_supported(),
    torch.backends.cpu.get_cpu_capability(), loaded_library(AVX2, [psutil.Process()]),
]))
"""


class TestEnvironment:
    def test_all_instructions_need_none(self, tmp_path: Path) -> None:
        """Nothing is changed, nothing is written."""
        assert {} == environment(NATIVE, tmp_path)
        assert [] == list(tmp_path.iterdir())

    @needs_avx2
    def test_torch_and_vllm_take_avx2(self, tmp_path: Path) -> None:
        """In a process that is started with it."""
        environ = {**os.environ, **environment(AVX2, tmp_path)}
        done = subprocess.run([sys.executable, "-c", _REPORT], env=environ, capture_output=True, text=True, check=False)
        assert 0 == done.returncode, done.stderr
        assert [False, False, True, "AVX2", "_C_AVX2.abi3.so"] == json.loads(done.stdout.splitlines()[-1])

    @needs_avx2
    def test_compilers_take_avx2(self, tmp_path: Path) -> None:
        """Though they are asked for all that the CPU has."""
        environ = environment(AVX2, tmp_path)
        command = [environ["CXX"], "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "__AVX2__" in macros
        assert "__AVX512" not in macros

    def test_a_cpu_without_them_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before a server is started."""
        monkeypatch.setattr(instructions, "cpu_flags", frozenset)
        with pytest.raises(InstructionsError, match="has no AVX2; leave --instructions out"):
            environment(AVX2, tmp_path)


class TestLoadedLibrary:
    def test_a_process_with_another_one_is_told(self) -> None:
        """This one has loaded none."""
        with pytest.raises(InstructionsError, match=r"must have loaded _C_AVX2\.abi3\.so alone, got none"):
            loaded_library(AVX2, [psutil.Process(os.getppid())])
