"""What is read of /proc/cpuinfo, for files of different machines."""

import os
from pathlib import Path

import pytest

from glassbox.core.cpu import cpu_model, serving_dtype

# First lines of the kernel's file on machines of each kind.
SAPPHIRE = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: avx2 avx512bw amx_bf16\n\nprocessor\t: 1\n"
MILAN = "processor\t: 0\nmodel name\t: AMD EPYC 7763\nflags\t\t: fpu sse2 avx avx2 fma\n\nprocessor\t: 1\n"
GRAVITON_3 = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve bf16 i8mm\nCPU part\t: 0xd40\n"
GRAVITON_2 = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes\nCPU part\t: 0xd0c\n"


def cpuinfo(folder: Path, text: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "dtype"),
    [(SAPPHIRE, "bfloat16"), (GRAVITON_3, "bfloat16"), (MILAN, "float32"), (GRAVITON_2, "float32"), ("", "float32")],
)
def test_dtype(tmp_path: Path, text: str, dtype: str) -> None:
    """bfloat16 only where there are instructions for it."""
    assert serving_dtype(cpuinfo(tmp_path, text)) == dtype


def test_without_the_file(tmp_path: Path) -> None:
    """Not Linux: float32, which every CPU has, and some name."""
    missing = tmp_path / "cpuinfo"
    assert serving_dtype(missing) == "float32"
    assert cpu_model(missing).endswith(f", {os.cpu_count()} cores")


def test_name(tmp_path: Path) -> None:
    """The model's name as the kernel gives it."""
    assert cpu_model(cpuinfo(tmp_path, MILAN)) == f"AMD EPYC 7763, {os.cpu_count()} cores"
